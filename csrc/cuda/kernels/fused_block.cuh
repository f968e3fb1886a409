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
  __device__ __forceinline__ void store_for_products() {}  // the storing warps

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

  // The products of a tile, in d.
  __device__ __forceinline__ void multiply_tile(float (&d)[N / 2], Place<N>& place) {
    const uint32_t half = product_thread() / kWarpgroup;
    if (args_.gemm.w_transposed) {
      multiply<T, N, true>(d, steps(), half, ring_, barriers(), place);
    } else {
      multiply<T, N, false>(d, steps(), half, ring_, barriers(), place);
    }
  }
  // Those of a tile's columns.
  __device__ __forceinline__ const T* bias_of(const Tile& tile) const {
    const T* const bias = static_cast<const T*>(args_.gemm.bias);
    return bias == nullptr ? nullptr : bias + tile.column_block * N;
  }
  template <class W>
  __device__ __forceinline__ TileOutput<W> output(const Tile& tile, W* first) const {
    return {first, args_.gemm.N, rows_in(tile), columns_in(tile)};
  }
  template <class W>
  __device__ __forceinline__ void store(const float (&d)[N / 2], const Tile& tile, W* first) const {
    store_tile<T, N>(d, output(tile, first), bias_of(tile), product_thread(), ring_);
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
