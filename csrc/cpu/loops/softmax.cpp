#include "softmax.h"

#include <cmath>
#include <limits>

#include "core/simd.h"

namespace tpk {
namespace {

TPK_INLINE double exponential(double x) { return std::exp(x); }

// exp(x) for x <= 0 within 2 ulp: x = k ln 2 + r, a polynomial in r, the exponent set by adding k to it. NaN stays NaN.
TPK_INLINE float exponential(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float clamped = x < -87.0f ? -87.0f : x;
  const float shifted = clamped * 1.44269504088896341f + kRound;
  const float k = shifted - kRound;
  const float r = (clamped - k * 0.693359375f) + k * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const float result = from_bits(bits_of(p) + (bits_of(shifted) << 23));
  return x < -87.0f ? 0.0f : (x == x ? result : x);
}

template <class T, class Sum>
TPK_INLINE Sum largest_of(const T* logits, size_t n) {
  Sum lanes[kLanes];
  for (size_t l = 0; l < kLanes; ++l) lanes[l] = -std::numeric_limits<Sum>::infinity();
  size_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    for (size_t l = 0; l < kLanes; ++l) {
      const Sum value = load(logits[j + l]);
      lanes[l] = value > lanes[l] ? value : lanes[l];
    }
  }
  for (; j < n; ++j) lanes[0] = load(logits[j]) > lanes[0] ? load(logits[j]) : lanes[0];
  for (size_t l = 1; l < kLanes; ++l) lanes[0] = lanes[l] > lanes[0] ? lanes[l] : lanes[0];
  return lanes[0];
}

template <class T, class Sum>
TPK_INLINE void row_stats_loop(const T* logits, size_t n, bool smoothing, RowStats<Sum>* stats) {
  const Sum largest = largest_of<T, Sum>(logits, n);
  // A row of nothing but -inf (or an empty one): no exponents, instead of exp(-inf + inf).
  const Sum base = largest == -std::numeric_limits<Sum>::infinity() ? Sum(0) : largest;
  Sum exponents[kLanes] = {}, totals[kLanes] = {};
  size_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    for (size_t l = 0; l < kLanes; ++l) exponents[l] += exponential(Sum(load(logits[j + l]) - base));
  }
  for (; j < n; ++j) exponents[0] += exponential(Sum(load(logits[j]) - base));
  if (smoothing) {
    for (j = 0; j + kLanes <= n; j += kLanes) {
      for (size_t l = 0; l < kLanes; ++l) totals[l] += load(logits[j + l]);
    }
    for (; j < n; ++j) totals[0] += load(logits[j]);
  }
  *stats = {largest, sum_of_lanes(exponents), Sum(0), sum_of_lanes(totals)};
}

template <class T, class Sum>
TPK_INLINE void row_gradient_loop(const T* logits, size_t n, Sum lse, Sum uniform, Sum scale, T* gradient) {
  for (size_t j = 0; j < n; ++j) store(scale * (exponential(Sum(load(logits[j]) - lse)) - uniform), &gradient[j]);
}

}  // namespace

#define TPK_ROWS(T, Sum)                                                                                   \
  template <>                                                                                              \
  TPK_SIMD void row_stats<T>(const T* logits, size_t n, bool smoothing, RowStats<Sum>* stats) {            \
    row_stats_loop<T, Sum>(logits, n, smoothing, stats);                                                   \
  }                                                                                                        \
  template <>                                                                                              \
  TPK_SIMD void row_gradient<T>(const T* logits, size_t n, Sum lse, Sum uniform, Sum scale, T* gradient) { \
    row_gradient_loop<T, Sum>(logits, n, lse, uniform, scale, gradient);                                   \
  }

TPK_ROWS(float, float)
TPK_ROWS(double, double)
TPK_ROWS(Half, float)
TPK_ROWS(Bfloat16, float)

}  // namespace tpk
