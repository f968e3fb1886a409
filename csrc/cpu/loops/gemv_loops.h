// The loop of a product of few rows, for one instruction set: included by the files that define a Kernel for theirs.
//
// Order   Sixteen partial sums, lane by lane in the order of k, then the lanes in halves: the same for every number of
//         rows of x, and of weights that are read at a time.
// Layout  packed[K / kStep][M][kStep]: one stream, too, and no two rows at one place of the cache. Zeros to the end.
// Reading Each group of rows of x requests its share of the weights of a tile to come, so that memory is never idle.
#pragma once

#include <cstring>

#include "gemv.h"
#include "lanes.h"

namespace tpk {
namespace {

constexpr size_t kCacheLine = 64;
constexpr size_t kGemvBlock = 16;       // rows of weights whose results are written together
constexpr size_t kGemvCached = 24576;   // bytes of x that stay in the first cache beside the weights
constexpr size_t kGemvStretch = 20480;  // bytes of x of a stretch, if there are more
constexpr size_t kGemvUnit = 64;        // values; a stretch is a multiple of it, so of every step
constexpr size_t kGemvAhead = 16384;    // bytes of weights that are requested before their turn, at least
constexpr int kSecondCache = 2;         // where to: in the first one they would take the place of x

template <class Kernel>
void gemv_pack(const Gemv& p, void* packed) {
  using Value = typename Kernel::Value;
  constexpr size_t kStep = Kernel::kStep;
  const auto* x = static_cast<const Value*>(p.x);
  auto* to = static_cast<typename Kernel::Packed*>(packed);
  for (size_t k = 0; k < p.K; k += kStep) {
    for (size_t m = 0; m < p.M; ++m, to += kStep) {
      if (k + kStep <= p.K) {
        Kernel::pack(x + m * p.K + k, to);
      } else {
        Value rest[kStep] = {};
        std::memcpy(rest, x + m * p.K + k, (p.K - k) * sizeof(Value));
        Kernel::pack(rest, to);
      }
    }
  }
}

// Rows of weights and all rows of x, in a stretch of k.
template <class Kernel>
struct Tile {
  const typename Kernel::Value* w;
  const typename Kernel::Packed* x;
  typename Kernel::Sums* sums;  // [M][kGemvBlock][kParts], from the tile's first row of weights on
  size_t count;                 // values of k
  bool first;                   // of the stretches
  const char* next;             // the weights to request, in rows as those of w
};

// A step of k for R rows of weights and G rows of x, one part of its lanes after the other, so that sums, weights and x
// fit into the registers.
template <class Kernel, int R, int G>
TPK_INLINE void gemv_step(typename Kernel::Sums (&sums)[Kernel::kParts][R * G], const typename Kernel::Value* w,
                          ptrdiff_t stride, const typename Kernel::Packed* x) {
#pragma GCC unroll 2
  for (int part = 0; part < Kernel::kParts; ++part) {
    typename Kernel::Weights weights[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) weights[r] = Kernel::load(w + r * stride, part);
#pragma GCC unroll 8
    for (int m = 0; m < G; ++m) {
      const auto inputs = Kernel::inputs(x + m * Kernel::kStep, part);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) Kernel::add(sums[part][m * R + r], weights[r], inputs);
    }
  }
}

// R rows of weights and G rows of x; `advance`: bytes that are requested of a row while a cache line of it is used.
template <class Kernel, int R, int G>
TPK_INLINE void gemv_group(const Gemv& p, const Tile<Kernel>& tile, size_t advance) {
  using Value = typename Kernel::Value;
  constexpr size_t kStep = Kernel::kStep, kUnroll = kCacheLine / (kStep * sizeof(Value));
  constexpr int kParts = Kernel::kParts;
  typename Kernel::Sums sums[kParts][R * G];
  const auto kept = [&](int part, int i) { return &tile.sums[(i / R * kGemvBlock + i % R) * kParts + part]; };
#pragma GCC unroll 2
  for (int part = 0; part < kParts; ++part) {
#pragma GCC unroll 16
    for (int i = 0; i < R * G; ++i) sums[part][i] = tile.first ? Kernel::zeros() : *kept(part, i);
  }
  const Value* w = tile.w;
  const typename Kernel::Packed* x = tile.x;
  const char* next = tile.next;
  const ptrdiff_t row_bytes = p.w_stride * static_cast<ptrdiff_t>(sizeof(Value));
  const size_t x_step = p.M * kStep;
  size_t left = tile.count;
  for (; left >= kUnroll * kStep; left -= kUnroll * kStep, next += advance) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) __builtin_prefetch(next + r * row_bytes, 0, kSecondCache);
#pragma GCC unroll 2
    for (size_t u = 0; u < kUnroll; ++u, w += kStep, x += x_step) gemv_step<Kernel, R, G>(sums, w, p.w_stride, x);
  }
  for (; left >= kStep; left -= kStep, w += kStep, x += x_step) gemv_step<Kernel, R, G>(sums, w, p.w_stride, x);
  if (left > 0) {
    Value rest[R][kStep] = {};
    for (int r = 0; r < R; ++r) std::memcpy(rest[r], w + r * p.w_stride, left * sizeof(Value));
    gemv_step<Kernel, R, G>(sums, rest[0], kStep, x);
  }
#pragma GCC unroll 2
  for (int part = 0; part < kParts; ++part) {
#pragma GCC unroll 16
    for (int i = 0; i < R * G; ++i) *kept(part, i) = sums[part][i];
  }
}

// The same for `count` rows of x, at most G.
template <class Kernel, int R, int G>
TPK_INLINE void gemv_group(const Gemv& p, const Tile<Kernel>& tile, size_t advance, size_t count) {
  if constexpr (G > 1) {
    if (count < G) return gemv_group<Kernel, R, G - 1>(p, tile, advance, count);
  }
  gemv_group<Kernel, R, G>(p, tile, advance);
}

// R rows of weights and all rows of x, in groups of nearly the same size.
template <class Kernel, int R>
TPK_INLINE void gemv_tile(const Gemv& p, Tile<Kernel> tile) {
  constexpr int kFit = Kernel::kMostSums / R, kAll = kMostGemvRows, kMostRows = kFit < kAll ? kFit : kAll;
  const size_t groups = (p.M + kMostRows - 1) / kMostRows;
  for (size_t i = 0, m = 0; i < groups; ++i) {
    const size_t count = p.M * (i + 1) / groups - m;
    gemv_group<Kernel, R, kMostRows>(p, tile, kCacheLine / groups, count);
    tile.next += tile.count * sizeof *tile.w / groups;
    tile.x += count * Kernel::kStep;
    tile.sums += count * kGemvBlock * Kernel::kParts;
    m += count;
  }
}

// The sums of `rows` rows of weights, at most kGemvBlock, one stretch of k after the other, R rows at a time.
template <class Kernel, int R>
void gemv_block(const Gemv& p, const typename Kernel::Value* w, const typename Kernel::Packed* x, ptrdiff_t rows,
                typename Kernel::Sums* sums) {
  const size_t most = kGemvStretch / (p.M * sizeof *x);
  const size_t stretches = p.M * p.K * sizeof *x <= kGemvCached ? 1 : (p.K + most - 1) / most;
  const size_t length = (p.K / stretches + kGemvUnit) / kGemvUnit * kGemvUnit;
  const size_t tile_bytes = R * (length < p.K ? length : p.K) * sizeof *w;
  const ptrdiff_t ahead = static_cast<ptrdiff_t>((kGemvAhead + tile_bytes - 1) / tile_bytes * R);
  const ptrdiff_t block = kGemvBlock;
  for (size_t k = 0; k < p.K; k += length) {
    const bool last = k + length >= p.K;
    const auto* const after = last ? w + block * p.w_stride : w + k + length;  // the first weights of the next stretch
    for (ptrdiff_t i = 0; i < rows;) {
      const ptrdiff_t j = i + ahead;
      const auto* const next = length < p.K && j >= block ? after + (j - block) * p.w_stride : w + k + j * p.w_stride;
      const Tile<Kernel> tile{w + k + i * p.w_stride,  x + k * p.M, sums + i * Kernel::kParts,
                              last ? p.K - k : length, k == 0,      reinterpret_cast<const char*>(next)};
      if (i + R <= rows) {
        gemv_tile<Kernel, R>(p, tile);
        i += R;
      } else {
        gemv_tile<Kernel, 1>(p, tile);
        ++i;
      }
    }
  }
}

// Calls the block for as many rows of weights at a time as fit beside M rows of x.
template <class Kernel, int R>
TPK_INLINE void gemv_block(const Gemv& p, size_t n, const typename Kernel::Packed* x, size_t rows,
                           typename Kernel::Sums* sums) {
  if constexpr (R > 1) {
    if (Kernel::rows_with(p.M) < R) return gemv_block<Kernel, R / 2>(p, n, x, rows, sums);
  }
  const auto* const w = static_cast<const typename Kernel::Value*>(p.w) + static_cast<ptrdiff_t>(n) * p.w_stride;
  gemv_block<Kernel, R>(p, w, x, static_cast<ptrdiff_t>(rows), sums);
}

template <class Kernel>
void gemv_multiply(const Gemv& p, const void* packed, size_t begin, size_t end) {
  using Value = typename Kernel::Value;
  const auto* x = static_cast<const typename Kernel::Packed*>(packed);
  const auto* bias = static_cast<const Value*>(p.bias);
  typename Kernel::Sums sums[kMostGemvRows * kGemvBlock * Kernel::kParts];
  for (size_t n = begin; n < end; n += kGemvBlock) {
    const size_t rows = end - n < kGemvBlock ? end - n : kGemvBlock;
    gemv_block<Kernel, Kernel::kMostWeights>(p, n, x, rows, sums);
    for (size_t m = 0; m < p.M; ++m) {
      Value* const y = static_cast<Value*>(p.y) + m * p.N + n;
      const typename Kernel::Sums* const from = sums + m * kGemvBlock * Kernel::kParts;
      for (size_t i = 0; i < rows; ++i) {
        const float total = Kernel::total(from + i * Kernel::kParts);
        store(bias == nullptr ? total : total + to_float(bias[n + i]), &y[i]);
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
