// Whether a sharded GEMM can take path fused (kernels/fused_gemm.h), and how it then does: pure functions, as in
// choose.h. Whether it should is gemm_times.h's to say. Torch-free.
#pragma once

#include <algorithm>

#include "choose.h"

namespace tpk::cuda {

// What is done with the rows of a sharded GEMM. A backward is the dual of its forward: dx = dy @ w is summed and cut
// where the forward gathered x, its dy is gathered where the forward cut y, and dx is summed where all ranks held x.
enum class FusedKind : uint8_t { Gather, ReduceScatter, AllReduce };

inline FusedKind fused_kind(Op op) {
  if (op == Op::AllGatherGemm || op == Op::GemmReduceScatterBackward) return FusedKind::Gather;
  if (op == Op::GemmReduceScatter || op == Op::AllGatherGemmBackward) return FusedKind::ReduceScatter;
  return FusedKind::AllReduce;
}

// Numbers that are the same on all ranks, but for `own`: of a reduction each rank has a K of its own, of a gather an N.
// The launch pads those, and nothing that ranks must agree on depends on them unless they are known to be alike
// (Machine::even_shards).
struct ShardedGemm {
  Op op;
  DType dtype;
  Codec codec;
  int64_t M;             // rows of y, or of the whole sum
  int64_t shared;        // N of a reduction, K of a gather; of a backward those of dx = dy @ w
  int64_t own = 0;       // K of a reduction, N of a gather, on this rank; 0: unknown
  bool wants_w = false;  // of a backward: dw, too, which the same ranks' other ways multiply beside a transfer

  bool gathers() const { return fused_kind(op) == FusedKind::Gather; }
  // Whether `shared` is N as the caller of the op, or of its forward, knows it.
  bool shares_N() const {
    return op == Op::GemmAllReduce || op == Op::GemmReduceScatter || op == Op::GemmReduceScatterBackward;
  }
};

struct FusedPlan {
  uint32_t piece_rows;  // the most of each rank's rows in one launch; 0: not even one fits
  uint32_t tile_columns;
  int communicating, multiplying;  // blocks; a rank with fewer tiles launches fewer
};

constexpr int kFusedArch = 90;
constexpr int64_t kFusedUnit = 8;  // values in 16 bytes, which every row begins at
// One block in eight sums or gathers, the others multiply. A guess.
constexpr int kShareOfCommunicating = 8;

inline FusedPlan plan_fused(const Machine& machine, const Forced& forced, const ShardedGemm& gemm) {
  const int device = std::max(machine.multiprocessors, 2);
  const int grid = forced.grid > 0 ? std::clamp(forced.grid, 2, device) : device;
  const int wanted = forced.blocks > 0 ? forced.blocks : grid / kShareOfCommunicating;
  const int communicating = std::clamp(wanted, 1, grid - 1), multiplying = grid - communicating;
  const uint32_t shared = static_cast<uint32_t>(gemm.shared);
  // The ranks must choose the same tiles of a reduction, whose flags belong to tiles; those of a gather belong to
  // items.
  const uint32_t N = gemm.gathers() ? static_cast<uint32_t>(gemm.own) : shared;
  const uint32_t columns = N == 0 ? 256 : choose_tile_columns(static_cast<uint64_t>(gemm.M), N, multiplying);
  const uint32_t most = gemm.gathers()
                            ? most_gathered_rows(machine.slot_bytes, shared, gemm.codec)
                            : most_reduced_rows(machine.slot_bytes, machine.world_size, shared, columns, gemm.codec);
  const auto ranks = static_cast<uint64_t>(machine.world_size);
  return {even_rows((static_cast<uint64_t>(gemm.M) + ranks - 1) / ranks, most), columns, communicating, multiplying};
}

// Why path fused cannot take this; nullptr: it can.
inline const char* obstacle_to_fused(const Machine& machine, const Forced& forced, const ShardedGemm& gemm) {
  constexpr int64_t kMost = int64_t{1} << 31;
  if (machine.slot_bytes == 0) return "it needs transport peer and two ranks or more";
  if (machine.arch < kFusedArch) return "it needs compute capability 9.0 (Hopper), this GPU is older";
  if (machine.arch > kFusedArch) return "it is written for compute capability 9.0 (Hopper), this GPU is newer";
  if (gemm.dtype != DType::BF16 && gemm.dtype != DType::F16) return "it multiplies bfloat16 and float16 only";
  if (gemm.M <= 0 || gemm.shared <= 0) return "there is nothing to multiply";
  if (gemm.M >= kMost || gemm.shared >= kMost) return "its sizes are below 2^31";
  if (gemm.shared % kFusedUnit != 0) {
    return gemm.shares_N() ? "it needs an N that is a multiple of 8" : "it needs a K that is a multiple of 8";
  }
  if (gemm.shared % sent_unit(gemm.codec) != 0) {
    if (gemm.codec == Codec::Fp16) {
      return gemm.shares_N() ? "codec fp16 needs an N that is a multiple of 512"
                             : "codec fp16 needs a K that is a multiple of 512";
    }
    return gemm.shares_N() ? "codecs int8 and fp8 need an N that is a multiple of 32"
                           : "codecs int8 and fp8 need a K that is a multiple of 32";
  }
  if (plan_fused(machine, forced, gemm).piece_rows == 0)
    return "not one row of every rank fits into a slot of the arena";
  return nullptr;
}

}  // namespace tpk::cuda
