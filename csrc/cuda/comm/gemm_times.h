// Which path a sharded GEMM takes on a device: by what each was measured to take, else by what it is expected to take
// on a Hopper. Pure functions of numbers that are the same on all ranks, as in choose.h. Torch-free.
//
// The model counts, of each path, its products, what its links carry, and its launches and waits; what overlaps counts
// once. Its constants are figures that are public, or guesses; none is measured by us. Links are taken to be NVLink 4
// through a switch: over slower ones a fused GEMM would gain more than is expected here.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <map>
#include <mutex>
#include <optional>
#include <tuple>

#include "choose_fused.h"

namespace tpk::cuda {

// Microseconds. chunked: infinite where the rows are not cut.
struct GemmTimes {
  double fused, unfused, chunked = std::numeric_limits<double>::infinity();
  bool measured = false;

  double others() const { return std::min(unfused, chunked); }
};

namespace model {

// Of a multiprocessor, in operations a microsecond: the data sheet of H100 SXM5, 989.4 TFLOP/s of dense bf16 or fp16 on
// 132 of them. H200 has the same.
constexpr double kTensorRate = 989.4e6 / 132;
// Published rates of cuBLAS at large sizes are 0.7 to 0.8 of that (power limits the rest). Ours has neither clusters
// nor two tiles in turn: 5 to 15 % less where published kernels compare the two, and more with half the columns, which
// load 1.3 times as much from the second-level cache for a product.
constexpr double kShareOfVendor = 0.75, kShareOfWide = 0.66, kShareOfNarrow = 0.55;
// Bytes a microsecond. Memory: HBM3 of H100 SXM5, 3.35 TB/s (H200: 4.8). Link: NVLink 4, 450 GB/s each way, of which
// NCCL's large collectives reach 0.8.
constexpr double kMemoryRate = 3.35e6, kLinkRate = 0.8 * 450e3;
// Of a block that sums: 32 KiB of loads on their way to peers (choose.h) for the 2 us that such a load takes. Of one
// that copies, for path fused or another: 64 KiB (vector.cuh, tile_moves.cuh).
constexpr double kSumRate = 32768 / 2.0, kCopyRate = 65536 / 2.3;
// Of a multiplying block that rounds a tile and stages it, while its tensor cores wait: 64 KiB in 1 us. A guess.
constexpr double kTileStoreRate = 65536;
// What a launch takes beside the kernel before it, a wait of all ranks for each other, and what orders two streams.
// Guesses, from published latencies of such kernels.
constexpr double kLaunch = 3, kWait = 3, kEvents = 4;
// Blocks that multiply and those that move are at different tiles, so that of product and transfer the shorter one is
// hidden but for this. A guess.
constexpr double kNotHidden = 0.15;
// How much less than the others path fused must be expected to take.
constexpr double kMargin = 0.9;

struct Estimate {
  const Machine& machine;
  const Forced& forced;
  const ShardedGemm& gemm;

  double ranks() const { return machine.world_size; }
  double share_of_others() const { return (ranks() - 1) / ranks(); }
  double row_bytes() const { return static_cast<double>(sent_row_bytes(gemm.codec, shared())); }
  uint32_t shared() const { return static_cast<uint32_t>(gemm.shared); }

  // Of so many rows, by cuBLAS.
  double product(double rows, bool beside = false) const {
    const double own = static_cast<double>(gemm.own), all = static_cast<double>(gemm.shared);
    const double blocks = beside ? multiprocessors_beside(machine, forced) : machine.multiprocessors;
    const double bytes = 2 * (rows * own + rows * all + own * all);
    return kLaunch +
           std::max(2 * rows * own * all / (std::max(blocks, 1.0) * kTensorRate * kShareOfVendor), bytes / kMemoryRate);
  }

  // A gather, or a sum, of so many rows over all ranks.
  double collective(FusedKind kind, double rows, bool beside = false) const {
    const double bytes = rows * row_bytes(), slot = static_cast<double>(machine.slot_bytes);
    const auto whole = static_cast<size_t>(bytes);
    double moved = share_of_others() * bytes, waits = 1, slots = bytes;
    if (kind == FusedKind::AllReduce) {
      const Path path = choose_all_reduce(machine, forced, gemm.dtype, ReduceOp::Sum, gemm.codec, whole, beside).path;
      waits = path == Path::OneShot ? 1 : 2;
      moved = path == Path::OneShot     ? (ranks() - 1) * bytes
              : path == Path::Multicast ? bytes + bytes / ranks()
                                        : 2 * moved;
    } else if (kind == FusedKind::Gather) {
      slots = bytes / ranks();
    }
    const double pieces = std::max(std::ceil(slots / slot), 1.0);
    const double of_block = kind == FusedKind::Gather ? kCopyRate : kSumRate;
    const double rate = std::min(kLinkRate, choose_blocks(machine, forced, whole, beside) * of_block);
    return moved / rate + pieces * (kLaunch + waits * kWait);
  }

  double fused() const {
    const FusedPlan plan = plan_fused(machine, forced, gemm);
    const uint32_t part = divided_up(static_cast<uint32_t>(gemm.M), static_cast<uint32_t>(machine.world_size));
    const uint32_t rows = std::min(part, plan.piece_rows),
                   N = gemm.gathers() ? static_cast<uint32_t>(gemm.own) : shared();
    const double K = gemm.gathers() ? static_cast<double>(shared()) : static_cast<double>(gemm.own);
    const double tiles = ranks() * divided_up(rows, kTileRows) * divided_up(N, plan.tile_columns);
    const double share = plan.tile_columns == 256 ? kShareOfWide : kShareOfNarrow;
    const double values = double{kTileRows} * plan.tile_columns;
    const double tile = 2 * values * K / (kTensorRate * share) + 2 * values / kTileStoreRate;
    const double products = std::max(std::ceil(tiles / plan.multiplying) * tile, product(ranks() * rows) - kLaunch);

    const double there = share_of_others() * ranks() * rows * row_bytes();  // out of this rank, or into it
    const double brought = there / std::min(kLinkRate, plan.communicating * kCopyRate);
    const FusedKind kind = fused_kind(gemm.op);
    const double moves = kind == FusedKind::Gather          ? brought
                         : kind == FusedKind::ReduceScatter ? there / kLinkRate
                                                            : there / kLinkRate + brought;
    // The last tile, or of a gather the first rows, have nothing beside them.
    const double alone = kind == FusedKind::Gather ? 0 : tile;
    const double piece =
        std::max(products, moves) + kNotHidden * std::min(products, moves) + alone + kLaunch + 3 * kWait;
    return divided_up(part, plan.piece_rows) * piece;
  }
};

}  // namespace model

// Rows that would be cut into parts: a product is made for each rank's rows of a part where those are sent apart.
inline int64_t rows_to_cut(const Machine& machine, const ShardedGemm& gemm) {
  return fused_kind(gemm.op) == FusedKind::AllReduce ? gemm.M : gemm.M / machine.world_size;
}

// Only of what path fused can take (obstacle_to_fused). parts: choose_parts of this.
inline GemmTimes expected_times(const Machine& machine, const Forced& forced, const ShardedGemm& gemm, int parts) {
  const model::Estimate call{machine, forced, gemm};
  const FusedKind kind = fused_kind(gemm.op);
  const auto M = static_cast<double>(gemm.M);
  const double product = call.product(M), moves = call.collective(kind, M);
  if (gemm.op == Op::ReplicatedGemmBackward || gemm.op == Op::AllGatherGemmBackward) {
    // dx and then its sum; where dw is wanted, which takes as long as dx, beside that. x is gathered beside dx.
    if (!gemm.wants_w) return {call.fused(), product + moves + model::kEvents};
    const double beside = call.product(M, true), sum = call.collective(kind, M, true);
    if (gemm.op == Op::ReplicatedGemmBackward) {
      return {call.fused() + product, product + std::max(sum, beside) + model::kEvents};
    }
    const double gather = call.collective(FusedKind::Gather, M, true);
    return {call.fused() + call.collective(FusedKind::Gather, M) + product,
            std::max(gather, beside) + std::max(sum, beside) + 2 * model::kEvents};
  }
  GemmTimes times{call.fused(), product + moves};
  if (parts > 1) {
    // Of the first product of a sum, and of the last one of a gather, nothing is sent beside.
    const double rows = M / parts, alone = call.product(rows), sent = call.collective(kind, rows, true);
    const double both = std::max(call.product(rows, true), sent);
    times.chunked = alone + (parts - 1) * both + sent + parts * model::kEvents;
  }
  return times;
}

// Times of paths, of calls that were measured; the same on all ranks. They overrule the model.
class MeasuredPaths {
 public:
  void add(const ShardedGemm& gemm, GemmTimes times) {
    std::lock_guard<std::mutex> lock(mutex_);
    times.measured = true;
    times_[key(gemm)] = times;
    any_ = true;
  }
  std::optional<GemmTimes> find(const ShardedGemm& gemm) const {
    if (!any_) return {};  // most groups have measured nothing: no lock for them
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = times_.find(key(gemm));
    return found == times_.end() ? std::nullopt : std::optional<GemmTimes>(found->second);
  }

 private:
  using Key = std::tuple<Op, DType, Codec, int64_t, int64_t, int64_t, bool>;
  static Key key(const ShardedGemm& g) { return {g.op, g.dtype, g.codec, g.M, g.shared, g.own, g.wants_w}; }

  mutable std::mutex mutex_;
  std::map<Key, GemmTimes> times_;
  std::atomic<bool> any_{false};
};

struct GemmChoice {
  bool fused;
  int parts;  // of the rows, where it is not fused; 1: unfused
  const char* reason;
  const char* obstacle;            // why it cannot be fused, or why the rule does not compare; nullptr: neither
  std::optional<GemmTimes> times;  // where the rule has compared them
};

// Why the rule has nothing to compare; nullptr: it has.
inline const char* obstacle_to_rule(const Machine& machine, const Forced& forced, const ShardedGemm& gemm) {
  if (forced.path != Path::Rule || forced.parts > 0) return "another way was asked for";
  if (machine.sharing > 1) return "several ranks are on one GPU";
  if (!machine.even_shards || gemm.own <= 0) return "shards of the ranks are not known to be of one size";
  return nullptr;
}

inline GemmChoice choose_gemm(const Machine& machine, const Forced& forced, const ShardedGemm& gemm,
                              const MeasuredPaths& measured) {
  const auto row_bytes = static_cast<size_t>(std::max<int64_t>(gemm.shared, 0)) * size_of(gemm.dtype);
  const PartsChoice parts = choose_parts(machine, forced, rows_to_cut(machine, gemm), row_bytes);
  GemmChoice choice{false, parts.parts, parts.reason, obstacle_to_fused(machine, forced, gemm), {}};
  if (choice.obstacle != nullptr) return choice;
  if (forced.path == Path::Fused) return {true, 1, "as asked for", nullptr, {}};
  choice.obstacle = obstacle_to_rule(machine, forced, gemm);
  if (choice.obstacle != nullptr) return choice;
  choice.times = measured.find(gemm);
  if (!choice.times) choice.times = expected_times(machine, forced, gemm, parts.parts);
  // What was measured needs no margin.
  const double most = choice.times->others() * (choice.times->measured ? 1 : model::kMargin);
  choice.fused = choice.times->fused < most;
  if (choice.fused) choice.reason = "rule: it takes the least time";
  return choice;
}

}  // namespace tpk::cuda
