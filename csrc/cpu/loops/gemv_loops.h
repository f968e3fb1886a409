// The loop of a product of few rows, for one instruction set: included by the files that define a Kernel for theirs.
//
// Order   Sixteen partial sums, lane by lane in the order of k, then the lanes in halves: the same for every number of
//         rows of x, and of weights that are read at a time.
// Layout  packed[K / kStep][M][kStep]: one stream, too, and no two rows at one place of the cache. Zeros to the end.
#pragma once

#include <cstring>

#include "core/lanes.h"
#include "gemv.h"

namespace tpk {
namespace {

// Bytes of weights that are requested before their turn. Rows of weights follow each other in memory, or nearly.
constexpr size_t kGemvAhead = 16384;
constexpr size_t kGemvBlock = 16;  // rows of weights whose results are written together
constexpr size_t kCacheLine = 64;

template <class Kernel>
void gemv_pack(const Gemv& p, void* packed) {
  constexpr size_t kStep = Kernel::kStep;
  const auto* x = static_cast<const typename Kernel::Value*>(p.x);
  auto* to = static_cast<typename Kernel::Packed*>(packed);
  for (size_t k = 0; k < p.K; k += kStep) {
    const size_t count = p.K - k < kStep ? p.K - k : kStep;
    for (size_t m = 0; m < p.M; ++m, to += kStep) {
      Kernel::pack(x + m * p.K + k, count, to);
      std::memset(to + count, 0, (kStep - count) * sizeof *to);
    }
  }
}

// A step of k for R rows of weights and G rows of x.
template <class Kernel, int R, int G>
TPK_INLINE void gemv_step(typename Kernel::Sums* sums, const typename Kernel::Weights* weights,
                          const typename Kernel::Packed* x) {
#pragma GCC unroll 8
  for (int m = 0; m < G; ++m) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) Kernel::add(sums[m * R + r], weights[r], x + m * Kernel::kStep);
  }
}

// totals[m * kGemvBlock + r] of R rows of weights from w on and the G rows of x from x on.
template <class Kernel, int R, int G>
TPK_INLINE void gemv_tile(const Gemv& p, const typename Kernel::Value* w, const typename Kernel::Packed* x,
                          float* totals) {
  using Value = typename Kernel::Value;
  constexpr size_t kStep = Kernel::kStep;
  typename Kernel::Sums sums[R * G];
  typename Kernel::Weights weights[R];
#pragma GCC unroll 16
  for (int i = 0; i < R * G; ++i) Kernel::clear(sums[i]);
  const char* ahead = reinterpret_cast<const char*>(w) + kGemvAhead;
  size_t k = 0;
  for (; k + kStep <= p.K; k += kStep, x += p.M * kStep, ahead += R * kStep * sizeof(Value)) {
#pragma GCC unroll 8
    for (size_t b = 0; b < R * kStep * sizeof(Value); b += kCacheLine) __builtin_prefetch(ahead + b);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) Kernel::load(w + r * p.w_stride + k, weights[r]);
    gemv_step<Kernel, R, G>(sums, weights, x);
  }
  if (k < p.K) {
    for (int r = 0; r < R; ++r) {
      Value last[kStep] = {};
      std::memcpy(last, w + r * p.w_stride + k, (p.K - k) * sizeof(Value));
      Kernel::load(last, weights[r]);
    }
    gemv_step<Kernel, R, G>(sums, weights, x);
  }
#pragma GCC unroll 8
  for (int m = 0; m < G; ++m) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) totals[m * kGemvBlock + r] = Kernel::total(sums[m * R + r]);
  }
}

// The sums of `rows` rows of weights, at most kGemvBlock, and G rows of x.
template <class Kernel, int G>
TPK_INLINE void gemv_rows(const Gemv& p, const typename Kernel::Value* w, size_t rows, const typename Kernel::Packed* x,
                          float* totals) {
  constexpr int R = Kernel::rows_with(G);
  size_t i = 0;
  for (; i + R <= rows; i += R, w += R * p.w_stride) gemv_tile<Kernel, R, G>(p, w, x, totals + i);
  for (; i < rows; ++i, w += p.w_stride) gemv_tile<Kernel, 1, G>(p, w, x, totals + i);
}

// The same for `count` rows of x, at most G.
template <class Kernel, int G>
TPK_INLINE void gemv_group(const Gemv& p, const typename Kernel::Value* w, size_t rows,
                           const typename Kernel::Packed* x, size_t count, float* totals) {
  if constexpr (G > 1) {
    if (count < G) return gemv_group<Kernel, G - 1>(p, w, rows, x, count, totals);
  }
  gemv_rows<Kernel, G>(p, w, rows, x, totals);
}

template <class Kernel>
void gemv_multiply(const Gemv& p, const void* packed, size_t begin, size_t end) {
  using Value = typename Kernel::Value;
  const auto* x = static_cast<const typename Kernel::Packed*>(packed);
  const auto* bias = static_cast<const Value*>(p.bias);
  float totals[kMostGemvRows * kGemvBlock];
  for (size_t n = begin; n < end; n += kGemvBlock) {
    const size_t rows = end - n < kGemvBlock ? end - n : kGemvBlock;
    const Value* const w = static_cast<const Value*>(p.w) + static_cast<ptrdiff_t>(n) * p.w_stride;
    for (size_t m = 0; m < p.M; m += Kernel::kMostRows) {
      gemv_group<Kernel, Kernel::kMostRows>(p, w, rows, x + m * Kernel::kStep, p.M - m, totals + m * kGemvBlock);
    }
    for (size_t m = 0; m < p.M; ++m) {
      Value* const y = static_cast<Value*>(p.y) + m * p.N + n;
      const float* const from = totals + m * kGemvBlock;
      for (size_t i = 0; i < rows; ++i) {
        const float sum = bias == nullptr ? from[i] : from[i] + to_float(bias[n + i]);
        store(sum, &y[i]);
      }
    }
  }
}

template <class Kernel>
constexpr GemvPath gemv_path() {
  return {Kernel::kName, gemv_pack<Kernel>, gemv_multiply<Kernel>};
}

}  // namespace
}  // namespace tpk
