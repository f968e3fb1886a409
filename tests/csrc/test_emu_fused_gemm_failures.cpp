// What a group does when a rank is late in a fused GEMM or says something else: a record that says who and what, in
// bounded time, no output touched; after a disagreement the group goes on.
#include <thread>

#include "emu_fused.h"
#include "emu_steps.h"

using namespace tpk;
using namespace tpk::cuda;
using namespace tpk::testing;

namespace {

constexpr Fused kKinds[] = {Fused::ReduceScatter, Fused::AllReduce, Fused::Gather};
constexpr size_t kSlot = size_t{256} << 10;
constexpr uint32_t kLate = static_cast<uint32_t>(cuda::Failure::Late),
                   kMismatch = static_cast<uint32_t>(cuda::Failure::Mismatch);

uint32_t kind_of_call(const Call& call) { return kind_of(call.op, call.dtype, call.reduce_op, call.codec); }

Gemm small(Fused kind, int ranks) {
  Gemm gemm{.kind = kind, .rows = {}, .N = 40, .K = 24};
  for (int r = 0; r < ranks; ++r) gemm.rows.push_back(20);
  return gemm;
}

// One launch on every rank for which `comes` holds, waited for; returns the error of the wait.
template <class Launch>
std::vector<cudaError_t> launch_on(int ranks, const std::function<bool(int)>& comes, Launch launch) {
  std::vector<cudaError_t> outcomes(static_cast<size_t>(ranks), cudaSuccess);
  emu::run_ranks(ranks, [&](int rank) {
    if (!comes(rank)) return;
    EXPECT(launch(rank) == cudaSuccess);
    outcomes[static_cast<size_t>(rank)] = cudaDeviceSynchronize();
  });
  return outcomes;
}
const auto everybody = [](int) { return true; };

// The announcement of rank 1 as rank 0 would see it, from a rank that then never goes on.
void pretend_to_announce(const EmulatedGroup& group, const PreparedGemm& gemm, Kernel kernel, uint32_t epoch) {
  const Call call = gemm.call(1);
  Announcement& at = group.signals(0).arrived[epoch & 1][1][0];
  at.kind = kind_of_call(call), at.numel = call.numel, at.shape_hash = call.shape_hash;
  at.plan = plan_of(kernel, kernel == Kernel::AllGatherGemm ? 0 : 1, gemm.all_rows()), at.brings = call.brings,
  at.heap_units = kNoUnits, at.flag = epoch;
}

// Rank 1 launches what `launch` says, the others the call as it is; all refuse, and the group goes on.
void check_refused(Fused kind, uint64_t seed, const std::function<cudaError_t(const PreparedGemm&)>& launch_of_one) {
  configure(3, seed);
  EmulatedGroup group(3, {.slot_bytes = kSlot});
  const Gemm gemm = small(kind, 3);
  run_gemms(group, {gemm});
  const PreparedGemm refused(group, gemm);
  const auto outcomes = launch_on(
      3, everybody, [&](int rank) { return rank == 1 ? launch_of_one(refused) : refused.launch(rank, nullptr); });
  for (cudaError_t outcome : outcomes) EXPECT(outcome == cudaSuccess, "a refused call ends as any other");
  refused.check_untouched();
  for (int r = 0; r < 3; ++r) {
    FailureRecord& record = group.record(r);
    EXPECT(record.failure == kMismatch && record.epoch == 2 && record.stage == 1, text_of(gemm), ": rank ", r);
    EXPECT(r == 1 ? record.blamed != 1 : record.blamed == 1, text_of(gemm), ": rank ", r, " blames ", record.blamed);
    EXPECT(group.signals(r).epoch == 2 && group.signals(r).finished == 0);
    EXPECT(group.signals(r).taken[0] == 0 && group.signals(r).taken[1] == 0);
    record = {};
  }
  expect_no_reports(text_of(gemm));
  run_gemms(group, {gemm, gemm});
  emu::reset();
}

}  // namespace

CASE(a_rank_that_does_not_come_is_recorded_by_all_who_waited) {
  for (Fused kind : kKinds) {
    configure(3, kind == Fused::Gather ? 5 : 0);
    EmulatedGroup group(3, {.slot_bytes = kSlot});
    const Gemm gemm = small(kind, 3);
    run_gemms(group, {gemm});
    group.wait_for(0.5);
    const PreparedGemm late(group, gemm);
    const auto outcomes =
        launch_on(3, [](int rank) { return rank != 1; }, [&](int rank) { return late.launch(rank, nullptr); });
    for (int r : {0, 2}) {
      const FailureRecord& record = group.record(r);
      EXPECT(outcomes[static_cast<size_t>(r)] == cudaErrorLaunchFailure, "the kernel of rank ", r, " did not trap");
      EXPECT(record.failure == kLate && record.epoch == 2 && record.stage == 1 && record.missing == 0b010);
      EXPECT(record.last_seen[0] == 2 && record.last_seen[1] == 1 && record.last_seen[2] == 2);
      EXPECT(record.kind == kind_of_call(late.call(r)) && record.numel == late.call(r).numel);
      EXPECT(group.signals(r).epoch == 1, "a call that failed is not finished");
    }
    EXPECT(group.record(1).failure == 0);
    late.check_untouched();
    expect_no_reports("a late rank");
    emu::reset();
  }
}

CASE(a_rank_that_stops_between_its_announcement_and_its_tiles_is_recorded) {
  constexpr Kernel kernels[] = {Kernel::GemmReduceScatter, Kernel::GemmAllReduce, Kernel::AllGatherGemm};
  const auto check = [&](const Gemm& stopped) {
    configure(2, 0);
    EmulatedGroup group(2, {.slot_bytes = kSlot, .timeout_s = 0.5});
    const PreparedGemm gemm(group, stopped);
    pretend_to_announce(group, gemm, kernels[static_cast<int>(stopped.kind)], 1);
    const auto outcomes =
        launch_on(2, [](int rank) { return rank == 0; }, [&](int rank) { return gemm.launch(rank, nullptr); });
    EXPECT(outcomes[0] == cudaErrorLaunchFailure);
    const FailureRecord& record = group.record(0);
    EXPECT(record.failure == kLate && record.stage == 2 && record.missing == 0b10, record.failure, " at stage ",
           record.stage, " without ", record.missing);
    EXPECT(record.last_seen[0] == 1 && record.last_seen[1] == 1);
    expect_no_reports("a rank that stops");
    emu::reset();
  };
  for (Fused kind : kKinds) check(small(kind, 2));
  Gemm coded = small(Fused::AllReduce, 2);  // which waits for several tiles at once
  coded.codec = Codec::Fp16, coded.N = 512;
  check(coded);
}

CASE(a_late_rank_that_comes_in_time_is_waited_for) {
  for (Fused kind : kKinds) {
    configure(2, 0);
    EmulatedGroup group(2, {.slot_bytes = kSlot});
    const PreparedGemm gemm(group, small(kind, 2));
    emu::run_ranks(2, [&](int rank) {
      // Rank 1 launches only after the announcement of rank 0.
      const uint32_t* flag = &group.signals(1).arrived[1][0][0].flag;
      while (rank == 1 && __atomic_load_n(flag, __ATOMIC_ACQUIRE) == 0) std::this_thread::yield();
      EXPECT(gemm.launch(rank, nullptr) == cudaSuccess);
      EXPECT(cudaDeviceSynchronize() == cudaSuccess);
    });
    gemm.check();
    group.expect_no_failure();
    expect_no_reports("in time");
    emu::reset();
  }
}

CASE(ranks_that_disagree_find_out_before_anything_is_read_or_written) {
  uint64_t seed = 0;
  for (Fused kind : kKinds) {
    const auto with = [&](const std::function<void(Call&)>& change) {
      check_refused(kind, ++seed, [&](const PreparedGemm& gemm) {
        Call call = gemm.call(1);
        change(call);
        return gemm.launch(1, nullptr, call, {1, 2});
      });
    };
    with([](Call& call) { call.numel += uint64_t{1} << 40; });
    with([](Call& call) { call.shape_hash ^= 1; });
    with([](Call& call) { call.dtype = DType::F16; });
    with([](Call& call) { call.codec = Codec::Bf16; });
  }
}

// The same call on all ranks, done in another way by one: other pieces, other tiles, another kernel.
CASE(ranks_that_cut_the_work_differently_find_out) {
  uint64_t seed = 0;
  for (Fused kind : kKinds) {
    const auto with = [&](uint32_t piece_rows, uint32_t tile_columns) {
      check_refused(kind, ++seed,
                    [&](const PreparedGemm& gemm) { return gemm.launch_cut(1, nullptr, piece_rows, tile_columns); });
    };
    with(8, 128);
    if (kind != Fused::Gather) with(0, 256);  // its tiles are each rank's own
  }
  check_refused(Fused::AllReduce, 1, [](const PreparedGemm& gemm) { return gemm.launch_as(Fused::ReduceScatter, 1); });
}

CASE(a_rank_in_another_collective_finds_out) {
  for (Fused kind : kKinds) {
    configure(2, 1);
    EmulatedGroup group(2, {.slot_bytes = kSlot});
    HeapPlan heap;
    const PreparedGemm gemm(group, small(kind, 2));
    const PreparedStep plain(group, {.kind = Kind::TwoShot, .dtype = DType::F32, .n = 300, .blocks = 3}, heap);
    launch_on(2, everybody,
              [&](int rank) { return rank == 0 ? gemm.launch(rank, nullptr) : plain.launch(rank, nullptr); });
    for (int r = 0; r < 2; ++r) {
      EXPECT(group.record(r).failure == kMismatch && group.record(r).blamed == static_cast<uint32_t>(1 - r));
      group.record(r) = {};
    }
    gemm.check_untouched(), plain.check_untouched();
    expect_no_reports("different collectives");
    run_gemms(group, {small(kind, 2)});
    emu::reset();
  }
}

// The rank that brings too little knows it, too: all blame the same, and nothing behind its end is read.
CASE(a_part_that_the_cut_does_not_give_is_refused_by_all) {
  configure(3, 2);
  EmulatedGroup group(3, {.slot_bytes = kSlot});
  const PreparedGemm gather(group, small(Fused::Gather, 3));
  launch_on(3, everybody, [&](int rank) {
    Call call = gather.call(rank);
    if (rank == 2) call.brings -= 24;
    return gather.launch(rank, nullptr, call, {1, 2});
  });
  for (int r = 0; r < 3; ++r) {
    EXPECT(group.record(r).failure == kMismatch && group.record(r).blamed == 2, "rank ", r);
    EXPECT(group.record(r).theirs.brings == 19 * 24);
  }
  gather.check_untouched();
  expect_no_reports("a wrong part");
  emu::reset();
}

CASE(the_later_pieces_of_a_refused_call_do_nothing) {
  configure(2, 3);
  EmulatedGroup group(2, {.slot_bytes = kSlot});
  for (Fused kind : kKinds) {
    Gemm gemm = small(kind, 2);
    gemm.piece_rows = 8;
    const PreparedGemm refused(group, gemm);
    const uint32_t before = group.signals(0).epoch;
    emu::run_ranks(2, [&](int rank) {
      for (uint32_t piece = 0; piece < (rank == 0 ? 3u : 2u); ++piece) {
        Call call = refused.call(rank, piece);
        if (rank == 0) call.numel *= 2;
        EXPECT(refused.launch(rank, nullptr, call, {1, 2}) == cudaSuccess);
      }
      EXPECT(cudaDeviceSynchronize() == cudaSuccess);
    });
    for (int r = 0; r < 2; ++r) {
      EXPECT(group.signals(r).epoch == before + 1 && group.record(r).failure == kMismatch);
      group.record(r) = {};
    }
    refused.check_untouched();
    run_gemms(group, {gemm});
    EXPECT(group.signals(0).epoch == before + 4, "where all agree every piece counts");
  }
  expect_no_reports("pieces");
  emu::reset();
}

CASE(what_does_not_fit_or_has_no_meaning_is_not_launched) {
  configure(2, 0);
  EmulatedGroup group(2, {.slot_bytes = 8192});
  const Peers peers = group.peers(0);
  const auto error = cudaErrorInvalidValue;
  char* const data = group.heap(0);
  const auto reduce = [&](auto change) {
    Call call{};
    call.op = Op::GemmReduceScatter, call.dtype = DType::BF16, call.heap_offset = kNotInHeap;
    GemmOperands gemm{};
    gemm.N = 32, gemm.K = 16, gemm.tile_columns = 128;
    RowCut cut{};
    cut.count[0] = 64, cut.count[1] = 64;
    FusedGrid grid{1, 1};
    char* y = data;
    change(call, gemm, cut, grid, y);
    return launch_gemm_reduce_scatter(peers, call, gemm, y, cut, grid, nullptr) == error &&
           launch_gemm_all_reduce(peers, call, gemm, y, cut, grid, nullptr) == error;
  };
  EXPECT(reduce([](auto&, auto&, RowCut& cut, auto&, auto&) { cut.count[1] = 65; }), "a slot and 64 bytes");
  EXPECT(reduce([](Call& call, auto&, auto&, auto&, auto&) { call.dtype = DType::F32; }));
  EXPECT(reduce([](Call& call, auto&, auto&, auto&, auto&) { call.codec = Codec::Fp16; }));
  EXPECT(reduce([](Call& call, auto&, auto&, auto&, auto&) { call.codec = Codec::Count; }));
  for (Codec codec : {Codec::Int8, Codec::Fp8}) {
    EXPECT(reduce([=](Call& call, GemmOperands& gemm, auto&, auto&, auto&) { call.codec = codec, gemm.N = 40; }));
    EXPECT(reduce([=](Call& call, auto&, RowCut& cut, auto&, auto&) { call.codec = codec, cut.count[1] = 86; }),
           "two ranks with 86 rows of 32 payloads and 16 bytes for scales are more than a slot");
  }
  EXPECT(reduce([](Call& call, auto&, auto&, auto&, auto&) { call.reduce_op = ReduceOp::Avg; }));
  EXPECT(reduce([](auto&, GemmOperands& gemm, auto&, auto&, auto&) { gemm.N = 28; }));
  EXPECT(reduce([](auto&, GemmOperands& gemm, auto&, auto&, auto&) { gemm.K = 12; }));
  EXPECT(reduce([](auto&, GemmOperands& gemm, auto&, auto&, auto&) { gemm.K = 0; }));
  EXPECT(reduce([](auto&, GemmOperands& gemm, auto&, auto&, auto&) { gemm.tile_columns = 64; }));
  EXPECT(reduce([](auto&, auto&, auto&, FusedGrid& grid, auto&) { grid.communicating = 0; }));
  EXPECT(reduce([](auto&, auto&, auto&, FusedGrid& grid, auto&) { grid.multiplying = 0; }));
  EXPECT(reduce([](auto&, auto&, auto&, auto&, char*& y) { y += 8; }));
  const auto gather = [&](size_t shift, uint64_t stride, uint32_t rows, Codec codec = Codec::None) {
    Call call{};
    call.op = Op::AllGatherGemm, call.dtype = DType::F16, call.reduce_op = ReduceOp::None, call.codec = codec;
    GemmOperands gemm{};
    gemm.N = 32, gemm.K = 16, gemm.tile_columns = 128;
    RowCut cut{};
    cut.count[0] = rows;
    return launch_all_gather_gemm(peers, call, data + shift, stride, data, gemm, data, cut, {1, 1}, nullptr) == error;
  };
  EXPECT(gather(8, 16, 64)), EXPECT(gather(0, 20, 64)), EXPECT(gather(0, 16, 257));
  EXPECT(gather(0, 16, 64, Codec::Int8), "a K of 16"), EXPECT(gather(0, 16, 257, Codec::Bf16));
  EXPECT(group.signals(0).epoch == 0);
  emu::reset();
}
