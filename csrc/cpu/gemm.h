// The matrix products of a rank, each by the engine that choose.h names: torch's ATen (MKL or OpenBLAS in fp32),
// oneDNN, or for few rows our own (loops/gemv.h).
#pragma once

#include "choose.h"
#include "cpu/loops/gemv.h"
#include "torch_side/tensor.h"

namespace tpk {

// x[N, M] of the same memory as x[M, N]
Tensor transpose(const Tensor& x);

// Whether this torch has oneDNN's linear.
bool has_onednn_linear();

// The engine for these tensors. Where their strides do not fit the chosen one, it is ATen.
Engine engine_for(const Communicator& comm, const Tensor& x, const Tensor& w);

// y[..., N] = x[..., K] @ w[N, K].T (+ bias)
Tensor linear(const Communicator& comm, const Tensor& x, const Tensor& w, const OptionalTensor& bias);
// By our own loop, on the threads of torch.
void multiply_few_rows(DType dtype, const Gemv& product);
// The same of rows x[M, K] by this engine; the result is contiguous.
Tensor product_by(Engine engine, const Tensor& x, const Tensor& w, const OptionalTensor& bias);
// dx[..., K] = dy[..., N] @ w[N, K]
Tensor grad_input(const Communicator& comm, const Tensor& dy, const Tensor& w);
// dw[N, K] = sum over tokens of dy[..., N] x[..., K]
Tensor grad_weight(const Tensor& dy, const Tensor& x);
// db[N] = sum over tokens of dy[..., N]
Tensor grad_bias(const Tensor& dy);

}  // namespace tpk
