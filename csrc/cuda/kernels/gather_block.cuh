// The blocks of all_gather_gemm (fused_gemm_sm90.cu).
#pragma once

#include "bulk_rows.cuh"
#include "coded_tiles.cuh"
#include "fused_block.cuh"

namespace tpk::cuda {

template <class T, int N>
class GatherBlock : public Block<T, N> {
  using Base = Block<T, N>;
  using Base::args_, Base::me, Base::ranks, Base::ring_, Base::turn_;

 public:
  __device__ __forceinline__ GatherBlock(const GatherArgs& args, char* dynamic_shared)
      : Base(args, Kernel::AllGatherGemm, 0, dynamic_shared),
        gather_(args),
        order_(TileOrder::of_gather(args.cut, args.peers.world_size, args.peers.rank, args.gemm.N, N)),
        slices_(divided_up(args.gemm.K, kGatherColumns)) {}

  // This rank's rows are read in place; those of others, and all under a codec, when their items have arrived, if the
  // ranks agree.
  __device__ __forceinline__ void load() {
    Place<N> place;
    for (uint32_t i = Base::first_tile(); i < order_.total(); i += Base::tile_step()) {
      const Tile tile = order_.by_part(i);
      if (!is_to_be_multiplied(tile)) return;
      const auto await_x = [&](uint32_t step) { return lies_there(tile) || await_item(tile, step); };
      if (!load_stages(args_.gemm, tile, ring_, Base::barriers(), place, await_x)) return;
    }
  }

  __device__ __forceinline__ void send_signals() { turn_.await_announcements(&Base::barriers().announced); }

  __device__ __forceinline__ void multiply_and_send() {
    Place<N> place;
    uint32_t handed = 0;
    float d[N / 2] = {};
    for (uint32_t i = Base::first_tile(); i < order_.total(); i += Base::tile_step()) {
      const Tile tile = order_.by_part(i);
      if (!is_to_be_multiplied(tile)) return;
      const uint32_t last = Base::multiply_tile(d, place);
      if (Base::have_agreed()) {
        Base::await_stored(handed);
        Base::template stage_tile<T>(d, tile, last);
        Base::hand_over();
      } else {
        Base::give_back(last);
      }
    }
  }

  // The storing thread.
  __device__ __forceinline__ void store() {
    if (!Base::have_agreed()) return;
    uint32_t stored = 0, stage = Ring<N>::kStages - 1;
    for (uint32_t i = Base::first_tile(); i < order_.total(); i += Base::tile_step()) {
      const Tile tile = order_.by_part(i);
      Base::template store_staged<64>(args_.gemm.y[0][tile.owner], tile, stored, stage);
    }
    stores_wait<0>();
  }

  // Only the communicating blocks: the multiplying blocks wait for these copies, which must not wait for products.
  __device__ __forceinline__ void move() {
    if (Base::multiplies() || !Base::have_agreed()) return;
    switch (args_.call.codec) {
#define TPK_CODEC_CASE(name, id, type) \
  case Codec::id: return bring_and_fetch<type>();
      TPK_CODECS(TPK_CODEC_CASE)
#undef TPK_CODEC_CASE
      default: return bring_and_fetch<NoCodec>();
    }
  }

 private:
  __device__ __forceinline__ bool lies_there(const Tile& tile) const {
    return Base::is_mine(tile) && args_.call.codec == Codec::None;
  }
  __device__ __forceinline__ bool is_to_be_multiplied(const Tile& tile) const {
    return lies_there(tile) || Base::have_agreed();
  }

  // Items are numbered row block by row block, slice by slice.
  __device__ __forceinline__ bool await_item(const Tile& tile, uint32_t step) {
    constexpr uint32_t kSteps = kGatherColumns / kTileDepth;
    if (step % kSteps != 0) return true;
    const uint32_t item = tile.row_block * slices_ + step / kSteps;
    if (!turn_.await_tile(static_cast<int>(tile.owner), item)) return turn_.give_up_waiting(true), false;
    fence_async();  // the flag is a generic one, the loads are asynchronous
    return true;
  }

  __device__ __forceinline__ uint32_t items_of(uint32_t owner) const { return order_.row_blocks(owner) * slices_; }
  __device__ __forceinline__ Dealt<kGatherColumns> dealt_item(uint32_t owner, uint32_t item) const {
    const uint32_t row = item / slices_ * kTileRows, column = item % slices_ * kGatherColumns;
    return {smaller(kTileRows, args_.cut.count[owner] - row), smaller(kGatherColumns, args_.gemm.K - column) / 8};
  }
  // Rows of K values, at an item.
  __device__ __forceinline__ Rows item_at(const void* rows, size_t row_bytes, uint32_t item) const {
    const size_t row = size_t{item / slices_} * kTileRows, column = size_t{item % slices_} * kGatherColumns;
    return {static_cast<char*>(const_cast<void*>(rows)) + row * row_bytes + column * sizeof(T), row_bytes};
  }
  __device__ __forceinline__ size_t row_bytes() const { return size_t{args_.gemm.K} * sizeof(T); }
  __device__ __forceinline__ Rows in_whole(uint32_t owner, uint32_t item) const {
    const size_t first = size_t{args_.cut.first[owner]} * row_bytes();
    return item_at(static_cast<char*>(gather_.x_whole) + first, row_bytes(), item);
  }

  __device__ __forceinline__ Rows slot_at(uint32_t owner, uint32_t item) const {
    return item_at(turn_.slot(static_cast<int>(owner)), row_bytes(), item);
  }

  template <class C>
  __device__ __forceinline__ PackedRows<C> packed_at(uint32_t owner, uint32_t item) const {
    using Row = SentRow<C>;
    const size_t row = size_t{item / slices_} * kTileRows, column = size_t{item % slices_} * kGatherColumns;
    const size_t K = args_.gemm.K, stride = Row::scale_bytes(args_.gemm.K);
    char* const slot = turn_.slot(static_cast<int>(owner));
    char* const scales = slot + args_.cut.count[owner] * K + row * stride;
    return {slot + row * K + column, scales + column / Row::kUnit * sizeof(typename C::Scale), K, stride};
  }

  // The items of a communicating block: every so manieth of those of rank me + distance and the ranks behind it. They
  // are alike: to take them from a common counter would be an atomic and two barriers for each.
  struct Items {
    uint32_t i, distance, before = 0;  // before: items of the ranks up to me + distance
  };
  __device__ __forceinline__ Items items_from(uint32_t distance) const { return {blockIdx.x, distance}; }
  __device__ __forceinline__ uint32_t owner_of(const Items& items) const {
    return (static_cast<uint32_t>(me()) + items.distance) % static_cast<uint32_t>(ranks());
  }
  __device__ __forceinline__ static uint32_t item_of(const Items& items) { return items.i - items.before; }
  // Goes on to the rank that has item i; false when none has.
  __device__ __forceinline__ bool find(Items& items) const {
    while (items.distance < static_cast<uint32_t>(ranks())) {
      const uint32_t of_owner = items_of(owner_of(items));
      if (item_of(items) < of_owner) return true;
      items.before += of_owner, ++items.distance;
    }
    return false;
  }

  // Rows that are sent as they lie are copied by the hardware; others pass through registers.
  template <class C>
  __device__ __forceinline__ void bring_and_fetch() {
    if constexpr (!std::is_same_v<C, NoCodec>) bring_own_rows<C>();
    if constexpr (SentRow<C>::kPacked) {
      fetch_packed_rows<C>();
    } else {
      copy_in_bulk(items_from(std::is_same_v<C, NoCodec> ? 0 : 1));
    }
  }

  // ---- by bulk copies: own rows into the slot and x_whole, those of other ranks into x_whole

  __device__ __forceinline__ void copy_in_bulk(Items items) {
    CopyRing ring(ring_, Base::barriers());
    Items loads = items;
    uint32_t part = 0;  // of the next item that is loaded
    const uint32_t thread = product_thread();
    const bool asks = thread % 32 == 0;
    if (asks) fence_async();  // what peers have read from this slot by ordinary loads
    for (; find(items); items.i += args_.communicating) {
      if (asks && !copy_item(ring, items, loads, part)) return;
      __syncwarp();
      sync_product_threads();
      const int r = static_cast<int>(thread);
      const uint32_t owner = owner_of(items), item = item_of(items);
      if (items.distance == 0 && r < ranks() && r != me()) turn_.raise_summed(r, item);
      if (items.distance != 0 && thread == 0) turn_.raise_gathered(owner, item);
    }
  }

  // One lane of each product warp. All loads that have room go before a store; one that its rank has not raised a flag
  // for is waited for only where nothing is on its way, so that no rank holds back what another waits for.
  __device__ __forceinline__ bool copy_item(CopyRing& ring, const Items& items, Items& loads, uint32_t& part) {
    const uint32_t owner = owner_of(items), item = item_of(items);
    const Dealt<kGatherColumns> dealt = dealt_item(owner, item);
    Rows to = in_whole(owner, item), second = {nullptr, 0};
    if (items.distance == 0) second = to, to = slot_at(owner, item);
    for (uint32_t stored = 0; stored < copy_parts(dealt.rows); ++stored) {
      while (ring.has_room() && find(loads)) {
        if (part == 0 && !is_raised(loads, ring.is_empty())) {
          if (ring.is_empty()) return false;
          break;
        }
        load_part(ring, loads, part);
      }
      ring.store(dealt, to, second, stored);
    }
    stores_wait<0>();
    return true;
  }

  __device__ __forceinline__ void load_part(CopyRing& ring, Items& loads, uint32_t& part) const {
    const uint32_t owner = owner_of(loads), item = item_of(loads);
    const Dealt<kGatherColumns> dealt = dealt_item(owner, item);
    const Rows from = loads.distance == 0 ? item_at(gather_.x_part, gather_.x_row_bytes, item) : slot_at(owner, item);
    ring.load(dealt, from, part);
    if (++part == copy_parts(dealt.rows)) part = 0, loads.i += args_.communicating;
  }

  // Whether an item can be loaded. One thread of the block waits with the deadline, and ends the kernel; the others
  // wait for the same flag.
  __device__ __forceinline__ bool is_raised(const Items& items, bool waits) {
    if (items.distance == 0) return true;
    const int owner = static_cast<int>(owner_of(items));
    const uint32_t item = item_of(items);
    if (!turn_.has_summed(owner, item)) {
      if (!waits) return false;
      if (product_thread() == 0 && !turn_.await_summed(owner, item)) return turn_.give_up_waiting(true), false;
      while (!turn_.has_summed(owner, item)) {
      }
    }
    fence_async();  // the flag is a generic one, and so may the stores behind it be
    return true;
  }

  // ---- under a codec

  template <class C>
  __device__ __forceinline__ void bring_own_rows() {
    const uint32_t owner = static_cast<uint32_t>(me());
    const int thread = static_cast<int>(product_thread());
    for (uint32_t item = blockIdx.x; item < items_of(owner); item += args_.communicating) {
      bring_item<C>(owner, item);
      fence_async();
      sync_product_threads();
      if (thread < ranks() && thread != me()) turn_.raise_summed(thread, item);
      if (thread == me()) turn_.raise_gathered(owner, item);
    }
  }

  // Into the slot, and into x_whole as all ranks have them.
  template <class C>
  __device__ __forceinline__ void bring_item(uint32_t owner, uint32_t item) const {
    const Dealt<kGatherColumns> dealt = dealt_item(owner, item);
    const Rows from = item_at(gather_.x_part, gather_.x_row_bytes, item), whole = in_whole(owner, item);
    const Rows in_slot = slot_at(owner, item);
    if constexpr (SentRow<C>::kPacked) {
      pack_rows<C, T, kGatherColumns>(dealt.rows, dealt.units * 8 / SentRow<C>::kUnit, from, packed_at<C>(owner, item),
                                      whole);
    } else if constexpr (C::kScaled) {
      sum_blocks<C, T>(dealt.rows, from, 0, 1, whole, in_slot, false);
    } else {
      copy_rows(dealt, from, in_slot, whole, AsPacked<C, T>{});
    }
  }

  template <class C>
  __device__ __forceinline__ void fetch_packed_rows() {
    for (Items items = items_from(1); find(items); items.i += args_.communicating) {
      if (!fetch_item<C>(owner_of(items), item_of(items))) return;
    }
  }

  template <class C>
  __device__ __forceinline__ bool fetch_item(uint32_t owner, uint32_t item) {
    if (product_thread() == 0) turn_.await_summed(static_cast<int>(owner), item);
    sync_product_threads();
    if (turn_.is_late()) return turn_.give_up_waiting(product_thread() == 0), false;
    const Dealt<kGatherColumns> dealt = dealt_item(owner, item);
    copy_packed_rows<C, T, kGatherColumns>(dealt.rows, dealt.units * 8 / SentRow<C>::kUnit, packed_at<C>(owner, item),
                                           in_whole(owner, item));
    fence_async();
    sync_product_threads();
    if (product_thread() == 0) turn_.raise_gathered(owner, item);
    return true;
  }

  const GatherArgs& gather_;
  TileOrder order_;
  uint32_t slices_;
};

}  // namespace tpk::cuda
