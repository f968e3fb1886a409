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
// Storing  a tile is rounded into boxes of 128 rows by 128 bytes in shared memory, which a thread of the first
// warpgroup
//          stores as tiles (TMA), in this device's memory or a peer's, while the product warps go on. A tile has two or
//          four boxes. Two have a place of their own, the others take the stage that was multiplied last, which is
//          given back when they have been read: the product warps wait for stores of the tile before alone.
// Left out clusters that load a tile of w once for two blocks, and two warpgroups that multiply in turn: both are
//          faster where published kernels have them, by 5 to 15 % of a large product, and neither can be judged without
//          a device.
#pragma once

#include <type_traits>

#include "fused_gemm.h"
#include "operand.cuh"

namespace tpk::cuda {

constexpr uint32_t kWarpgroup = 128;
constexpr uint32_t kProductThreads = 2 * kWarpgroup;
constexpr uint32_t kProductWarps = kProductThreads / 32;
constexpr uint32_t kBoxBytes = kTileRows * 128;  // of a tile that is stored
constexpr uint32_t kStagedBoxes = 2;             // that have a place beside the ring
constexpr uint32_t kMostStages = 6;
constexpr uint32_t kCopyStages = 6;  // of rows that are copied (bulk_rows.cuh)
// What a warpgroup needs: 24 .. 256 in steps of 8, together no more than 65536 / 128.
constexpr int kLoadRegisters = 56, kProductRegisters = 224;

// Transaction barriers of a block. announced: its signal warp has received all announcements. staged, stored: all
// product warps have staged a tile, and its store has read it. brought: rows that all product warps have asked for have
// arrived.
struct Barriers {
  uint64_t full[kMostStages], empty[kMostStages], announced, staged, stored, brought[kCopyStages];
};

// The dynamic shared memory of a block: the stages, then two boxes.
template <int N>
struct Ring {
  static constexpr uint32_t kSwizzle = 1024;  // the pattern of 128-byte swizzles repeats after so many bytes
  static constexpr uint32_t kXBytes = kTileRows * kTileDepth * 2, kWBytes = N * kTileDepth * 2;
  static constexpr uint32_t kStageBytes = kXBytes + kWBytes;
  static constexpr uint32_t kStages = N == 256 ? 4 : kMostStages;
  static constexpr uint32_t kBytes = kSwizzle + kStages * kStageBytes + kStagedBoxes * kBoxBytes;
  static_assert(kStageBytes % kSwizzle == 0 && kStagedBoxes * kBoxBytes <= kStageBytes, "a stage has two boxes");
  static_assert(kBytes + 1024 <= 227 * 1024, "with what is static, a block has 227 KiB");

  char* base;

  __device__ __forceinline__ explicit Ring(char* dynamic_shared)
      : base(dynamic_shared + (kSwizzle - reinterpret_cast<uintptr_t>(dynamic_shared) % kSwizzle) % kSwizzle) {}
  __device__ __forceinline__ char* x(uint32_t stage) const { return base + stage * kStageBytes; }
  __device__ __forceinline__ char* w(uint32_t stage) const { return x(stage) + kXBytes; }
  // Of a tile whose last products had that stage.
  __device__ __forceinline__ char* box(uint32_t number, uint32_t stage) const {
    return number < kStagedBoxes ? base + kStages * kStageBytes + number * kBoxBytes
                                 : x(stage) + (number - kStagedBoxes) * kBoxBytes;
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
  transaction_init(&barriers.stored, 1);
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
// during the wait for the stage of the next; the stage before is released. Returns the last one, which is not.
template <class T, int N, bool transposed>
__device__ __forceinline__ uint32_t multiply(float (&d)[N / 2], uint32_t steps, uint32_t half, const Ring<N>& ring,
                                             Barriers& barriers, Place<N>& place) {
  constexpr uint32_t kHalfBytes = Ring<N>::kXBytes / 2;
  const bool arrives = threadIdx.x % 32 == 0;
  uint32_t last = 0;
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
    if (step > 0 && arrives) transaction_arrive(&barriers.empty[last]);
    last = place.stage;
  }
  products_wait<0>();
  __syncwarp();
  return last;
}

// ---- storing --------------------------------------------------------------------------------------------------------

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

// A word of 16 bytes of a row of a box. Neither writes nor reads have bank conflicts.
__device__ __forceinline__ char* word_of_box(char* box, uint32_t row, uint32_t word) {
  return box + row * 128 + (word ^ (row % 8)) * 16;
}

// Boxes [first, end) of the 16 rows that a warp has of a tile of T, as W. columns: those inside y.
template <class W, class T, int N>
__device__ __forceinline__ void stage_boxes(const float (&d)[N / 2], uint32_t first, uint32_t end, uint32_t columns,
                                            const T* bias, uint32_t warp, const Ring<N>& ring, uint32_t stage) {
  static_assert(sizeof(W) == 2);
  const uint32_t lane = threadIdx.x % 32, row = 16 * warp + lane / 4;
#pragma unroll
  for (uint32_t b = first; b < end; ++b) {
    char* const box = ring.box(b, stage);
#pragma unroll
    for (uint32_t j = 0; j < 8; ++j) {
      const uint32_t upper = product_pair<T, N>(d, 8 * b + j, false, bias, columns);
      const uint32_t lower = product_pair<T, N>(d, 8 * b + j, true, bias, columns);
      reinterpret_cast<uint32_t*>(word_of_box(box, row, j))[lane % 4] = pair_as<W, T>(upper);
      reinterpret_cast<uint32_t*>(word_of_box(box, row + 8, j))[lane % 4] = pair_as<W, T>(lower);
    }
  }
}

}  // namespace tpk::cuda
