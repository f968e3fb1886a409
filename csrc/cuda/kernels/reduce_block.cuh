// The blocks of gemm_reduce_scatter and gemm_all_reduce (fused_gemm_sm90.cu).
#pragma once

#include "coded_tiles.cuh"
#include "fused_block.cuh"

namespace tpk::cuda {

// T: of the tensors, C: the codec, or NoCodec.
template <class T, int N, class C>
class ReduceBlock : public Block<T, N> {
  using Base = Block<T, N>;
  using Base::args_, Base::me, Base::ranks, Base::ring_, Base::turn_;
  using Row = SentRow<C>;
  using Sent = typename SentValues<C, T>::type;
  static constexpr uint32_t kTilesOfSum = Row::kUnit > N ? Row::kUnit / N : 1;
  static constexpr uint32_t kHandovers = Row::kPacked ? 1 : N / kStagedColumns;  // of a tile, to the storing warps

 public:
  __device__ __forceinline__ ReduceBlock(const ReduceArgs& args, char* dynamic_shared)
      : Base(args, args.everywhere ? Kernel::GemmAllReduce : Kernel::GemmReduceScatter, N, dynamic_shared),
        everywhere_(args.everywhere),
        order_(TileOrder::of_reduction(args.cut, args.peers.world_size, args.peers.rank, args.gemm.N, N)) {}

  __device__ __forceinline__ void load() {
    Place<N> place;
    for (uint32_t i = Base::first_tile(); i < order_.total(); i += Base::tile_step()) {
      load_stages(args_.gemm, order_.interleaved(i), ring_, Base::barriers(), place, [](uint32_t) { return true; });
    }
  }

  __device__ __forceinline__ void send_signals() {
    const bool agreed = turn_.await_announcements(&Base::barriers().announced);
    if (!Base::multiplies()) return;
    for (uint32_t i = Base::first_tile(); i < order_.total(); i += Base::tile_step()) {
      const Tile tile = order_.interleaved(i);
      sync_named(kTileBarrier, 32 * kStoringWarps + 32);
      if (agreed && threadIdx.x % 32 == 0) turn_.raise_tile(tile.owner, tile.number);
      __syncwarp();  // the barrier of the next tile is one for whole warps
    }
  }

  // The tensor cores rest while a tile is rounded and staged, not while it goes to a peer at the speed of its link:
  // that is the storing warps' work, beside the next product. One that is packed in registers is stored by who packs
  // it.
  __device__ __forceinline__ void multiply_and_send() {
    Place<N> place;
    uint32_t handed = 0;
    float d[N / 2] = {};
    for (uint32_t i = Base::first_tile(); i < order_.total(); i += Base::tile_step()) {
      const Tile tile = order_.interleaved(i);
      Base::multiply_tile(d, place);
      if (Base::have_agreed()) send(d, tile, handed);
    }
  }

  // The storing warps: each has the stagings of half of the product warps.
  __device__ __forceinline__ void store_for_products() {
    if (!Base::multiplies()) return;
    const bool agreed = Base::have_agreed();
    uint32_t taken = 0;
    for (uint32_t i = Base::first_tile(); i < order_.total(); i += Base::tile_step()) {
      const Tile tile = order_.interleaved(i);
      for (uint32_t part = 0; agreed && part < kHandovers; ++part) {
        await(&Base::barriers().staged, taken++ & 1);
        if constexpr (!Row::kPacked) store_staged_part(tile, part);
        __syncwarp();
        if (threadIdx.x % 32 == 0) transaction_arrive(&Base::barriers().stored);
        __syncwarp();  // the barrier of the tile is one for whole warps
      }
      sync_named(kTileBarrier, 32 * kStoringWarps + 32);
    }
  }

  __device__ __forceinline__ void move() {
    if (!Base::have_agreed() || (Base::multiplies() && !may_stay())) return;
    if (sum_own_tiles() && everywhere_) copy_sums();
  }

 private:
  // All product threads.
  __device__ __forceinline__ bool may_stay() const {
    __shared__ bool may;
    if (product_thread() == 0) may = turn_.have_all_begun();
    sync_product_threads();
    return may;
  }
  // What this rank has of the sums of a tile's owner, in the owner's slot.
  __device__ __forceinline__ char* part_of(const Tile& tile) const {
    char* const slot = turn_.slot(static_cast<int>(tile.owner));
    return slot + static_cast<size_t>(me()) * part_bytes(tile.owner);
  }
  __device__ __forceinline__ TileOutput<Sent> output_of(const Tile& tile) const {
    return Base::output(tile, reinterpret_cast<Sent*>(part_of(tile)) + Base::place_in_part(tile));
  }
  // handed: how often the staging was handed over; the storing warps have read it that often before it is written
  // again.
  __device__ __forceinline__ void send(const float (&d)[N / 2], const Tile& tile, uint32_t& handed) const {
    const uint32_t warp = product_thread() / 32;
    if constexpr (Row::kPacked) {
      await(&Base::barriers().stored, ++handed & 1);
      store_packed_rows<C, T, N>(d, packed_at(part_of(tile), tile), Base::rows_in(tile), Base::columns_in(tile),
                                 Base::bias_of(tile), 16 * warp, ring_.staging(warp));
      hand_over();
    } else {
#pragma unroll
      for (uint32_t start = 0; start < N; start += kStagedColumns) {
        await(&Base::barriers().stored, ++handed & 1);
        stage_columns<T, N, Sent>(d, start, Base::columns_in(tile), Base::bias_of(tile), ring_.staging(warp));
        hand_over();
      }
    }
  }
  __device__ __forceinline__ void hand_over() const {
    __syncwarp();
    if (threadIdx.x % 32 == 0) transaction_arrive(&Base::barriers().staged);
  }
  __device__ __forceinline__ void store_staged_part(const Tile& tile, uint32_t part) const {
    constexpr uint32_t kWarps = kProductWarps / kStoringWarps;
    const TileOutput<Sent> to = output_of(tile);
    const uint32_t first = (threadIdx.x / 32 - 2) * kWarps;
#pragma unroll 1
    for (uint32_t warp = first; warp < first + kWarps; ++warp) {
      store_staged<4>(to, 16 * warp, part * kStagedColumns, ring_.staging(warp));
    }
  }
  // The products of one rank for the rows of another.
  __device__ __forceinline__ size_t part_bytes(uint32_t owner) const {
    return args_.cut.count[owner] * Row::bytes(args_.gemm.N);
  }
  // A tile in such a part.
  __device__ __forceinline__ PackedRows<C> packed_at(char* part, const Tile& tile) const {
    const size_t payloads = size_t{args_.cut.count[tile.owner]} * args_.gemm.N, stride = Row::scale_bytes(args_.gemm.N);
    char* const scales = part + payloads + size_t{tile.row_block} * kTileRows * stride +
                         tile.column_block * (N / Row::kUnit * sizeof(typename C::Scale));
    return {part + Base::place_in_part(tile), scales, args_.gemm.N, stride};
  }

  // Of tiles whose values share scales, those of a scale at a time.
  __device__ __forceinline__ bool sum_own_tiles() {
    const uint32_t owner = static_cast<uint32_t>(me()), sums = order_.tiles_of(owner) / kTilesOfSum;
    const int thread = static_cast<int>(product_thread());
    for (uint32_t i; (i = take_next(turn_.taken(0))) < sums;) {
      const Tile tile = order_.wide_tile(owner, i, kTilesOfSum);
      if (thread < ranks()) await_tiles(thread, tile);
      sync_product_threads();
      if (turn_.is_late()) return turn_.give_up_waiting(thread == 0), false;
      sum_tile(tile);
      if (!everywhere_) continue;
      sync_product_threads();
      for (uint32_t k = 0; k < kTilesOfSum; ++k) {
        if (thread < ranks() && thread != me()) turn_.raise_summed(thread, order_.number_beside(tile, k));
      }
    }
    return true;
  }

  __device__ __forceinline__ void await_tiles(int from, const Tile& first) const {
    for (uint32_t k = 0; k < kTilesOfSum; ++k) {
      if (!turn_.await_tile(from, order_.number_beside(first, k))) return;
    }
  }

  __device__ __forceinline__ void sum_tile(const Tile& tile) const {
    const size_t place = Base::place_in_part(tile), bytes = part_bytes(tile.owner);
    char* const slot = turn_.slot(me());
    char* const mine = slot + static_cast<size_t>(me()) * bytes;
    const Rows y = Base::rows_at(args_.y, everywhere_ ? Base::place_in_whole(tile) : place);
    if constexpr (Row::kPacked) {
      sum_packed_rows<C, T, N>(Base::rows_in(tile), groups_in(tile), packed_at(slot, tile), bytes, ranks(), y,
                               everywhere_, packed_at(mine, tile));
    } else {
      const Rows parts = Base::rows_at(slot, place);
      const Rows sent{everywhere_ ? Base::rows_at(mine, place).first : nullptr, parts.stride};
      if constexpr (C::kScaled) {
        sum_blocks<C, T>(Base::rows_in(tile), parts, bytes, ranks(), y, sent, everywhere_);
      } else {
        sum_rows<T, Sent>(Base::dealt(tile), parts, bytes, ranks(), y, sent);
      }
    }
  }
  __device__ __forceinline__ uint32_t groups_in(const Tile& tile) const { return Base::columns_in(tile) / Row::kUnit; }

  // The sums of the other ranks, tile by tile.
  __device__ __forceinline__ void copy_sums() {
    for (uint32_t i; (i = take_next(turn_.taken(1))) < order_.total();) {
      const Tile tile = order_.interleaved(i);
      if (Base::is_mine(tile)) continue;
      const int owner = static_cast<int>(tile.owner);
      if (product_thread() == 0) turn_.await_summed(owner, tile.number);
      sync_product_threads();
      if (turn_.is_late()) return turn_.give_up_waiting(product_thread() == 0);
      char* const sums = turn_.slot(owner) + static_cast<size_t>(owner) * part_bytes(tile.owner);
      const Rows y = Base::rows_at(args_.y, Base::place_in_whole(tile));
      if constexpr (Row::kPacked) {
        copy_packed_rows<C, T, N>(Base::rows_in(tile), groups_in(tile), packed_at(sums, tile), y);
      } else {
        copy_rows<N>(Base::dealt(tile), Base::rows_at(sums, Base::place_in_part(tile)), y);
      }
    }
  }

  bool everywhere_;
  TileOrder order_;
};

}  // namespace tpk::cuda
