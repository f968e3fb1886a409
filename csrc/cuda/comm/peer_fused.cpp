// Path fused of transport `peer`: a call is one launch for each piece, a stretch of every rank's rows (choose_fused.h
// has their number). The pieces of a call, and the tiles of a piece, are the same on all ranks; their grids need not
// be.
#include <algorithm>

#include "core/check.h"
#include "cuda/kernels/fused_gemm.h"
#include "peer_communicator.h"

namespace tpk::cuda {
namespace {

constexpr size_t kValueBytes = 2;  // of bf16 and fp16

inline const char* rows_at(const void* base, size_t row, size_t stride) {
  return static_cast<const char*>(base) + row * stride * kValueBytes;
}
inline char* rows_at(void* base, size_t row, size_t stride) {
  return static_cast<char*>(base) + row * stride * kValueBytes;
}

// Of every rank's rows those from `start` on, `most` of them.
RowCut rows_of_piece(const Cut& rows, int world_size, size_t start, size_t most, bool gathers, uint32_t K) {
  RowCut piece{};
  for (int r = 0; r < world_size; ++r) {
    const size_t has = rows.size(r), from = std::min(start, has);
    piece.first[r] = static_cast<uint32_t>(rows.start(r) + from);
    piece.count[r] = static_cast<uint32_t>(std::min(most, has - from));
    if (gathers) piece.brings[r] = static_cast<uint32_t>(has * K);
  }
  return piece;
}

// One block on a multiprocessor at most, and none without a tile.
FusedGrid grid_of(const FusedPlan& plan, const RowCut& piece, int world_size, uint32_t N) {
  uint32_t row_blocks = 0;
  for (int r = 0; r < world_size; ++r) row_blocks += divided_up(piece.count[r], kTileRows);
  const uint32_t tiles = std::max(row_blocks * divided_up(N, plan.tile_columns), 1u);
  return {plan.communicating, static_cast<int>(std::min(tiles, static_cast<uint32_t>(plan.multiplying)))};
}

}  // namespace

void PeerCommunicator::send_fused_gemm(const CallSpec& spec, const FusedGemm& gemm) {
  const FusedKind kind = fused_kind(spec.op);
  const bool gathers = kind == FusedKind::Gather;
  const size_t mine = gemm.rows.start(rank()), largest = gemm.rows.largest();
  const FusedPlan plan = plan_fused(machine(), forced(),
                                    {spec.op, spec.dtype, spec.codec, static_cast<int64_t>(gemm.rows.total()),
                                     static_cast<int64_t>(gathers ? gemm.K : gemm.N), gathers ? gemm.N : 0});
  TPK_CHECK(plan.piece_rows > 0, describe_call(spec.op), ": no row of path fused fits into a slot of ",
            arena_.slot_bytes, " bytes");
  GemmOperands operands{};
  const size_t w_bytes = gemm.w_stride * kValueBytes;
  operands.w = gemm.w_transposed ? maps_.of(spec.dtype, gemm.w, gemm.K, gemm.N, w_bytes, kTileDepth)
                                 : maps_.of(spec.dtype, gemm.w, gemm.N, gemm.K, w_bytes, plan.tile_columns);
  operands.w_transposed = gemm.w_transposed;
  operands.bias = gemm.bias, operands.N = gemm.N, operands.K = gemm.K, operands.tile_columns = plan.tile_columns;
  for (size_t start = 0; start < largest; start += plan.piece_rows) {
    const RowCut piece = rows_of_piece(gemm.rows, world_size(), start, plan.piece_rows, gathers, gemm.K);
    const size_t done = piece.first[rank()] - mine;  // of this rank's rows
    for (int r = 0; r < world_size(); ++r) {
      if (piece.count[r] == 0) continue;
      // Into x_whole, from another rank or unpacked.
      const bool comes = gathers && (r != rank() || spec.codec != Codec::None);
      const char* const x = comes     ? rows_at(gemm.x_whole, piece.first[r], gemm.K)
                            : gathers ? rows_at(gemm.x, done, gemm.x_stride)
                                      : rows_at(gemm.x, piece.first[r], gemm.x_stride);
      operands.x[r] =
          maps_.of(spec.dtype, x, piece.count[r], gemm.K, (comes ? gemm.K : gemm.x_stride) * kValueBytes, kTileRows);
      if (gathers) {
        char* const y = rows_at(gemm.y, piece.first[r], gemm.N);
        operands.y[0][r] = maps_.of(spec.dtype, y, piece.count[r], gemm.N, gemm.N * kValueBytes, kTileRows);
        continue;
      }
      for (uint32_t slot = 0; slot < 2; ++slot) {
        const StoredRows to = stored_rows(peers_, piece, slot, r, spec.dtype, spec.codec, gemm.N);
        operands.y[slot][r] = maps_.of(to.dtype, to.first, piece.count[r], gemm.N, to.row_bytes, kTileRows);
      }
    }
    Call call = next_call(spec);
    const FusedGrid grid = grid_of(plan, piece, world_size(), gemm.N);
    const cudaStream_t stream = current_stream();
    if (gathers) {
      call.brings = static_cast<uint32_t>(spec.mine);
      check_cuda(launch_all_gather_gemm(peers_, call, rows_at(gemm.x, done, gemm.x_stride), gemm.x_stride, gemm.x_whole,
                                        operands, gemm.y, piece, grid, stream),
                 "fused all_gather_gemm");
    } else if (kind == FusedKind::ReduceScatter) {
      check_cuda(launch_gemm_reduce_scatter(peers_, call, operands, rows_at(gemm.y, done, gemm.N), piece, grid, stream),
                 "fused gemm_reduce_scatter");
    } else {
      check_cuda(launch_gemm_all_reduce(peers_, call, operands, gemm.y, piece, grid, stream), "fused gemm_all_reduce");
    }
  }
  count_fused(spec, gemm);
}

// A gather is read by all others; a reduction sends each other rank's rows, and all_reduce this rank's sum to all.
void PeerCommunicator::count_fused(const CallSpec& spec, const FusedGemm& gemm) {
  const size_t others = static_cast<size_t>(world_size() - 1), mine = gemm.rows.size(rank());
  const size_t sent = gemm.rows.total() - mine, shared = others * mine;
  const FusedKind kind = fused_kind(spec.op);
  const size_t row = sent_row_bytes(spec.codec, kind == FusedKind::Gather ? gemm.K : gemm.N);
  switch (kind) {
    case FusedKind::Gather: return count(shared * row);
    case FusedKind::ReduceScatter: return count(sent * row);
    default: return count((sent + shared) * row);
  }
}

}  // namespace tpk::cuda
