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
  static constexpr uint32_t kBoxColumns = Row::kPacked ? 128 : 64;

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

  __device__ __forceinline__ void send_signals() { turn_.await_announcements(&Base::barriers().announced); }

  // The tensor cores rest while a tile is rounded and staged, not while it goes to a peer at the speed of its link.
  __device__ __forceinline__ void multiply_and_send() {
    Place<N> place;
    uint32_t handed = 0;
    float d[N / 2] = {};
    for (uint32_t i = Base::first_tile(); i < order_.total(); i += Base::tile_step()) {
      const Tile tile = order_.interleaved(i);
      const uint32_t last = Base::multiply_tile(d, place);
      if (Base::have_agreed()) {
        stage(d, tile, last, handed);
      } else {
        Base::give_back(last);
      }
    }
  }

  // The storing thread. A flag is raised when all of its tile is written.
  __device__ __forceinline__ void store() {
    if (!Base::have_agreed()) return;
    fence_async();  // what ranks have read from these slots, and written there, by ordinary loads and stores
    uint32_t stored = 0, stage = Ring<N>::kStages - 1;
    for (uint32_t i = Base::first_tile(); i < order_.total(); i += Base::tile_step()) {
      const Tile tile = order_.interleaved(i);
      const TensorMap& map = args_.gemm.y[turn_.slot_number()][tile.owner];
      Base::template store_staged<kBoxColumns>(map, tile, stored, stage);
      stores_wait<0>();
      turn_.raise_tile(tile.owner, tile.number);
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
  __device__ __forceinline__ void stage(const float (&d)[N / 2], const Tile& tile, uint32_t last,
                                        uint32_t& handed) const {
    if constexpr (Row::kPacked) {
      Base::give_back(last);
      Base::await_stored(handed);
      char* const part = turn_.slot(static_cast<int>(tile.owner)) + static_cast<size_t>(me()) * part_bytes(tile.owner);
      stage_packed_rows<C, T, N>(d, packed_at(part, tile), Base::rows_in(tile), Base::columns_in(tile),
                                 Base::bias_of(tile), product_thread() / 32, ring_);
    } else {
      Base::await_stored(handed);
      Base::template stage_tile<Sent>(d, tile, last);
    }
    Base::hand_over();
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
