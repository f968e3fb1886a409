// The row loops of the fused residual add and RMSNorm, and of its gradient; the sum of squares. Torch-free.
#pragma once

#include <cstddef>

#include "lanes.h"

namespace tpk {

// sum[width] (of the ranks' x) becomes residual_out = sum + residual, rounded to T;
// i = 1 / sqrt(mean(residual_out^2) + eps);  y = residual_out i weight, rounded once.
template <class T>
void add_norm_row(T* sum, const T* residual, const T* weight, size_t width, SumOf<T> eps, T* y, SumOf<T>* inverse_rms);

// With g = dy weight:  dr = i (g - r i^2 mean(g r)) + dr_out,  dweight += dy r i.   dr_out, dr and dweight may be null.
template <class T>
void norm_gradient_row(const T* dy, const T* dr_out, const T* r, const T* weight, SumOf<T> inverse_rms, size_t width,
                       T* dr, SumOf<T>* dweight);

// Squares and sums in double: no square leaves the range, and the sum of a billion values keeps eight digits and more.
template <class T>
double sum_of_squares(const T* x, size_t n);

}  // namespace tpk
