#include "fused_path.h"

#include <algorithm>

namespace tpk::cuda {
namespace {

bool begins_at_16_bytes(const Tensor& x) { return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0; }

int64_t whole_units(int64_t n) { return std::max((n + kFusedUnit - 1) / kFusedUnit, int64_t{1}) * kFusedUnit; }

// x[a, b] as a tensor map takes it, with zeros behind it up to [rows, columns]. Copied only where it must be: strides,
// addresses and the size of a shard may differ between ranks, and must not change the path.
Tensor mapped(const Tensor& x, int64_t rows, int64_t columns) {
  if (x.size(0) != rows || x.size(1) != columns) {
    return made([=] { return torch::stable::pad(x, {0, columns - x.size(1), 0, rows - x.size(0)}); });
  }
  const bool one_row = rows <= 1, strides = one_row || (x.stride(0) % kFusedUnit == 0 && x.stride(0) >= columns);
  if (x.stride(1) == 1 && strides && begins_at_16_bytes(x)) return x;
  if (!x.is_contiguous()) return dense(x);
  return made([x] { return torch::stable::clone(x); });
}

Tensor padded_bias(const Tensor& bias, int64_t N) {
  if (bias.size(0) == N && bias.is_contiguous() && begins_at_16_bytes(bias)) return bias;
  if (bias.size(0) != N) return made([=] { return torch::stable::pad(bias, {0, N - bias.size(0)}); });
  return bias.is_contiguous() ? made([bias] { return torch::stable::clone(bias); }) : dense(bias);
}

size_t stride_of(const Tensor& x) { return static_cast<size_t>(x.size(0) <= 1 ? x.size(1) : x.stride(0)); }

// w[N, K] as it lies, or its transpose where that is how it lies (the w of a backward).
struct Weight {
  bool transposed;
  Tensor lies;

  Weight(const Tensor& w, int64_t N, int64_t K)
      : transposed(w.stride(1) != 1 && w.stride(0) == 1),
        lies(transposed ? mapped(transpose(w), K, N) : mapped(w, N, K)) {}
};

FusedGemm operands_of(const Tensor& x, const Weight& w, const OptionalTensor& bias, const Cut& rows) {
  FusedGemm gemm{};
  gemm.x = x.const_data_ptr(), gemm.w = w.lies.const_data_ptr();
  gemm.bias = bias.has_value() ? bias->const_data_ptr() : nullptr;
  gemm.x_stride = stride_of(x), gemm.w_stride = stride_of(w.lies);
  gemm.N = static_cast<uint32_t>(w.lies.size(w.transposed ? 1 : 0));
  gemm.K = static_cast<uint32_t>(w.lies.size(w.transposed ? 0 : 1));
  gemm.w_transposed = w.transposed;
  gemm.rows = rows;
  return gemm;
}

}  // namespace

bool takes_fused(const DeviceCommunicator& comm, Op op, const Wire& wire, int64_t M, int64_t shared, int64_t own,
                 bool wants_w) {
  return comm.choose({op, wire.dtype, wire.codec, M, shared, own, wants_w}).fused;
}

void reduce_fused(DeviceCommunicator& comm, const CallSpec& spec, const Tensor& x, const Tensor& w,
                  const OptionalTensor& bias, const Cut& rows, const Tensor& y) {
  const int64_t N = w.size(0), K = whole_units(w.size(1));
  const OptionalTensor b = bias.has_value() ? OptionalTensor(padded_bias(*bias, N)) : bias;
  const Tensor from = mapped(x, x.size(0), K);
  const Weight weight(w, N, K);
  FusedGemm gemm = operands_of(from, weight, b, rows);
  gemm.y = data_of(y);
  comm.fused_gemm(spec, gemm);
}

void gather_fused(DeviceCommunicator& comm, const CallSpec& spec, const Tensor& x_shard, const Tensor& x_whole,
                  const Tensor& w, const OptionalTensor& bias, const Cut& rows, const Tensor& y) {
  const int64_t K = w.size(1), N = whole_units(w.size(0));
  const bool narrower = N != w.size(0);
  const OptionalTensor b = bias.has_value() ? OptionalTensor(padded_bias(*bias, N)) : bias;
  const Tensor from = mapped(x_shard, x_shard.size(0), K);
  const Weight weight(w, N, K);
  Tensor product = narrower ? empty_of(y, {y.size(0), N}) : y;
  FusedGemm gemm = operands_of(from, weight, b, rows);
  gemm.y = data_of(product), gemm.x_whole = data_of(x_whole);
  comm.fused_gemm(spec, gemm);
  if (narrower) copy_on_stream(kept(torch::stable::narrow(product, 1, 0, w.size(0))), y);
}

}  // namespace tpk::cuda
