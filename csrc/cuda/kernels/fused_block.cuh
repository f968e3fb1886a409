// The blocks of the fused GEMMs (fused_gemm_sm90.cu): arguments, shared memory, places of tiles.
#pragma once

#include "tile_moves.cuh"
#include "tile_turn.cuh"

namespace tpk::cuda {

struct Args {
  Peers peers;
  Call call;
  GemmOperands gemm;
  void* y;
  RowCut cut;
  uint32_t rows;  // of all ranks, as announced
  uint32_t communicating;
};

struct ReduceArgs : Args {
  bool everywhere;  // gemm_all_reduce
};

struct GatherArgs : Args {
  const void* x_part;
  void* x_whole;
  size_t x_row_bytes;
};

// The base of both kernels: set-up of a block, and the work of its threads.
template <class T, int N>
class Block {
 public:
  // common_columns: of the tiles that ranks exchange, 0 where each may have its own.
  __device__ __forceinline__ Block(const Args& args, Kernel kernel, uint32_t common_columns, char* dynamic_shared)
      : args_(args), ring_(dynamic_shared), turn_(args.peers, args.call, kernel, common_columns, args.rows, brings()) {}

  __device__ __forceinline__ bool is_skipped() const { return turn_.is_skipped(); }
  // All threads.
  __device__ __forceinline__ void begin() {
    if (threadIdx.x == 0) {
      prefetch(&args_.gemm.w);
      init_barriers<N>(barriers());
    }
    __syncthreads();
  }
  __device__ __forceinline__ void end() {
    __syncthreads();
    turn_.end();
  }
  __device__ __forceinline__ bool multiplies() const { return blockIdx.x >= args_.communicating; }

 protected:
  __device__ __forceinline__ static Barriers& barriers() {
    __shared__ Barriers shared;
    return shared;
  }
  __device__ __forceinline__ int me() const { return args_.peers.rank; }
  __device__ __forceinline__ int ranks() const { return args_.peers.world_size; }
  __device__ __forceinline__ bool is_mine(const Tile& tile) const { return static_cast<int>(tile.owner) == me(); }
  // The tiles of a multiplying block: first, first + step, ...
  __device__ __forceinline__ uint32_t first_tile() const { return blockIdx.x - args_.communicating; }
  __device__ __forceinline__ uint32_t tile_step() const { return gridDim.x - args_.communicating; }
  __device__ __forceinline__ uint32_t steps() const { return divided_up(args_.gemm.K, kTileDepth); }
  __device__ __forceinline__ bool have_agreed() const {
    await(&barriers().announced, 0);
    return turn_.have_agreed();
  }
  // Rows and columns of a tile that lie inside y.
  __device__ __forceinline__ uint32_t rows_in(const Tile& tile) const {
    return smaller(kTileRows, args_.cut.count[tile.owner] - tile.row_block * kTileRows);
  }
  __device__ __forceinline__ uint32_t columns_in(const Tile& tile) const {
    return smaller(N, args_.gemm.N - tile.column_block * N);
  }
  // Of a tile in rows of N values, which begin with the first row of the tile's part.
  __device__ __forceinline__ size_t place_in_part(const Tile& tile) const {
    return size_t{tile.row_block} * kTileRows * args_.gemm.N + tile.column_block * N;
  }
  __device__ __forceinline__ size_t place_in_whole(const Tile& tile) const {
    return size_t{args_.cut.first[tile.owner]} * args_.gemm.N + place_in_part(tile);
  }
  __device__ __forceinline__ Rows rows_at(const void* first, size_t values) const {
    return {static_cast<char*>(const_cast<void*>(first)) + values * sizeof(T), size_t{args_.gemm.N} * sizeof(T)};
  }
  __device__ __forceinline__ Dealt<N> dealt(const Tile& tile) const { return {rows_in(tile), columns_in(tile) / 8}; }

  // The products of a tile, in d. Returns the last stage, which is to be given back.
  __device__ __forceinline__ uint32_t multiply_tile(float (&d)[N / 2], Place<N>& place) {
    const uint32_t half = product_thread() / kWarpgroup;
    return args_.gemm.w_transposed ? multiply<T, N, true>(d, steps(), half, ring_, barriers(), place)
                                   : multiply<T, N, false>(d, steps(), half, ring_, barriers(), place);
  }
  // By each product warp.
  __device__ __forceinline__ void give_back(uint32_t stage) const {
    if (threadIdx.x % 32 == 0) transaction_arrive(&barriers().empty[stage]);
  }
  // Those of a tile's columns.
  __device__ __forceinline__ const T* bias_of(const Tile& tile) const {
    const T* const bias = static_cast<const T*>(args_.gemm.bias);
    return bias == nullptr ? nullptr : bias + tile.column_block * N;
  }

  // ---- what the product warps hand to the storing thread, tile by tile; handed, stored: how many there were

  __device__ __forceinline__ void await_stored(uint32_t& handed) const { await(&barriers().stored, ++handed & 1); }
  // A tile, as values of W. The last stage goes with it.
  template <class W>
  __device__ __forceinline__ void stage_tile(const float (&d)[N / 2], const Tile& tile, uint32_t last) const {
    constexpr uint32_t kBoxes = N / 64;
    const uint32_t warp = product_thread() / 32, columns = columns_in(tile);
    if constexpr (kBoxes <= kStagedBoxes) give_back(last);
    stage_boxes<W, T, N>(d, 0, kStagedBoxes, columns, bias_of(tile), warp, ring_, last);
    if constexpr (kBoxes > kStagedBoxes) {
      sync_product_threads();  // the products of all warps have read the stage
      stage_boxes<W, T, N>(d, kStagedBoxes, kBoxes, columns, bias_of(tile), warp, ring_, last);
    }
  }
  __device__ __forceinline__ void hand_over() const {
    fence_async_shared();
    __syncwarp();
    if (threadIdx.x % 32 == 0) transaction_arrive(&barriers().staged);
  }

  // The storing thread: a tile in boxes of so many columns. stage: the last one of the tile before, then of this one.
  template <uint32_t kBoxColumns>
  __device__ __forceinline__ void store_staged(const TensorMap& map, const Tile& tile, uint32_t& stored,
                                               uint32_t& stage) const {
    constexpr uint32_t kBoxes = N / kBoxColumns;
    stage = (stage + steps()) % Ring<N>::kStages;
    await(&barriers().staged, stored++ & 1);
    for (uint32_t b = 0; b < kBoxes && b * kBoxColumns < columns_in(tile); ++b) {
      store_tile(&map, ring_.box(b, stage), static_cast<int32_t>(tile.column_block * N + b * kBoxColumns),
                 static_cast<int32_t>(tile.row_block * kTileRows));
    }
    stores_commit();
    stores_wait_read<0>();
    transaction_arrive(&barriers().stored);
    for (uint32_t warp = 0; kBoxes > kStagedBoxes && warp < kProductWarps; ++warp) {
      transaction_arrive(&barriers().empty[stage]);
    }
  }

  const Args& args_;
  Ring<N> ring_;
  TileTurn turn_;

 private:
  // The `brings` that the rank of this lane of the signal warp must announce.
  __device__ __forceinline__ uint32_t brings() const {
    return threadIdx.x % 32 < kMaxPeers ? args_.cut.brings[threadIdx.x % 32] : 0;
  }
};

}  // namespace tpk::cuda
