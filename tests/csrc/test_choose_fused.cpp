// When path fused is taken, and how a call is cut then: pure functions, tested without a device.
#include "cuda/comm/gemm_times.h"

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

GemmChoice choice_of(const Machine& machine, const Forced& forced, const ShardedGemm& gemm,
                     const MeasuredPaths& measured = {}) {
  return choose_gemm(machine, forced, gemm, measured);
}

// Eight GPUs of one host whose ranks have shards of one size.
Machine even(int ranks = 8) { return {ranks, 132, false, 90, size_t{64} << 20, 1, true}; }

// 8192 tokens, 8192 shared, as a rank of eight has of a projection of that width.
ShardedGemm layer(Op op, int64_t own, bool wants_w = false) {
  return {op, DType::BF16, Codec::None, 8192, 8192, own, wants_w};
}

constexpr Op kForward[] = {Op::GemmReduceScatter, Op::GemmAllReduce, Op::AllGatherGemm};
constexpr Op kBackward[] = {Op::GemmReduceScatterBackward, Op::AllGatherGemmBackward, Op::ReplicatedGemmBackward};

}  // namespace

CASE(the_rule_takes_it_where_products_and_transfer_take_as_long) {
  for (Op op : kForward) {
    EXPECT(choice_of(even(), {}, layer(op, 1024)).fused, name_of(op));
    EXPECT(!choice_of(even(), {}, layer(op, 64)).fused, name_of(op), ": nothing to hide behind");
    EXPECT(!choice_of(even(), {}, layer(op, 8192)).fused, name_of(op), ": a product of cuBLAS is faster");
    ShardedGemm few = layer(op, 1024);
    few.M = 64;
    EXPECT(!choice_of(even(), {}, few).fused, name_of(op), ": few rows");
  }
  for (Op op : kBackward) EXPECT(choice_of(even(), {}, layer(op, 1024)).fused, name_of(op));
  // The other way hides two transfers behind dx and dw: for weights that are frozen.
  EXPECT(!choice_of(even(), {}, layer(Op::AllGatherGemmBackward, 1024, true)).fused);
}

CASE(what_the_rule_expects_is_less_by_a_margin_and_says_so) {
  int taken = 0, left = 0;
  for (Op op : kForward) {
    for (int ranks : {2, 4, 8}) {
      for (int64_t M : {256, 2048, 8192, 32768}) {
        bool was_taken = false, was_left = false;
        for (int64_t own = 64; own <= 16384; own += 64) {
          ShardedGemm gemm = layer(op, own);
          gemm.M = M;
          const GemmChoice choice = choice_of(even(ranks), {}, gemm);
          EXPECT(choice.times.has_value());
          const GemmTimes times = *choice.times;
          EXPECT(std::isfinite(times.fused) && times.fused > 0 && times.unfused > 0 && !times.measured);
          EXPECT((choice.parts > 1) == std::isfinite(times.chunked), own);
          EXPECT(choice.fused == (times.fused < 0.9 * std::min(times.unfused, times.chunked)), own);
          was_left |= was_taken && !choice.fused;
          was_taken |= choice.fused;
          choice.fused ? ++taken : ++left;
        }
        EXPECT(!was_taken || was_left, "with enough products cuBLAS is faster");
      }
    }
  }
  EXPECT(taken > 0 && left > taken);
}

CASE(the_rule_compares_only_what_all_ranks_know) {
  const auto refused = [](const Machine& machine, const Forced& forced, const ShardedGemm& gemm) {
    const GemmChoice choice = choice_of(machine, forced, gemm);
    return !choice.fused && !choice.times && choice.obstacle != nullptr;
  };
  // Eleven heads of 128 over eight ranks: shards of two heads and of one. Measured or not, all choose alike.
  Machine uneven = even(), shared = even();
  uneven.even_shards = false, shared.sharing = 8;
  MeasuredPaths measured;
  measured.add(layer(Op::GemmReduceScatter, 256), {1, 1000});
  for (int64_t own : {0, 128, 256, 1024}) {
    for (Op op : kForward) {
      EXPECT(refused(uneven, {}, layer(op, own)), own);
      EXPECT(!choice_of(uneven, {}, layer(op, own), measured).fused, own);
      EXPECT(choice_of(uneven, {}, layer(op, own)).parts == choice_of(even(), {}, layer(op, 1024)).parts, own);
    }
  }
  Forced parts, path;
  parts.parts = 2, path.path = Path::TwoShot;
  for (Op op : kForward) {
    EXPECT(refused(shared, {}, layer(op, 1024)), name_of(op));
    EXPECT(refused(even(), {}, layer(op, 0)), name_of(op));
    EXPECT(refused(even(), parts, layer(op, 1024)), name_of(op));
    EXPECT(refused(even(), path, layer(op, 1024)), name_of(op));
    for (int arch : {80, 100, 120}) {
      Machine other = even();
      other.arch = arch;
      EXPECT(refused(other, {}, layer(op, 1024)), arch);
    }
  }
}

CASE(what_was_measured_overrules_what_is_expected) {
  for (Op op : kForward) {
    MeasuredPaths measured;
    measured.add(layer(op, 1024), {101, 100});
    measured.add(layer(op, 8192), {99, 100});
    const GemmChoice left = choice_of(even(), {}, layer(op, 1024), measured),
                     taken = choice_of(even(), {}, layer(op, 8192), measured);
    EXPECT(!left.fused && left.times->measured, name_of(op));
    EXPECT(taken.fused && taken.times->measured, name_of(op));
    // Nothing else: another size, dtype, codec, gradient or op.
    ShardedGemm other = layer(op, 1024);
    other.dtype = DType::F16;
    EXPECT(choice_of(even(), {}, other, measured).fused);
    EXPECT(choice_of(even(), {}, layer(op, 1032), measured).fused);
    EXPECT(!choice_of(even(), {}, layer(op, 8192, true), measured).times->measured);
    // Not what was asked for, and not what cannot be.
    EXPECT(choice_of(even(), asked(), layer(op, 1024), measured).fused);
    Machine ampere = even();
    ampere.arch = 80;
    EXPECT(!choice_of(ampere, {}, layer(op, 8192), measured).fused);
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
