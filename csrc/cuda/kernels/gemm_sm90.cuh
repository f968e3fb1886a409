// The product of a tile on Hopper: y = x @ w.T in tiles of 128 rows by N columns, a multiprocessor after the other.
//
// A block has three warpgroups. A thread of the first loads stages, 64 values of K of the rows of x and of w that a
// tile needs, by TMA into a ring in shared memory; the other two multiply 64 rows each by wgmma, round, and store. The
// ring runs on from tile to tile: while a tile is stored, the first stages of the next are on their way.
//
// Bits     fp32 sums over K in the hardware's order, the bias added in fp32, rounded once to T.
// Ragged   values outside x or w are loaded as zeros and counted like the rest; rows and columns outside y are not
//          stored. N and K are multiples of 8, so 16 bytes are inside or outside as a whole.
// Ring     full[s]: the bytes of stage s have arrived. empty[s]: all product warps have read it; each warp arrives
//          after it has waited for its products, because a wait for products covers one warp alone.
// Storing  through shared memory, 128 columns at a time: by the product warps themselves, or, for peers, by warps of
// the
//          first warpgroup, while the product warps go on (reduce_block.cuh).
// Left out clusters that load a tile of w once for two blocks, and two warpgroups that multiply in turn: both are
// faster
//          where published kernels have them, by 5 to 15 % of a large product, and neither can be judged without a
//          device.
#pragma once

#include <type_traits>

#include "fused_gemm.h"
#include "operand.cuh"

namespace tpk::cuda {

constexpr uint32_t kWarpgroup = 128;
constexpr uint32_t kProductThreads = 2 * kWarpgroup;
constexpr uint32_t kProductWarps = kProductThreads / 32;
constexpr uint32_t kStoringWarps = 2;     // of the first warpgroup, that store what is staged
constexpr uint32_t kStagedColumns = 128;  // of a tile, that product warps stage at a time
constexpr uint32_t kMostStages = 6;
constexpr uint32_t kCopyStages = 6;  // of rows that are copied (bulk_rows.cuh)
// What a warpgroup needs: 24 .. 256 in steps of 8, together no more than 65536 / 128.
constexpr int kLoadRegisters = 56, kProductRegisters = 224;

// Transaction barriers of a block. announced: its signal warp has received all announcements. staged, stored: all
// product warps have staged columns of a tile, and all storing warps have read them. brought: rows that all product
// warps have asked for have arrived.
struct Barriers {
  uint64_t full[kMostStages], empty[kMostStages], announced, staged, stored, brought[kCopyStages];
};

// The dynamic shared memory of a block: the stages, then 16 rows of 128 values for each product warp.
template <int N>
struct Ring {
  static constexpr uint32_t kSwizzle = 1024;  // the pattern of 128-byte swizzles repeats after so many bytes
  static constexpr uint32_t kXBytes = kTileRows * kTileDepth * 2, kWBytes = N * kTileDepth * 2;
  static constexpr uint32_t kStageBytes = kXBytes + kWBytes;
  static constexpr uint32_t kStages = N == 256 ? 4 : kMostStages;
  static constexpr uint32_t kStagingBytes = 16 * 128 * 2;
  static constexpr uint32_t kBytes = kSwizzle + kStages * kStageBytes + kProductWarps * kStagingBytes;
  static_assert(kBytes + 1024 <= 227 * 1024, "with what is static, a block has 227 KiB");

  char* base;

  __device__ __forceinline__ explicit Ring(char* dynamic_shared)
      : base(dynamic_shared + (kSwizzle - reinterpret_cast<uintptr_t>(dynamic_shared) % kSwizzle) % kSwizzle) {}
  __device__ __forceinline__ char* x(uint32_t stage) const { return base + stage * kStageBytes; }
  __device__ __forceinline__ char* w(uint32_t stage) const { return x(stage) + kXBytes; }
  __device__ __forceinline__ char* staging(uint32_t warp) const {
    return base + kStages * kStageBytes + warp * kStagingBytes;
  }
};

// The place of a thread in the ring.
template <int N>
struct Place {
  uint32_t stage = 0, parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == Ring<N>::kStages) stage = 0, parity ^= 1;
  }
};

__device__ __forceinline__ void await(const uint64_t* barrier, uint32_t parity) {
  while (!transaction_done(barrier, parity)) {
  }
}

// One thread, before a barrier of the block.
template <int N>
__device__ __forceinline__ void init_barriers(Barriers& barriers) {
  for (uint32_t s = 0; s < Ring<N>::kStages; ++s) {
    transaction_init(&barriers.full[s], 1);
    transaction_init(&barriers.empty[s], kProductWarps);
  }
  for (uint64_t& brought : barriers.brought) transaction_init(&brought, kProductWarps);
  transaction_init(&barriers.announced, 1);
  transaction_init(&barriers.staged, kProductWarps);
  transaction_init(&barriers.stored, kStoringWarps);
  transaction_init_done();
}

// ---- loading --------------------------------------------------------------------------------------------------------

// One thread loads the stages of a tile. await_x(step): waits for the rows of x at that step; false to stop.
template <int N, class AwaitX>
__device__ __forceinline__ bool load_stages(const GemmOperands& gemm, const Tile& tile, const Ring<N>& ring,
                                            Barriers& barriers, Place<N>& place, AwaitX await_x) {
  const uint32_t steps = divided_up(gemm.K, kTileDepth);
  for (uint32_t step = 0; step < steps; ++step, place.advance()) {
    if (!await_x(step)) return false;
    uint64_t* const full = &barriers.full[place.stage];
    await(&barriers.empty[place.stage], place.parity ^ 1);
    transaction_expect(full, Ring<N>::kStageBytes);
    const auto column = static_cast<int32_t>(step * kTileDepth);
    load_tile(ring.x(place.stage), &gemm.x[tile.owner], full, column, static_cast<int32_t>(tile.row_block * kTileRows));
    const auto row = static_cast<int32_t>(tile.column_block * N);
    if (!gemm.w_transposed) {
      load_tile(ring.w(place.stage), &gemm.w, full, column, row);
      continue;
    }
#pragma unroll
    for (int32_t n = 0; n < N; n += 64) load_tile(ring.w(place.stage) + n * 128, &gemm.w, full, row + n, column);
  }
  return true;
}

// ---- multiplying ----------------------------------------------------------------------------------------------------

// d = rows [64 half, 64 half + 64) of the tile; transposed: w. All threads of a warpgroup. One group of products runs
// during the wait for the stage of the next; the stage before is released.
template <class T, int N, bool transposed>
__device__ __forceinline__ void multiply(float (&d)[N / 2], uint32_t steps, uint32_t half, const Ring<N>& ring,
                                         Barriers& barriers, Place<N>& place) {
  constexpr uint32_t kHalfBytes = Ring<N>::kXBytes / 2;
  const bool arrives = threadIdx.x % 32 == 0;
  uint32_t before = 0;
  for (uint32_t step = 0; step < steps; ++step, place.advance()) {
    await(&barriers.full[place.stage], place.parity);
    const uint64_t x = operand(ring.x(place.stage) + half * kHalfBytes);
    const uint64_t w = transposed ? transposed_operand(ring.w(place.stage)) : operand(ring.w(place.stage));
    products_begin();
#pragma unroll
    for (uint32_t j = 0; j < kTileDepth / 16; ++j) {
      product<T, N, transposed>(d, x + 2 * j, w + (transposed ? 128 : 2) * j, step > 0 || j > 0);
    }
    products_commit();
    products_wait<1>();
    __syncwarp();
    if (step > 0 && arrives) transaction_arrive(&barriers.empty[before]);
    before = place.stage;
  }
  products_wait<0>();
  __syncwarp();
  if (arrives) transaction_arrive(&barriers.empty[before]);
}

// ---- storing --------------------------------------------------------------------------------------------------------

// The output of a tile: its first value, values from row to row, rows and columns that lie inside y.
template <class T>
struct TileOutput {
  T* first;
  size_t stride;
  uint32_t rows, columns;
};

// d[4 j], d[4 j + 1] or, as `lower` of two rows, d[4 j + 2], d[4 j + 3]: with the bias, rounded to T.
template <class T, int N>
__device__ __forceinline__ uint32_t product_pair(const float (&d)[N / 2], uint32_t j, bool lower, const T* bias,
                                                 uint32_t columns) {
  const float* const values = d + 4 * j + (lower ? 2 : 0);
  if (bias == nullptr) return rounded_pair<T>(values[0], values[1]);  // a sum with zero would lose the sign of a zero
  const uint32_t column = 8 * j + 2 * (threadIdx.x % 4);
  const bool inside = column < columns;
  return rounded_pair<T>(values[0] + (inside ? to_float(bias[column]) : 0),
                         values[1] + (inside ? to_float(bias[column + 1]) : 0));
}

template <class T>
__device__ __forceinline__ float first_of(uint32_t pair) {
  return to_float(static_cast<T>(pair & 0xffffu));
}
template <class T>
__device__ __forceinline__ float second_of(uint32_t pair) {
  return to_float(static_cast<T>(pair >> 16));
}
// A pair of T as one of W.
template <class W, class T>
__device__ __forceinline__ uint32_t pair_as(uint32_t pair) {
  if constexpr (std::is_same_v<W, T>) return pair;
  return rounded_pair<W>(first_of<T>(pair), second_of<T>(pair));
}

// A word of 16 bytes in the staging of a warp: 16 rows of 128 values of 2 bytes. A row's words are permuted by its
// number: neither writes nor reads have bank conflicts.
__device__ __forceinline__ char* staged_word(char* staging, uint32_t row, uint32_t word) {
  return staging + row * 2 * kStagedColumns + (word ^ (row % 8)) * 16;
}

// Columns [start, start + 128) of the 16 rows that a warp has of a tile of T, as W, into its staging.
template <class T, int N, class W>
__device__ __forceinline__ void stage_columns(const float (&d)[N / 2], uint32_t start, uint32_t columns, const T* bias,
                                              char* staging) {
  const uint32_t lane = threadIdx.x % 32, row = lane / 4;
#pragma unroll
  for (uint32_t j = 0; j < kStagedColumns / 8; ++j) {
    const uint32_t upper = product_pair<T, N>(d, start / 8 + j, false, bias, columns);
    const uint32_t lower = product_pair<T, N>(d, start / 8 + j, true, bias, columns);
    reinterpret_cast<uint32_t*>(staged_word(staging, row, j))[lane % 4] = pair_as<W, T>(upper);
    reinterpret_cast<uint32_t*>(staged_word(staging, row + 8, j))[lane % 4] = pair_as<W, T>(lower);
  }
}

// A warp stores such a staging; half of it a row in one piece. kUnroll: words of a thread on their way.
template <int kUnroll, class W>
__device__ __forceinline__ void store_staged(const TileOutput<W>& to, uint32_t first_row, uint32_t start,
                                             char* staging) {
  const uint32_t lane = threadIdx.x % 32, word = lane % 16, column = start + word * 8;
#pragma unroll kUnroll
  for (uint32_t i = 0; i < 8; ++i) {
    const uint32_t r = 2 * i + lane / 16;
    if (first_row + r >= to.rows || column >= to.columns) continue;
    store16(to.first + (first_row + r) * to.stride + column, load16(staged_word(staging, r, word)));
  }
}

// The 16 rows that a warp has, staged and stored by itself.
template <class T, int N, class W>
__device__ __forceinline__ void store_rows(const float (&d)[N / 2], const TileOutput<W>& to, const T* bias,
                                           uint32_t first_row, char* staging) {
#pragma unroll
  for (uint32_t start = 0; start < N; start += kStagedColumns) {
    __syncwarp();  // the staging has been read
    stage_columns<T, N, W>(d, start, to.columns, bias, staging);
    __syncwarp();
    store_staged<8>(to, first_row, start, staging);
  }
}

// All product threads: `thread` counts them.
template <class T, int N, class W>
__device__ __forceinline__ void store_tile(const float (&d)[N / 2], const TileOutput<W>& to, const T* bias,
                                           uint32_t thread, const Ring<N>& ring) {
  const uint32_t warp = thread / 32;  // rows 16 warp .. 16 warp + 15: four warps to a warpgroup, 64 rows to each
  store_rows<T, N>(d, to, bias, 16 * warp, ring.staging(warp));
}

}  // namespace tpk::cuda
