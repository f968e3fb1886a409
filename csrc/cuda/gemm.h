// The matrix products of a rank on a device: cuBLAS as torch calls it, and the other ops of torch that are used.
// Each product is written into a tensor that is given, on torch's current stream, and rounded once, bias included.
#pragma once

#include "stream.h"

namespace tpk::cuda {

Tensor rows_of(const Tensor& x, int64_t start, int64_t count);

// y[M, N] = x[M, K] @ w[N, K].T (+ bias[N])
void linear_into(const Tensor& x, const Tensor& w, const OptionalTensor& bias, const Tensor& y);
// y[M, N] = x[M, K] @ w[K, N]
void product_into(const Tensor& x, const Tensor& w, const Tensor& y);
// db[N] = sum over tokens of dy[M, N]
void sum_rows_into(const Tensor& dy, const Tensor& db);

// y = x, of the same shape.
void copy_on_stream(const Tensor& x, const Tensor& y);

Tensor transpose(const Tensor& x);

// x[n] in ascending order, and where each value was; equal values keep their order.
std::pair<Tensor, Tensor> sort_stably(const Tensor& x);
Tensor to_int64(const Tensor& x);

}  // namespace tpk::cuda
