// The work of the product threads of a block beside products: sums of the same tile of all ranks, copies of rows from a
// peer.
//
// Each thread has loads of several units (16 bytes) in flight before it uses the first: that hides the latency of peer
// memory, which is microseconds.
#pragma once

#include <cstring>

#include "core/codec/sum.h"
#include "gemm_sm90.cuh"

namespace tpk::cuda {

constexpr int kProductBarrier = 1;  // named, of the product threads; 0 is that of __syncthreads

__device__ __forceinline__ uint32_t product_thread() { return threadIdx.x - kWarpgroup; }
__device__ __forceinline__ void sync_product_threads() { sync_named(kProductBarrier, kProductThreads); }

// The next number of a counter that the blocks of a rank share. All product threads call; all get the same number.
__device__ __forceinline__ uint32_t take_next(uint32_t* taken) {
  __shared__ uint32_t next;
  sync_product_threads();  // the last one has been read
  if (product_thread() == 0) next = add_acq_rel_gpu(taken, 1);
  sync_product_threads();
  return next;
}

// Rows of 16-byte units, `stride` bytes from one to the next.
struct Rows {
  char* first;
  size_t stride;

  __device__ __forceinline__ char* at(uint32_t row, uint32_t unit) const {
    return first + row * stride + size_t{unit} * 16;
  }
};

// The inside of rows x kColumns values of 2 bytes, dealt to the product threads.
template <uint32_t kColumns>
struct Dealt {
  static constexpr uint32_t kUnits = kColumns / 8;  // of a row
  uint32_t rows, units;

  __device__ __forceinline__ uint32_t end() const { return rows * kUnits; }
  __device__ __forceinline__ bool has(uint32_t i) const { return i < end() && i % kUnits < units; }
  __device__ __forceinline__ static uint32_t row(uint32_t i) { return i / kUnits; }
  __device__ __forceinline__ static uint32_t unit(uint32_t i) { return i % kUnits; }
};

struct Unchanged {
  __device__ __forceinline__ Word16 operator()(Word16 word) const { return word; }
};

// to (and, where `second` is given, second) = change(from).
template <uint32_t kColumns, class Change = Unchanged>
__device__ __forceinline__ void copy_rows(const Dealt<kColumns>& dealt, const Rows& from, const Rows& to,
                                          const Rows& second = {nullptr, 0}, Change change = {}) {
  // All that a thread has of a tile, half of what it has of an item: 16 blocks then have 1 MB on the way, what a link
  // of 450 GB/s takes in 2.3 us. (A model, not measured.) More would not fit into registers.
  constexpr uint32_t kUnitsOfThread = kTileRows * Dealt<kColumns>::kUnits / kProductThreads;
  constexpr uint32_t kInFlight = kUnitsOfThread < 16 ? kUnitsOfThread : 16;
  for (uint32_t start = product_thread(); start < dealt.end(); start += kInFlight * kProductThreads) {
    Word16 words[kInFlight];
#pragma unroll
    for (uint32_t k = 0; k < kInFlight; ++k) {
      const uint32_t i = start + k * kProductThreads;
      if (dealt.has(i)) words[k] = load16_peer(from.at(dealt.row(i), dealt.unit(i)));
    }
#pragma unroll
    for (uint32_t k = 0; k < kInFlight; ++k) {
      const uint32_t i = start + k * kProductThreads;
      if (!dealt.has(i)) continue;
      const Word16 word = change(words[k]);
      store16(to.at(dealt.row(i), dealt.unit(i)), word);
      if (second.first != nullptr) store16(second.at(dealt.row(i), dealt.unit(i)), word);
    }
  }
}

// The sum of a unit of W of every rank, in rank order, as T: the bits of Plain<T>::sum (vector.cuh), in fp32 and
// rounded once; of a sum that is sent again, rounded to W first.
template <class T, class W>
__device__ __forceinline__ Word16 sum_of(const Word16 (&words)[kMaxPeers], int ranks, bool is_sent) {
  float sums[8] = {};
#pragma unroll
  for (int r = 0; r < kMaxPeers; ++r) {
    if (r >= ranks) continue;
    W values[8];
    memcpy(values, &words[r], sizeof values);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float value = Sum<W>::in(values[i]);
      sums[i] = r == 0 ? value : combine<W>(ReduceOp::Sum, sums[i], value);
    }
  }
  T rounded[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (!std::is_same_v<T, W> && is_sent) sums[i] = Sum<W>::in(Sum<W>::out(sums[i]));
    rounded[i] = Sum<T>::out(sums[i]);
  }
  Word16 word;
  memcpy(&word, rounded, sizeof word);
  return word;
}

// to (and second) = the sum over the ranks of parts + r * part_bytes, of values of W. `second` may be one of the parts:
// a thread writes what it alone has read. Where it is given, sums are sent.
template <class T, class W, uint32_t kColumns>
__device__ __forceinline__ void sum_rows(const Dealt<kColumns>& dealt, const Rows& parts, size_t part_bytes, int ranks,
                                         const Rows& to, const Rows& second) {
  constexpr uint32_t kInFlight = 2;  // times the ranks
#pragma unroll 1
  for (uint32_t start = product_thread(); start < dealt.end(); start += kInFlight * kProductThreads) {
    Word16 words[kInFlight][kMaxPeers];
#pragma unroll
    for (uint32_t k = 0; k < kInFlight; ++k) {
      const uint32_t i = start + k * kProductThreads;
      if (!dealt.has(i)) continue;
      const char* const from = parts.at(dealt.row(i), dealt.unit(i));
#pragma unroll
      for (int r = 0; r < kMaxPeers; ++r) {
        if (r < ranks) words[k][r] = load16_peer(from + static_cast<size_t>(r) * part_bytes);
      }
    }
#pragma unroll
    for (uint32_t k = 0; k < kInFlight; ++k) {
      const uint32_t i = start + k * kProductThreads;
      if (!dealt.has(i)) continue;
      const Word16 sum = sum_of<T, W>(words[k], ranks, second.first != nullptr);
      store16(to.at(dealt.row(i), dealt.unit(i)), sum);
      if (second.first != nullptr) store16(second.at(dealt.row(i), dealt.unit(i)), sum);
    }
  }
}

}  // namespace tpk::cuda
