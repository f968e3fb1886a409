#include "softmax.h"

#include <cmath>
#include <limits>

#include "core/simd.h"
#include "exponential.h"

namespace tpk {
namespace {

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
TPK_INLINE void row_gradient_loop(const T* logits, size_t n, LogSum<Sum> lse, Sum uniform, Sum scale, T* gradient) {
  for (size_t j = 0; j < n; ++j) {
    store(scale * (exponential(Sum(Sum(load(logits[j]) - lse.near) - lse.rest)) - uniform), &gradient[j]);
  }
}

}  // namespace

#define TPK_ROWS(T, Sum)                                                                                           \
  template <>                                                                                                      \
  TPK_SIMD void row_stats<T>(const T* logits, size_t n, bool smoothing, RowStats<Sum>* stats) {                    \
    row_stats_loop<T, Sum>(logits, n, smoothing, stats);                                                           \
  }                                                                                                                \
  template <>                                                                                                      \
  TPK_SIMD void row_gradient<T>(const T* logits, size_t n, LogSum<Sum> lse, Sum uniform, Sum scale, T* gradient) { \
    row_gradient_loop<T, Sum>(logits, n, lse, uniform, scale, gradient);                                           \
  }

TPK_ROWS(float, float)
TPK_ROWS(double, double)
TPK_ROWS(Half, float)
TPK_ROWS(Bfloat16, float)

}  // namespace tpk
