// The fused GEMMs of Hopper (fused_gemm_sm90.cu): one kernel multiplies, sends tiles as they are done, and sums or
// gathers as they come. The interface for the host; torch-free. Only for devices of compute capability 9.0.
//
// bf16 and fp16, products summed in fp32, any codec (coded_tiles.cuh). A launch works on a piece: a stretch of every
// rank's rows, as many as `most_reduced_rows` or `most_gathered_rows` (tiles.h) allow; a larger call is several
// launches, each with an epoch of its own and Call::piece counted up. All ranks launch the same pieces, reductions with
// the same tile_columns; grids, and the tiles of a gather, may differ. The tensor maps are those of this piece. Nothing
// is allocated, nothing waits, no heap is read: it may be captured.
//
// cudaErrorInvalidValue, and nothing is launched: another dtype; N or K zero or no multiple of 8; N of a reduction or
// K of a gather no multiple of the values that share a scale; tile_columns neither 128 nor 256; a piece that does not
// fit; y, x_shard, x_whole, bias or a row stride off a multiple of 16 bytes. Needs a grid that is resident as a whole,
// on all ranks at once: at most one block on a multiprocessor. (Where blocks begin in the order of their numbers,
// `communicating` + 1 resident blocks are enough to come to an end.)
#pragma once

#include "kernels.h"
#include "tensor_map_type.h"
#include "tiles.h"

namespace tpk::cuda {

constexpr int kTileThreads = 384;  // one warpgroup loads and talks, two multiply

// y = x @ w.T (+ bias): x [rows, K], w [N, K], bias [N] of the same dtype or nullptr. In a reduction the bias is that
// of one rank (rank 0), and nullptr on the others. All maps have boxes of 128 bytes a row and a 128-byte swizzle.
// w may lie transposed, as it does in a backward (dx = dy @ w), and may so on some ranks alone.
struct GemmOperands {
  TensorMap x[kMaxPeers];  // the rows of rank r in this piece, [count[r], K], box of kTileRows rows; unused where none
  TensorMap w;             // [N, K], box of tile_columns rows; transposed [K, N], box of kTileDepth rows
  // Where tiles of the rows of rank r are stored, [count[r], N], box of kTileRows rows: of a reduction the StoredRows
  // of each of the two slots, of a gather the rows of y, the first map alone.
  TensorMap y[2][kMaxPeers];
  const void* bias;
  uint32_t N, K;
  uint32_t tile_columns;  // of a tile of y: 128 or 256
  bool w_transposed;
};

// What this rank sends for the rows of rank r: rows of N values in r's slot. Packed ones have their scales behind them.
struct StoredRows {
  DType dtype;  // of a map: only its size counts
  char* first;
  size_t row_bytes;
};
inline StoredRows stored_rows(const Peers& peers, const RowCut& cut, uint32_t slot, int r, DType dtype, Codec codec,
                              uint32_t N) {
  const size_t part = cut.count[r] * sent_row_bytes(codec, N);
  char* const first = peers.arena[r] + slot_offset(peers, slot) + static_cast<size_t>(peers.rank) * part;
  if (is_sent_packed(codec)) return {DType::U8, first, N};
  return {dtype, first, size_t{N} * 2};
}

// Blocks [0, communicating) sum or gather; the others multiply, and when they are done sum as well. Both at least 1.
struct FusedGrid {
  int communicating, multiplying;
};

// y_part [cut.count[rank], N]: this rank's rows of the sum over the ranks of x_r @ w_r.T, of this piece. Only the
// counts of the cut matter.
cudaError_t launch_gemm_reduce_scatter(const Peers&, const Call&, const GemmOperands&, void* y_part, const RowCut&,
                                       FusedGrid, cudaStream_t);
// y [all rows, N]: every rank's rows of that sum, those of rank r at cut.first[r].
cudaError_t launch_gemm_all_reduce(const Peers&, const Call&, const GemmOperands&, void* y, const RowCut&, FusedGrid,
                                   cudaStream_t);
// x_whole [all rows, K] takes the rows of all ranks, those of rank r at cut.first[r], and y [all rows, N] their
// products. x_part: this rank's rows of the piece, x_row_stride values from one to the next. The maps are gemm.x[rank]
// over x_part, the others over x_whole; under a codec all, because x_whole takes what is unpacked, of the own rows,
// too. Call::brings and cut.brings as in launch_all_gather: values of a rank's whole part.
cudaError_t launch_all_gather_gemm(const Peers&, const Call&, const void* x_part, uint64_t x_row_stride, void* x_whole,
                                   const GemmOperands&, void* y, const RowCut&, FusedGrid, cudaStream_t);

}  // namespace tpk::cuda
