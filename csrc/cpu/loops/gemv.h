// Products with at most four rows of x, as in a decoding step: bound by the bandwidth of the weights. Torch-free.
#pragma once

#include <cstddef>

#include "core/lanes.h"

namespace tpk {

constexpr size_t kMostGemvRows = 4;  // beyond, arithmetic is the limit, and a real GEMM is faster

// y[m, n] = sum_k x[m, k] w[n, k] (+ bias[n]), summed in fp32 and rounded once. Each sum is taken in an order of its
// own length alone, whichever thread computes it: the bits depend on M being one or more, not on threads or instruction
// set.
struct Gemv {
  const float* x;     // [M, K], dense
  const Bfloat16* w;  // [N, K], rows dense
  ptrdiff_t w_stride;
  const Bfloat16* bias;  // [N] or nullptr
  Bfloat16* y;           // [M, N], dense
  size_t M, N, K;
};

// Writes y[:, begin:end]; M is 1 to kMostGemvRows.
void gemv(const Gemv& product, size_t begin, size_t end);

// to[i] = from[i]
void widen(const Bfloat16* from, float* to, size_t n);

}  // namespace tpk
