// The matrix products of a rank, each through the fastest of three engines: torch's ATen (MKL or OpenBLAS in fp32) and
// oneDNN, and for few rows of bf16 our own (gemv.h). Which one is decided by shape and machine and never by a clock
// inside a run, so that two runs give the same bits.
#pragma once

#include "torch_side/tensor.h"

namespace tpk {

enum class Engine : uint8_t { Aten, OneDnn, Gemv };

const char* name_of(Engine engine);
Engine engine_of(const std::string& name);  // throws std::invalid_argument

// Whether an engine can make such a product.
bool takes(Engine engine, DType dtype, int64_t M, int64_t N, int64_t K);

// The engine for y[M, N] = x[M, K] @ w[N, K].T, and why.
struct EngineChoice {
  Engine engine;
  const char* reason;
};
EngineChoice choose_engine(DType dtype, int64_t M, int64_t N, int64_t K);
// The same for these tensors, which may lie in memory as one engine does not take them.
Engine engine_for(const Tensor& x, const Tensor& w);

// What the rule knows of the CPU. Nothing else in the choice of an engine depends on the machine.
struct Cpu {
  bool amd = false;     // else MKL, which ATen calls in fp32, is at its best
  bool avx512 = false;  // avx512f
};
// Let the rule decide as on another CPU; nullopt: as on this one again. For tests.
void assume_cpu(std::optional<Cpu> other);

// Whether torch has oneDNN, and what a measurement on this machine found for one shape.
void set_onednn_available(bool available);
void set_measured_engine(DType dtype, int64_t M, int64_t N, int64_t K, Engine engine);
void forget_measured_engines();

// y[..., N] = x[..., K] @ w[N, K].T (+ bias)
Tensor linear(const Tensor& x, const Tensor& w, const OptionalTensor& bias);
// The same through a given engine, for measuring.
Tensor linear_by(Engine engine, const Tensor& x, const Tensor& w, const OptionalTensor& bias);
// The same into y, which must be contiguous. Not through oneDNN, which has no such form.
void linear_into(Engine engine, const Tensor& x, const Tensor& w, Tensor& y);
// dx[..., K] = dy[..., N] @ w[N, K]
Tensor grad_input(const Tensor& dy, const Tensor& w);
// dw[N, K] = sum over tokens of dy[..., N] x[..., K]
Tensor grad_weight(const Tensor& dy, const Tensor& x);
// db[N] = sum over tokens of dy[..., N]
Tensor grad_bias(const Tensor& dy);

}  // namespace tpk
