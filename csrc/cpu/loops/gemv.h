// Products with at most eight rows of x, as in a decoding step: bound by the bandwidth of the weights. Torch-free.
//
// A path is the loop for one instruction set; the intrinsics are in gemv_avx2.cpp and gemv_avx512.cpp alone, the loop
// around them in gemv_loops.h.
#pragma once

#include <cstddef>
#include <vector>

#include "core/types.h"

namespace tpk {

constexpr size_t kMostGemvRows = 8;  // beyond, arithmetic is the limit, and a real GEMM is faster

// y[m, n] = sum_k x[m, k] w[n, k] (+ bias[n]), summed in fp32 and rounded once. The order of a sum depends on K and on
// the path alone: a row has the same bits whatever rows are beside it, and whichever thread computes it.
struct Gemv {
  const void* x;  // [M, K], dense; all in the dtype of the path
  const void* w;  // [N, K], rows dense
  ptrdiff_t w_stride;
  const void* bias;  // [N] or nullptr
  void* y;           // [M, N], dense
  size_t M, N, K;    // M is 1 to kMostGemvRows
};

struct GemvPath {
  const char* name;
  // x as `multiply` reads it; `packed` is aligned to 64 bytes and has room for gemv_packed_bytes.
  void (*pack)(const Gemv& product, void* packed);
  // Writes y[:, begin:end].
  void (*multiply)(const Gemv& product, const void* packed, size_t begin, size_t end);
};

// Those that this machine has for F32, BF16 or F16, the fastest first, the portable one last.
const std::vector<GemvPath>& gemv_paths(DType dtype);

size_t gemv_packed_bytes(size_t M, size_t K);

}  // namespace tpk
