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

constexpr size_t kCacheLine = 64;
constexpr size_t kGemvBlock = 16;       // rows of weights whose results are written together
constexpr size_t kGemvStretch = 16384;  // bytes of x, of four rows or less twice, that are used while they are cached
constexpr size_t kGemvUnit = 64;        // values; a stretch is a multiple of it, so of every step
constexpr size_t kGemvAhead = 16384;    // bytes of weights that are requested before their turn, about

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

// The addresses of weights that are requested before their turn, in one stream: hardware follows that best.
struct Ahead {
  const char* at;
  const char* row_end;  // nullptr: rows follow each other without gaps
  ptrdiff_t to_next_row, stride;

  template <size_t kBytes>
  TPK_INLINE void request() {
#pragma GCC unroll 8
    for (size_t b = 0; b < kBytes; b += kCacheLine) {
      __builtin_prefetch(at);
      at += kBytes < kCacheLine ? kBytes : kCacheLine;
      if (at == row_end) {
        at += to_next_row;
        row_end += stride;
      }
    }
  }
};

// A stretch of k of a product: weights and x from its begin on.
template <class Kernel>
struct Stretch {
  const typename Kernel::Value* w;
  const typename Kernel::Packed* x;
  size_t count;  // values of k
  bool first, last;
};

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

// R rows of weights and G rows of x: sums go on from `carried`, and end there or in totals[m * kGemvBlock + r].
template <class Kernel, int R, int G>
TPK_INLINE void gemv_tile(const Gemv& p, const Stretch<Kernel>& part, Ahead& ahead, typename Kernel::Sums* carried,
                          float* totals) {
  using Value = typename Kernel::Value;
  constexpr size_t kStep = Kernel::kStep;
  typename Kernel::Sums sums[R * G];
  typename Kernel::Weights weights[R];
#pragma GCC unroll 16
  for (int i = 0; i < R * G; ++i) part.first ? Kernel::clear(sums[i]) : void(sums[i] = carried[i]);
  const typename Kernel::Packed* x = part.x;
  size_t k = 0;
  for (; k + kStep <= part.count; k += kStep, x += p.M * kStep) {
    ahead.request<R * kStep * sizeof(Value)>();
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) Kernel::load(part.w + r * p.w_stride + k, weights[r]);
    gemv_step<Kernel, R, G>(sums, weights, x);
  }
  if (!part.last) {
#pragma GCC unroll 16
    for (int i = 0; i < R * G; ++i) carried[i] = sums[i];
    return;
  }
  if (k < part.count) {
    for (int r = 0; r < R; ++r) {
      Value rest[kStep] = {};
      std::memcpy(rest, part.w + r * p.w_stride + k, (part.count - k) * sizeof(Value));
      Kernel::load(rest, weights[r]);
    }
    gemv_step<Kernel, R, G>(sums, weights, x);
  }
#pragma GCC unroll 8
  for (int m = 0; m < G; ++m) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) totals[m * kGemvBlock + r] = Kernel::total(sums[m * R + r]);
  }
}

// `rows` rows of weights, at most kGemvBlock, and G rows of x.
template <class Kernel, int G>
TPK_INLINE void gemv_rows(const Gemv& p, Stretch<Kernel> part, Ahead& ahead, size_t rows,
                          typename Kernel::Sums* carried, float* totals) {
  constexpr int R = Kernel::rows_with(G);
  size_t i = 0;
  for (; i + R <= rows; i += R, part.w += R * p.w_stride) {
    gemv_tile<Kernel, R, G>(p, part, ahead, carried + i * G, totals + i);
  }
  for (; i < rows; ++i, part.w += p.w_stride) gemv_tile<Kernel, 1, G>(p, part, ahead, carried + i * G, totals + i);
}

// The same for `count` rows of x, at most G.
template <class Kernel, int G>
TPK_INLINE void gemv_group(const Gemv& p, const Stretch<Kernel>& part, Ahead& ahead, size_t rows, size_t count,
                           typename Kernel::Sums* carried, float* totals) {
  if constexpr (G > 1) {
    if (count < G) return gemv_group<Kernel, G - 1>(p, part, ahead, rows, count, carried, totals);
  }
  gemv_rows<Kernel, G>(p, part, ahead, rows, carried, totals);
}

// The sums of `rows` rows of weights, at most kGemvBlock, one stretch of k after the other.
template <class Kernel>
TPK_INLINE void gemv_block(const Gemv& p, const typename Kernel::Value* w, const typename Kernel::Packed* x,
                           size_t rows, float* totals) {
  constexpr size_t kStep = Kernel::kStep;
  constexpr int kRows = Kernel::kMostRows;
  typename Kernel::Sums carried[kMostGemvRows * kGemvBlock];
  const size_t most = (p.M <= 4 ? 2 : 1) * kGemvStretch / (p.M * sizeof(typename Kernel::Packed));
  const size_t stretches = (p.K + most - 1) / most;
  const size_t length = (p.K / stretches + kGemvUnit) / kGemvUnit * kGemvUnit;
  const ptrdiff_t stride = p.w_stride * static_cast<ptrdiff_t>(sizeof *w);
  for (size_t k = 0; k < p.K; k += length) {
    const bool first = k == 0, last = k + length >= p.K;
    // The next stretch of these rows, or the first one of those behind them.
    Ahead ahead{reinterpret_cast<const char*>(last ? w + kGemvBlock * p.w_stride : w + k + length), nullptr,
                stride - static_cast<ptrdiff_t>(length * sizeof *w), stride};
    if (first && last) {
      // Past the rows that are read at a time, however long they are.
      const ptrdiff_t rows_at_a_time = Kernel::rows_with(p.M < kRows ? static_cast<int>(p.M) : kRows);
      const ptrdiff_t tile = rows_at_a_time * stride, least = kGemvAhead;
      ahead.at = reinterpret_cast<const char*>(w) + (tile > least ? tile : least);
    } else {
      ahead.row_end = ahead.at + length * sizeof *w;
    }
    for (size_t m = 0; m < p.M; m += kRows) {
      const Stretch<Kernel> part{w + k, x + k * p.M + m * kStep, last ? p.K - k : length, first, last};
      Ahead of_group = ahead;
      gemv_group<Kernel, kRows>(p, part, of_group, rows, p.M - m, carried + m * kGemvBlock, totals + m * kGemvBlock);
    }
  }
}

template <class Kernel>
void gemv_multiply(const Gemv& p, const void* packed, size_t begin, size_t end) {
  using Value = typename Kernel::Value;
  const auto* x = static_cast<const typename Kernel::Packed*>(packed);
  const auto* bias = static_cast<const Value*>(p.bias);
  float totals[kMostGemvRows * kGemvBlock];
  for (size_t n = begin; n < end; n += kGemvBlock) {
    const size_t rows = end - n < kGemvBlock ? end - n : kGemvBlock;
    gemv_block<Kernel>(p, static_cast<const Value*>(p.w) + static_cast<ptrdiff_t>(n) * p.w_stride, x, rows, totals);
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
