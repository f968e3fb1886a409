// When path fused is taken, and how a call is cut then: pure functions, tested without a device.
#include "cuda/comm/choose_fused.h"

#include <set>

#include "expect.h"

using namespace tpk;
using namespace tpk::cuda;

namespace {

constexpr size_t kSlot = size_t{16} << 20;
constexpr Machine kHopper{8, 132, false, 90, kSlot};

Forced asked(int grid = 0, int blocks = 0) {
  Forced forced;
  forced.path = Path::Fused;
  forced.grid = grid;
  forced.blocks = blocks;
  return forced;
}

ShardedGemm large(Op op = Op::GemmReduceScatter) { return {op, DType::BF16, Codec::None, 8192, 4096}; }

std::string obstacle(const Machine& machine, const ShardedGemm& gemm) {
  const char* const found = obstacle_to_fused(machine, asked(), gemm);
  return found == nullptr ? "" : found;
}

GemmChoice choice_of(const Machine& machine, const Forced& forced, const ShardedGemm& gemm) {
  return choose_gemm(machine, forced, gemm, gemm.M / 8, static_cast<size_t>(gemm.shared) * 2);
}

}  // namespace

CASE(the_rule_never_takes_what_nobody_has_measured) {
  for (int64_t M : {128, 8192, 1 << 20}) {
    for (Op op : {Op::GemmReduceScatter, Op::GemmAllReduce, Op::AllGatherGemm, Op::AllGatherGemmBackward}) {
      ShardedGemm gemm = large(op);
      gemm.M = M;
      const GemmChoice choice = choice_of(kHopper, {}, gemm);
      EXPECT(!choice.fused && choice.obstacle == nullptr, M);
    }
  }
}

CASE(it_is_taken_where_it_is_asked_for_and_can_be) {
  for (Op op : {Op::GemmReduceScatter, Op::GemmAllReduce, Op::AllGatherGemm}) {
    for (DType dtype : {DType::BF16, DType::F16}) {
      ShardedGemm gemm = large(op);
      gemm.dtype = dtype;
      EXPECT(choice_of(kHopper, asked(), gemm).fused, name_of(op));
      for (Codec codec : {Codec::Fp16, Codec::Bf16, Codec::Int8, Codec::Fp8}) {
        gemm.codec = codec;
        EXPECT(choice_of(kHopper, asked(), gemm).fused, name_of(op), " ", name_of(codec));
        EXPECT(!choice_of(kHopper, {}, gemm).fused);
      }
    }
  }
}

CASE(what_cannot_be_fused_says_why_and_goes_in_parts) {
  const auto with = [](auto change) {
    ShardedGemm gemm = large();
    change(gemm);
    return gemm;
  };
  Machine ampere = kHopper, blackwell = kHopper, apart = kHopper, tiny = kHopper;
  ampere.arch = 80, blackwell.arch = 100, apart.slot_bytes = 0, tiny.slot_bytes = 8 * 4096 * 2 - 1;
  const std::vector<std::pair<Machine, ShardedGemm>> refused = {
      {ampere, large()},
      {blackwell, large()},
      {apart, large()},
      {tiny, large()},
      {kHopper, with([](ShardedGemm& g) { g.dtype = DType::F32; })},
      {kHopper, with([](ShardedGemm& g) { g.codec = Codec::Fp8, g.shared = 40, g.op = Op::AllGatherGemm; })},
      {kHopper, with([](ShardedGemm& g) { g.codec = Codec::Fp16, g.shared = 40, g.op = Op::AllGatherGemm; })},
      {kHopper, with([](ShardedGemm& g) { g.codec = Codec::Fp16, g.shared = 4096 + 256; })},
      {kHopper, with([](ShardedGemm& g) { g.codec = Codec::Int8, g.shared = 4096 + 24; })},
      {kHopper, with([](ShardedGemm& g) { g.M = 0; })},
      {kHopper, with([](ShardedGemm& g) { g.M = int64_t{1} << 31; })},
      {kHopper, with([](ShardedGemm& g) { g.shared = 4095; })},
      {kHopper, with([](ShardedGemm& g) { g.shared = 4095, g.op = Op::AllGatherGemm; })},
  };
  std::set<std::string> reasons;
  for (const auto& [machine, gemm] : refused) {
    const GemmChoice choice = choice_of(machine, asked(), gemm);
    EXPECT(!choice.fused && choice.obstacle != nullptr, gemm.shared);
    EXPECT(choice.parts == choice_of(machine, {}, gemm).parts, "what is left to do is the rule's");
    reasons.insert(choice.obstacle);
  }
  EXPECT(reasons.size() == refused.size(), reasons.size());
  EXPECT(obstacle(ampere, large()).find("older") != std::string::npos);
  EXPECT(obstacle(blackwell, large()).find("newer") != std::string::npos);
  EXPECT(obstacle(tiny, large()).find("slot") != std::string::npos);
}

CASE(a_backward_is_planned_as_its_dual) {
  const std::pair<Op, Op> kDuals[] = {{Op::GemmReduceScatterBackward, Op::AllGatherGemm},
                                      {Op::AllGatherGemmBackward, Op::GemmReduceScatter},
                                      {Op::ReplicatedGemmBackward, Op::GemmAllReduce}};
  for (const auto& [backward, dual] : kDuals) {
    EXPECT(fused_kind(backward) == fused_kind(dual), name_of(backward));
    const FusedPlan plan = plan_fused(kHopper, asked(), large(backward)),
                    other = plan_fused(kHopper, asked(), large(dual));
    EXPECT(plan.piece_rows == other.piece_rows && plan.tile_columns == other.tile_columns, name_of(backward));
    ShardedGemm odd = large(backward);
    odd.shared = 4095;
    const bool names_N = obstacle(kHopper, odd).find("an N") != std::string::npos;
    EXPECT(names_N == (backward == Op::GemmReduceScatterBackward), obstacle(kHopper, odd));
  }
}

CASE(what_each_rank_has_of_its_own_has_no_say) {
  // A rank's K of a reduction and its N of a gather are not even arguments; that the others are is enough to agree.
  EXPECT(plan_fused(kHopper, asked(), large(Op::AllGatherGemm)).tile_columns == 256);
  for (int rank_multiprocessors : {64, 132}) {
    Machine machine = kHopper;
    machine.multiprocessors = rank_multiprocessors;
    EXPECT(plan_fused(machine, asked(), large(Op::AllGatherGemm)).piece_rows ==
           plan_fused(kHopper, asked(), large(Op::AllGatherGemm)).piece_rows);
  }
}

CASE(pieces_fit_into_slots_and_signals) {
  for (size_t slot : {size_t{64} << 10, size_t{1} << 20, kSlot}) {
    for (int64_t shared : {8, 128, 4096, 28672}) {
      for (Op op : {Op::GemmReduceScatter, Op::AllGatherGemm}) {
        for (Codec codec : {Codec::None, Codec::Fp16, Codec::Int8, Codec::Fp8}) {
          const bool gathers = op == Op::AllGatherGemm;
          Machine machine = kHopper;
          machine.slot_bytes = slot;
          const FusedPlan plan = plan_fused(machine, asked(), {op, DType::BF16, codec, 1 << 16, shared});
          // A scale of 2 bytes or 1 for 32 values, up to 16 bytes.
          const size_t values = static_cast<size_t>(shared), scale = codec == Codec::Int8 ? 2 : 1;
          const bool packs = codec == Codec::Int8 || codec == Codec::Fp8;
          const size_t packed = values + (values / 32 * scale + 15) / 16 * 16;
          const size_t row = (packs ? packed : values * 2) * (gathers ? 1 : 8);
          EXPECT((plan.piece_rows > 0) == (row <= slot), shared, " ", slot);
          EXPECT(plan.piece_rows * row <= slot);
          const uint32_t across =
              divided_up(static_cast<uint32_t>(shared), gathers ? kGatherColumns : plan.tile_columns);
          EXPECT(divided_up(plan.piece_rows, kTileRows) * across <= static_cast<uint32_t>(kMaxTiles));
        }
      }
    }
  }
}

CASE(a_grid_is_no_larger_than_the_device_and_has_both_kinds_of_blocks) {
  for (int multiprocessors : {1, 2, 3, 132}) {
    for (int grid : {0, 2, 33, 1000}) {
      for (int blocks : {0, 1, 64}) {
        Machine machine = kHopper;
        machine.multiprocessors = multiprocessors;
        const FusedPlan plan = plan_fused(machine, asked(grid, blocks), large());
        EXPECT(plan.communicating >= 1 && plan.multiplying >= 1);
        EXPECT(plan.communicating + plan.multiplying <= std::max(multiprocessors, 2));
        if (grid > 0) EXPECT(plan.communicating + plan.multiplying <= grid);
        if (blocks > 0 && multiprocessors == 132 && grid == 0) EXPECT(plan.communicating == blocks);
      }
    }
  }
}

CASE(collectives_leave_path_fused_to_gemms) {
  const Choice plain = choose_all_reduce(kHopper, {}, DType::BF16, ReduceOp::Sum, Codec::None, 1 << 20);
  const Choice asked_for = choose_all_reduce(kHopper, asked(), DType::BF16, ReduceOp::Sum, Codec::None, 1 << 20);
  EXPECT(asked_for.path == plain.path);
  EXPECT(std::string(name_of(Path::Fused)) == "fused");
}
