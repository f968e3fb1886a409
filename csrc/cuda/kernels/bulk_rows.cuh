// Rows that move by bulk copies: from global memory, a peer's too, into the ring of a block that does not multiply, and
// from there to one place or two. No register holds them, so that up to 160 KiB of a block are on their way.
//
// Asks     one lane of each product warp, for its rows of every part. Loads run ahead of stores by up to kCopyStages
//          parts, across items.
// Order    generic writes -> flag -> acquire -> fence_async -> load_bytes: both ends of a flag are the caller's. What a
//          load has brought is seen behind its barrier, by a store too, which is of the same proxy. A stage is loaded
//          again when what was stored from it has been read; a flag is raised after stores_wait.
// Needs    rows of a multiple of 16 bytes that begin at one; the shared memory of Ring, which nobody else uses.
#pragma once

#include "tile_moves.cuh"

namespace tpk::cuda {

constexpr uint32_t kCopyRows = 32;  // of a part, kTileRows of an item
constexpr uint32_t kCopyRowBytes = kGatherColumns * 2;

TPK_HOST_DEVICE constexpr uint32_t copy_parts(uint32_t rows) { return divided_up(rows, kCopyRows); }

class CopyRing {
 public:
  template <int N>
  __device__ __forceinline__ CopyRing(const Ring<N>& ring, Barriers& barriers)
      : base_(ring.base), brought_(barriers.brought), first_row_(product_thread() / 32 * kRowsOfWarp) {
    static_assert(kCopyStages * kCopyRows * kCopyRowBytes <= Ring<N>::kStages * Ring<N>::kStageBytes);
  }

  __device__ __forceinline__ bool has_room() const { return loaded_ - stored_ < kCopyStages; }
  __device__ __forceinline__ bool is_empty() const { return loaded_ == stored_; }

  // Part of an item: rows [part * kCopyRows, + kCopyRows), as many as are dealt.
  __device__ __forceinline__ void load(const Dealt<kGatherColumns>& dealt, const Rows& from, uint32_t part) {
    uint64_t* const brought = &brought_[loaded_ % kCopyStages];
    const uint32_t first = part * kCopyRows + first_row_, rows = rows_in(dealt, first);
    stores_wait_read<0>();
    transaction_expect(brought, rows * dealt.units * 16);
    for (uint32_t r = 0; r < rows; ++r) load_bytes(place(loaded_, r), from.at(first + r, 0), dealt.units * 16, brought);
    ++loaded_;
  }

  // The oldest part that is loaded, to `to` and, where it is given, `second`.
  __device__ __forceinline__ void store(const Dealt<kGatherColumns>& dealt, const Rows& to, const Rows& second,
                                        uint32_t part) {
    const uint32_t first = part * kCopyRows + first_row_, rows = rows_in(dealt, first);
    await(&brought_[stored_ % kCopyStages], stored_ / kCopyStages & 1);
    for (uint32_t r = 0; r < rows; ++r) {
      store_bytes(to.at(first + r, 0), place(stored_, r), dealt.units * 16);
      if (second.first != nullptr) store_bytes(second.at(first + r, 0), place(stored_, r), dealt.units * 16);
    }
    stores_commit();
    ++stored_;
  }

 private:
  static constexpr uint32_t kRowsOfWarp = kCopyRows / kProductWarps;

  __device__ __forceinline__ static uint32_t rows_in(const Dealt<kGatherColumns>& dealt, uint32_t first) {
    return first < dealt.rows ? smaller(kRowsOfWarp, dealt.rows - first) : 0;
  }
  __device__ __forceinline__ char* place(uint32_t number, uint32_t row) const {
    return base_ + (number % kCopyStages * kCopyRows + first_row_ + row) * kCopyRowBytes;
  }

  char* base_;
  uint64_t* brought_;
  uint32_t first_row_;                // of this warp in a part
  uint32_t loaded_ = 0, stored_ = 0;  // parts
};

}  // namespace tpk::cuda
