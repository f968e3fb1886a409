#include "norm_rows.h"

#include <cmath>

namespace tpk {
namespace {

template <class T, class Sum>
TPK_INLINE Sum add_and_square(T* sum, const T* residual, size_t j) {
  store(load(sum[j]) + load(residual[j]), &sum[j]);
  const Sum value = load(sum[j]);
  return value * value;
}

template <class T, class Sum>
TPK_INLINE void add_norm_loop(T* sum, const T* residual, const T* weight, size_t width, Sum eps, T* y,
                              Sum* inverse_rms) {
  Sum squares[kLanes] = {};
  size_t j = 0;
  for (; j + kLanes <= width; j += kLanes) {
    for (size_t l = 0; l < kLanes; ++l) squares[l] += add_and_square<T, Sum>(sum, residual, j + l);
  }
  for (; j < width; ++j) squares[0] += add_and_square<T, Sum>(sum, residual, j);
  const Sum mean = width == 0 ? Sum(0) : sum_of_lanes(squares) / static_cast<Sum>(width);
  const Sum inverse = Sum(1) / std::sqrt(mean + eps);
  *inverse_rms = inverse;
  for (j = 0; j < width; ++j) store(Sum(load(sum[j]) * inverse * load(weight[j])), &y[j]);
}

template <class T, class Sum>
TPK_INLINE Sum mean_of_products(const T* dy, const T* r, const T* weight, size_t width) {
  Sum products[kLanes] = {};
  size_t j = 0;
  for (; j + kLanes <= width; j += kLanes) {
    for (size_t l = 0; l < kLanes; ++l) products[l] += load(dy[j + l]) * load(weight[j + l]) * load(r[j + l]);
  }
  for (; j < width; ++j) products[0] += load(dy[j]) * load(weight[j]) * load(r[j]);
  return width == 0 ? Sum(0) : sum_of_lanes(products) / static_cast<Sum>(width);
}

template <class T, class Sum>
TPK_INLINE void norm_gradient_loop(const T* dy, const T* dr_out, const T* r, const T* weight, Sum inverse, size_t width,
                                   T* dr, Sum* dweight) {
  if (dr != nullptr) {
    const Sum along = mean_of_products<T, Sum>(dy, r, weight, width) * inverse * inverse;
    for (size_t j = 0; j < width; ++j) {
      const Sum through = inverse * (load(dy[j]) * load(weight[j]) - load(r[j]) * along);
      store(dr_out == nullptr ? through : Sum(through + load(dr_out[j])), &dr[j]);
    }
  }
  if (dweight == nullptr) return;
  for (size_t j = 0; j < width; ++j) dweight[j] += load(dy[j]) * (load(r[j]) * inverse);
}

template <class T>
TPK_INLINE double sum_of_squares_loop(const T* x, size_t n) {
  double squares[kLanes] = {};
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (size_t l = 0; l < kLanes; ++l) {
      const double value = load(x[i + l]);
      squares[l] += value * value;
    }
  }
  for (; i < n; ++i) squares[0] += static_cast<double>(load(x[i])) * static_cast<double>(load(x[i]));
  return sum_of_lanes(squares);
}

}  // namespace

#define TPK_NORM_ROWS(T, Sum)                                                                                    \
  template <>                                                                                                    \
  TPK_SIMD void add_norm_row<T>(T * sum, const T* residual, const T* weight, size_t width, Sum eps, T* y,        \
                                Sum* inverse_rms) {                                                              \
    add_norm_loop<T, Sum>(sum, residual, weight, width, eps, y, inverse_rms);                                    \
  }                                                                                                              \
  template <>                                                                                                    \
  TPK_SIMD void norm_gradient_row<T>(const T* dy, const T* dr_out, const T* r, const T* weight, Sum inverse_rms, \
                                     size_t width, T* dr, Sum* dweight) {                                        \
    norm_gradient_loop<T, Sum>(dy, dr_out, r, weight, inverse_rms, width, dr, dweight);                          \
  }                                                                                                              \
  template <>                                                                                                    \
  TPK_SIMD double sum_of_squares<T>(const T* x, size_t n) {                                                      \
    return sum_of_squares_loop<T>(x, n);                                                                         \
  }

TPK_NORM_ROWS(float, float)
TPK_NORM_ROWS(double, double)
TPK_NORM_ROWS(Half, float)
TPK_NORM_ROWS(Bfloat16, float)

}  // namespace tpk
