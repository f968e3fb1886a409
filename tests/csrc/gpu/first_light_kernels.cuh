// One kernel for each primitive of device.cuh and hopper.cuh, with nothing of the library's kernels around it.
//
// Waits    end after kPatienceNs; then the kernel writes which one was in vain and ends. No kernel traps or hangs by
//          itself, so that a check leaves the device as it was.
#pragma once

#include "cuda/kernels/operand.cuh"
#include "first_light_compare.h"

namespace tpk::first_light {

using namespace tpk::cuda;

constexpr uint64_t kPatienceNs = 2'000'000'000;

template <class Done>
__device__ __forceinline__ bool comes(Done done) {
  const uint64_t start = global_time_ns();
  do {
    for (int i = 0; i < 64; ++i) {
      if (done()) return true;
    }
  } while (global_time_ns() - start < kPatienceNs);
  return false;
}

__device__ __forceinline__ char* pattern_start(char* dynamic) {
  return dynamic + (1024 - reinterpret_cast<uintptr_t>(dynamic) % 1024) % 1024;
}

// ---- launches, time, words ------------------------------------------------------------------------------------------

TPK_KERNEL void number_threads(uint32_t* out) {
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = 3 * i + 1;
}

TPK_KERNEL void read_clock(uint64_t* passed) {
  const uint64_t start = global_time_ns();
  for (uint32_t i = 0; i < 1u << 24 && *passed < 100'000; ++i) *passed = global_time_ns() - start;
}

// Every thread moves 16 bytes twice, and counts itself.
TPK_KERNEL void move_words(const Word16* from, Word16* by_cache, Word16* by_link, uint32_t* count) {
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  store16(by_cache + i, load16(from + i));
  store16_relaxed_sys(by_link + i, load16_peer(from + i));
  add_acq_rel_gpu(count, 1);
}

// All halves to float and back, and floats to pairs of halves.
TPK_KERNEL void convert(float* floats, uint16_t* back, const float* values, uint32_t* halves, uint32_t* bfloats) {
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  floats[i] = to_float(static_cast<Half>(i));
  back[i] = static_cast<uint16_t>(from_float<Half>(values[i]));
  halves[i] = rounded_pair<Half>(values[i], values[i ^ 1]);
  bfloats[i] = rounded_pair<Bfloat16>(values[i], values[i ^ 1]);
}

// ---- flags between ranks --------------------------------------------------------------------------------------------

struct RankArgs {
  uint32_t *mine, *next;             // 64 values of a rank and of the rank behind it
  uint32_t *came, *next_came;        // raised by the rank before, at the rank behind
  uint32_t *taken, *previous_taken;  // raised by the rank behind, at the rank before
  uint32_t rank, ranks, rounds;
  uint32_t* wrong;  // for every thread: 1 + the round, expected, got; round ~0: nobody came
};

__device__ __forceinline__ uint32_t message(uint32_t round, uint32_t rank, uint32_t thread) {
  return round * 65536 + rank * 256 + thread;
}

// Every rank writes to the next one, raises its flag, waits for its own and looks at what came.
TPK_KERNEL void pass_round(RankArgs args) {
  __shared__ uint32_t late;
  const uint32_t t = threadIdx.x, before = (args.rank + args.ranks - 1) % args.ranks;
  uint32_t* const wrong = args.wrong + 3 * t;
  if (t == 0) late = 0;
  for (uint32_t round = 1; round <= args.rounds; ++round) {
    __syncthreads();
    if (late != 0) break;
    args.next[t] = message(round, args.rank, t);
    __syncthreads();
    if (t == 0) {
      store_release_sys(args.next_came, round);
      if (!comes([&] { return load_acquire_sys(args.came) == round; })) late = 1;
    }
    __syncthreads();
    const uint32_t got = args.mine[t], expected = message(round, before, t);
    if (late == 0 && got != expected && wrong[0] == 0) wrong[0] = round + 1, wrong[1] = expected, wrong[2] = got;
    __syncthreads();
    if (t == 0) {
      store_release_sys(args.previous_taken, round);
      if (!comes([&] { return load_acquire_sys(args.taken) == round; })) late = 1;
    }
  }
  __syncthreads();
  if (late != 0) wrong[0] = ~0u;
}

// ---- threads of a block that meet -----------------------------------------------------------------------------------

// Four warps arrive at a barrier of transactions, round after round, and read what the others wrote.
TPK_KERNEL void meet_by_transactions(uint32_t* sums, uint32_t rounds) {
  __shared__ uint64_t bar;
  __shared__ uint32_t values[4];
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) transaction_init(&bar, 4), transaction_init_done();
  __syncthreads();
  uint32_t sum = 0;
  for (uint32_t round = 0; round < rounds; ++round) {
    if (lane == 0) values[warp] = round * 10 + warp, transaction_arrive(&bar);
    if (!comes([&] { return transaction_done(&bar, round & 1); })) {
      sum = ~0u;
      break;
    }
    sum += values[(warp + 1) % 4];
    __syncthreads();
  }
  sums[threadIdx.x] = sum;
}

// Three warpgroups: the first gives registers away, the others take them; half of the others' warps meet by a named
// barrier. out: for each thread whether elect chose it, and what the other warp of its pair had written.
TPK_KERNEL void __launch_bounds__(384, 1) meet_by_name(uint32_t* chosen, uint32_t* heard, uint32_t* largest) {
  __shared__ uint32_t said[384];
  const uint32_t t = threadIdx.x;
  if (t < 128) {
    registers_lower<40>();
  } else {
    registers_raise<232>();
  }
  chosen[t] = one_of_warp() ? 1 : 0;
  largest[t] = warp_max(t * 7 % 61);
  said[t] = t + 1000;
  const uint32_t pair = t / 64;
  sync_named(static_cast<int>(1 + pair), 64);
  heard[t] = said[t ^ 32];
}

// ---- tiles and products ---------------------------------------------------------------------------------------------

struct TileArgs {
  TensorMap map;
  uint16_t* tile;  // 128 rows of 64 values as they lie in shared memory
  uint32_t* late;
  int32_t column, row;
};

TPK_KERNEL void dump_tile(const __grid_constant__ TileArgs args) {
  TPK_DYNAMIC_SHARED(char, dynamic);
  __shared__ uint64_t full;
  char* const tile = pattern_start(dynamic);
  if (threadIdx.x == 0) {
    transaction_init(&full, 1), transaction_init_done();
    prefetch(&args.map);
    transaction_expect(&full, 128 * 128);
    load_tile(tile, &args.map, &full, args.column, args.row);
  }
  __syncthreads();
  if (!comes([&] { return transaction_done(&full, 0); })) {
    *args.late = 1;
    return;
  }
  for (uint32_t i = threadIdx.x; i < 128 * 64; i += blockDim.x) memcpy(args.tile + i, tile + 2 * i, 2);
}

constexpr uint32_t kStages = 2;

struct ProductArgs {
  TensorMap x, w;  // w as [N, K], box of N rows, or transposed as [K, N], box of kDepth rows
  float* y;        // [kRows, N]
  uint32_t* late;
  uint32_t K;
};

// y = x[kRows, K] @ w[N, K].T by one warpgroup; thread 128 loads into a ring of two stages.
template <class T, int N, bool transposed>
TPK_KERNEL void __launch_bounds__(160, 1) multiply_tile(const __grid_constant__ ProductArgs args) {
  constexpr uint32_t kXBytes = kRows * kDepth * 2, kBytes = kXBytes + N * kDepth * 2;
  TPK_DYNAMIC_SHARED(char, dynamic);
  __shared__ uint64_t full[kStages], empty[kStages];
  char* const ring = pattern_start(dynamic);
  if (threadIdx.x == 0) {
    for (uint32_t s = 0; s < kStages; ++s) transaction_init(&full[s], 1), transaction_init(&empty[s], 4);
    transaction_init_done();
  }
  __syncthreads();
  const uint32_t steps = (args.K + kDepth - 1) / kDepth;
  if (threadIdx.x == 128) {
    for (uint32_t step = 0; step < steps; ++step) {
      const uint32_t s = step % kStages, parity = step / kStages & 1;
      if (!comes([&] { return transaction_done(&empty[s], parity ^ 1); })) {
        *args.late = 1;
        break;
      }
      transaction_expect(&full[s], kBytes);
      load_tile(ring + s * kBytes, &args.x, &full[s], static_cast<int32_t>(step * kDepth), 0);
      char* const to = ring + s * kBytes + kXBytes;
      const auto k = static_cast<int32_t>(step * kDepth);
      if (!transposed) load_tile(to, &args.w, &full[s], k, 0);
      for (int32_t n = 0; transposed && n < N; n += 64) load_tile(to + n * 128, &args.w, &full[s], n, k);
    }
  }
  if (threadIdx.x >= 128) return;
  float d[N / 2] = {};
  for (uint32_t step = 0; step < steps; ++step) {
    const uint32_t s = step % kStages;
    if (!comes([&] { return transaction_done(&full[s], step / kStages & 1); })) *args.late = 2;
    const char* const of_w = ring + s * kBytes + kXBytes;
    const uint64_t x = operand(ring + s * kBytes), w = transposed ? transposed_operand(of_w) : operand(of_w);
    products_begin();
#pragma unroll
    for (uint32_t j = 0; j < kDepth / 16; ++j)
      product<T, N, transposed>(d, x + 2 * j, w + (transposed ? 128 : 2) * j, step > 0 || j > 0);
    products_commit();
    products_wait<0>();
    if (threadIdx.x % 32 == 0) transaction_arrive(&empty[s]);
  }
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (uint32_t i = 0; i < N / 2; ++i) {
    const uint32_t row = 16 * warp + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + 2 * (lane % 4) + i % 2;
    args.y[row * N + column] = d[i];
  }
}

struct GatherArgs {
  TensorMap map;
  uint16_t* x;                 // 8 rows of 64 values
  uint32_t *written, *loaded;  // the last round of each block
  uint32_t* wrong;             // for every thread: 1 + the round, expected, got; round ~0: nobody came
  uint32_t rounds;
};

// Block 0 writes rows by ordinary stores and raises a flag; block 1 sees the flag and loads the rows as a tile.
TPK_KERNEL void write_and_load(const __grid_constant__ GatherArgs args) {
  TPK_DYNAMIC_SHARED(char, dynamic);
  __shared__ uint64_t full;
  __shared__ uint32_t late;
  char* const tile = pattern_start(dynamic);
  const uint32_t t = threadIdx.x;
  uint32_t* const wrong = args.wrong + 3 * t;
  if (t == 0) transaction_init(&full, 1), transaction_init_done(), late = 0;
  __syncthreads();
  for (uint32_t round = 1; round <= args.rounds && late == 0; ++round) {
    if (blockIdx.x == 0) {
      for (uint32_t i = t; i < 8 * 64; i += blockDim.x) args.x[i] = static_cast<uint16_t>(round * 512 + i);
      fence_async();
      __syncthreads();
      if (t == 0) {
        store_release_gpu(args.written, round);
        if (!comes([&] { return load_acquire_sys(args.loaded) == round; })) late = 1;
      }
      __syncthreads();
      continue;
    }
    if (t == 0) {
      if (comes([&] { return load_acquire_sys(args.written) == round; })) {
        fence_async();
        transaction_expect(&full, 8 * 128);
        load_tile(tile, &args.map, &full, 0, 0);
      } else {
        late = 1;
      }
    }
    __syncthreads();
    if (late != 0) break;
    if (!comes([&] { return transaction_done(&full, (round - 1) & 1); })) late = 1;
    uint16_t got = 0;
    memcpy(&got, tile + 2 * t, 2);  // row 0 lies as it is
    const auto expected = static_cast<uint16_t>(round * 512 + t);
    if (got != expected && wrong[0] == 0) wrong[0] = round + 1, wrong[1] = expected, wrong[2] = got;
    __syncthreads();
    if (t == 0) store_release_gpu(args.loaded, round);
  }
  __syncthreads();
  if (late != 0) wrong[0] = ~0u;
}

// ---- bulk copies ----------------------------------------------------------------------------------------------------

constexpr uint32_t kPieces = 4, kPieceWords = 256;

struct BulkArgs {
  uint32_t *from, *first, *second;  // kPieces * kPieceWords words
  uint32_t *written, *copied;       // the last round of each block
  uint32_t* wrong;                  // for every thread: 1 + the round, expected, got; round ~0: nobody came
  uint32_t rounds;
};

// A thread copies all pieces to two places through two stages. Whether all came.
__device__ __forceinline__ bool copy_pieces(const BulkArgs& args, char* ring, uint64_t* came, uint32_t round) {
  for (uint32_t piece = 0; piece < kPieces; ++piece) {
    const uint32_t number = (round - 1) * kPieces + piece;
    char* const stage = ring + number % 2 * kPieceWords * 4;
    stores_wait_read<1>();
    transaction_expect(&came[number % 2], kPieceWords * 4);
    load_bytes(stage, args.from + piece * kPieceWords, kPieceWords * 4, &came[number % 2]);
    if (!comes([&] { return transaction_done(&came[number % 2], number / 2 & 1); })) return false;
    store_bytes(args.first + piece * kPieceWords, stage, kPieceWords * 4);
    store_bytes(args.second + piece * kPieceWords, stage, kPieceWords * 4);
    stores_commit();
  }
  stores_wait<0>();
  return true;
}

// Block 0 writes words by ordinary stores and raises a flag; block 1 sees the flag, copies them in bulk and raises
// another; block 0 reads the copies by ordinary loads.
TPK_KERNEL void write_and_copy(BulkArgs args) {
  TPK_DYNAMIC_SHARED(char, dynamic);
  __shared__ uint64_t came[2];
  __shared__ uint32_t late;
  const uint32_t t = threadIdx.x;
  uint32_t* const wrong = args.wrong + 3 * t;
  if (t == 0) transaction_init(&came[0], 1), transaction_init(&came[1], 1), transaction_init_done(), late = 0;
  __syncthreads();
  for (uint32_t round = 1; round <= args.rounds && late == 0; ++round) {
    if (blockIdx.x == 1) {
      if (t == 0) {
        const bool written = comes([&] { return load_acquire_sys(args.written) == round; });
        fence_async();
        if (!written || !copy_pieces(args, pattern_start(dynamic), came, round)) late = 1;
        store_release_gpu(args.copied, round);
      }
      __syncthreads();
      continue;
    }
    for (uint32_t i = t; i < kPieces * kPieceWords; i += blockDim.x) args.from[i] = round * 4096 + i;
    __syncthreads();
    if (t == 0) {
      store_release_gpu(args.written, round);
      if (!comes([&] { return load_acquire_sys(args.copied) == round; })) late = 1;
    }
    __syncthreads();
    for (uint32_t i = t; i < 2 * kPieces * kPieceWords; i += blockDim.x) {
      const uint32_t at = i / 2, got = i % 2 == 0 ? args.first[at] : args.second[at], expected = round * 4096 + at;
      if (late == 0 && got != expected && wrong[0] == 0) wrong[0] = round + 1, wrong[1] = expected, wrong[2] = got;
    }
    __syncthreads();
  }
  __syncthreads();
  if (late != 0) wrong[0] = ~0u;
}

// ---- tiles that are stored ------------------------------------------------------------------------------------------

struct StoreArgs {
  TensorMap map;
  const uint16_t* image;   // 128 rows of 128 bytes as they are to lie in shared memory
  const uint32_t* places;  // of each value of it in the matrix of the map, or ~0
  const uint16_t* matrix;
  uint32_t *stored, *seen;  // the last round of each block
  uint32_t* wrong;          // for every thread: 1 + the round, expected, got; round ~0: nobody came
  uint32_t rounds;
  int32_t column, row;
};

// Block 0 writes a tile to shared memory, stores it and raises a flag; block 1 reads the matrix by ordinary loads.
TPK_KERNEL void store_and_read(const __grid_constant__ StoreArgs args) {
  TPK_DYNAMIC_SHARED(char, dynamic);
  __shared__ uint32_t late;
  uint16_t* const tile = reinterpret_cast<uint16_t*>(pattern_start(dynamic));
  const uint32_t t = threadIdx.x;
  uint32_t* const wrong = args.wrong + 3 * t;
  if (t == 0) late = 0;
  __syncthreads();
  for (uint32_t round = 1; round <= args.rounds && late == 0; ++round) {
    const uint32_t added = round % 8 * 8192;
    if (blockIdx.x == 0) {
      for (uint32_t i = t; i < 128 * 64; i += blockDim.x) tile[i] = static_cast<uint16_t>(args.image[i] + added);
      fence_async_shared();
      __syncthreads();
      if (t == 0) {
        store_tile(&args.map, tile, args.column, args.row);
        stores_commit(), stores_wait<0>();
        store_release_gpu(args.stored, round);
        if (!comes([&] { return load_acquire_sys(args.seen) == round; })) late = 1;
      }
      __syncthreads();
      continue;
    }
    if (t == 0 && !comes([&] { return load_acquire_sys(args.stored) == round; })) late = 1;
    __syncthreads();
    for (uint32_t i = t; i < 128 * 64 && late == 0; i += blockDim.x) {
      if (args.places[i] == ~0u) continue;
      const uint32_t got = args.matrix[args.places[i]], expected = (args.image[i] + added) & 0xffff;
      if (got != expected && wrong[0] == 0) wrong[0] = round + 1, wrong[1] = expected, wrong[2] = got;
    }
    __syncthreads();
    if (t == 0) store_release_gpu(args.seen, round);
  }
  __syncthreads();
  if (late != 0) wrong[0] = ~0u;
}

}  // namespace tpk::first_light
