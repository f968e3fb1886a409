#include "decode_rows.h"

#include <cmath>

#include "exponential.h"
#include "softmax.h"

namespace tpk {
namespace {

template <class T>
TPK_INLINE void rotate_loop(T* heads, size_t count, size_t head_dim, const T* cos, const T* sin) {
  const size_t half = head_dim / 2;
  for (size_t h = 0; h < count; ++h, heads += head_dim) {
    for (size_t j = 0; j < half; ++j) {
      const float first = to_float(heads[j]), second = to_float(heads[j + half]);
      store(first * to_float(cos[j]) - second * to_float(sin[j]), &heads[j]);
      store(second * to_float(cos[j + half]) + first * to_float(sin[j + half]), &heads[j + half]);
    }
  }
}

template <class T>
TPK_INLINE void scores_loop(const T* q, const CachedHead<T>& head, float scale, float* scores) {
  const T* key = head.keys;
  for (size_t t = 0; t < head.tokens; ++t, key += head.head_dim) {
    float lanes[kLanes] = {};
    size_t j = 0;
    for (; j + kLanes <= head.head_dim; j += kLanes) {
      for (size_t l = 0; l < kLanes; ++l) lanes[l] += to_float(q[j + l]) * to_float(key[j + l]);
    }
    for (; j < head.head_dim; ++j) lanes[0] += to_float(q[j]) * to_float(key[j]);
    scores[t] = sum_of_lanes(lanes) * scale;
  }
}

template <class T>
TPK_INLINE void values_loop(const float* weights, const CachedHead<T>& head, float* sums, T* y) {
  for (size_t j = 0; j < head.head_dim; ++j) sums[j] = 0.0f;
  const T* value = head.values;
  for (size_t t = 0; t < head.tokens; ++t, value += head.head_dim) {
    for (size_t j = 0; j < head.head_dim; ++j) sums[j] += weights[t] * to_float(value[j]);
  }
  for (size_t j = 0; j < head.head_dim; ++j) store(sums[j], &y[j]);
}

template <class T>
TPK_INLINE void gate_loop(const T* gate, const T* up, size_t n, T* y) {
  for (size_t j = 0; j < n; ++j) {
    const float x = to_float(gate[j]);
    const float e = exponential(x < 0.0f ? x : -x);  // exp(-|x|)
    const float sigmoid = (x < 0.0f ? e : 1.0f) / (1.0f + e);
    store(x * sigmoid * to_float(up[j]), &y[j]);
  }
}

}  // namespace

template <class T>
void head_scores(const T* q, const CachedHead<T>& head, float scale, float* scores);
template <class T>
void head_values(const float* weights, const CachedHead<T>& head, float* sums, T* y);

#define TPK_DECODE_ROWS(T)                                                                              \
  template <>                                                                                           \
  TPK_SIMD void rotate_heads<T>(T * heads, size_t count, size_t head_dim, const T* cos, const T* sin) { \
    rotate_loop<T>(heads, count, head_dim, cos, sin);                                                   \
  }                                                                                                     \
  template <>                                                                                           \
  TPK_SIMD void head_scores<T>(const T* q, const CachedHead<T>& head, float scale, float* scores) {     \
    scores_loop<T>(q, head, scale, scores);                                                             \
  }                                                                                                     \
  template <>                                                                                           \
  TPK_SIMD void head_values<T>(const float* weights, const CachedHead<T>& head, float* sums, T* y) {    \
    values_loop<T>(weights, head, sums, y);                                                             \
  }                                                                                                     \
  template <>                                                                                           \
  TPK_SIMD void gate_rows<T>(const T* gate, const T* up, size_t n, T* y) {                              \
    gate_loop<T>(gate, up, n, y);                                                                       \
  }

TPK_DECODE_ROWS(float)
TPK_DECODE_ROWS(Half)
TPK_DECODE_ROWS(Bfloat16)

template <class T>
void attend(const T* q, const CachedHead<T>& head, float scale, float* scores, float* sums, T* y) {
  head_scores<T>(q, head, scale, scores);
  RowStats<float> stats{};
  row_stats<float>(scores, head.tokens, false, &stats);
  const float lse = stats.largest + std::log(stats.exponents);
  row_gradient<float>(scores, head.tokens, LogSum<float>(lse), 0.0f, 1.0f, scores);
  head_values<T>(scores, head, sums, y);
}

template void attend<float>(const float*, const CachedHead<float>&, float, float*, float*, float*);
template void attend<Half>(const Half*, const CachedHead<Half>&, float, float*, float*, Half*);
template void attend<Bfloat16>(const Bfloat16*, const CachedHead<Bfloat16>&, float, float*, float*, Bfloat16*);

}  // namespace tpk
