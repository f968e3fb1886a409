// What a group of ranks does when one is late or says something else: a record that says who and what, in bounded time;
// after a disagreement the group goes on.
#include <functional>
#include <thread>

#include "emu_steps.h"

using namespace tpk;
using namespace tpk::cuda;
using namespace tpk::testing;

namespace {

constexpr Kind kKinds[] = {Kind::OneShot, Kind::TwoShot, Kind::ReduceScatter, Kind::AllGather};
constexpr uint32_t kLate = static_cast<uint32_t>(cuda::Failure::Late),
                   kMismatch = static_cast<uint32_t>(cuda::Failure::Mismatch);

uint32_t kind_of_call(const Call& call) { return kind_of(call.op, call.dtype, call.reduce_op, call.codec); }

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

// Launches a call that differs on rank 1 as `change` says; then the host takes the records, and the next call is right.
struct Disagreement {
  Kind kind;
  int blocks_of_one = 3;
  std::function<void(Call&)> change = [](Call&) {};
};

void check_disagreement(const Disagreement& that, uint64_t seed) {
  constexpr int kRanks = 3, kBlocks = 3;
  configure(kRanks, seed);
  EmulatedGroup group(kRanks);
  HeapPlan heap;
  const Step step{.kind = that.kind, .dtype = DType::F32, .n = 500, .blocks = kBlocks, .seed = seed + 1};
  run_steps(group, {step});
  const PreparedStep refused(group, step, heap);
  const auto outcomes = launch_on(kRanks, everybody, [&](int rank) {
    Call call = refused.call(rank);
    if (rank == 1) that.change(call);
    return refused.launch(rank, nullptr, call, rank == 1 ? that.blocks_of_one : kBlocks);
  });
  for (cudaError_t outcome : outcomes) EXPECT(outcome == cudaSuccess, "a refused call ends as any other");
  refused.check_untouched();
  for (int r = 0; r < kRanks; ++r) {
    FailureRecord& record = group.record(r);
    Call mine = refused.call(r), theirs = refused.call(r == 1 ? 0 : 1);
    that.change(r == 1 ? mine : theirs);
    EXPECT(record.failure == kMismatch && record.epoch == 2 && record.stage == 1, "rank ", r);
    EXPECT(record.kind == kind_of_call(mine) && record.numel == mine.numel);
    EXPECT(record.theirs.kind == kind_of_call(theirs) && record.theirs.numel == theirs.numel);
    EXPECT(record.theirs.shape_hash == theirs.shape_hash && record.theirs.flag == 2);
    EXPECT(group.signals(r).epoch == 2 && group.signals(r).finished == 0);
    record = {};
  }
  expect_no_reports("a disagreement");
  run_steps(group, {step, step});
  emu::reset();
}

// The arrival of rank 1 as rank 0 would see it, from a rank that then never goes on.
void pretend_to_announce(const EmulatedGroup& group, const Call& call, uint32_t plan, uint32_t epoch) {
  for (Announcement& at : group.signals(0).arrived[epoch & 1][1]) {
    at.kind = kind_of_call(call), at.numel = call.numel, at.shape_hash = call.shape_hash;
    at.plan = plan, at.brings = call.brings, at.heap_units = kNoUnits, at.flag = epoch;
  }
}

}  // namespace

// Some order of the blocks shows it: those that are resident on one rank wait for those that are not on another.
CASE(a_launch_of_more_blocks_than_a_device_holds_is_found) {
  size_t found = 0;
  for (uint64_t seed : {1, 2, 3}) {
    emu::Options options;
    options.ranks = 2, options.seed = seed, options.resident_blocks = 2, options.timeout_s = 0.5, options.loud = false;
    emu::configure(options);
    EmulatedGroup group(2);
    HeapPlan heap;
    const PreparedStep step(group, {.kind = Kind::TwoShot, .dtype = DType::F32, .n = 5000, .blocks = 8}, heap);
    launch_on(2, everybody, [&](int rank) { return step.launch(rank, nullptr); });
    found += emu::count(emu::Kind::Deadlock) > 0 ? 1 : 0;
    static_cast<void>(emu::take_reports());
    emu::reset();
  }
  EXPECT(found > 0);
}

CASE(a_rank_that_does_not_come_is_recorded_by_all_who_waited) {
  for (Kind kind : kKinds) {
    for (uint64_t seed : {0, 5}) {
      configure(3, seed);
      EmulatedGroup group(3, {.timeout_s = 0.3});
      HeapPlan heap;
      const Step step{.kind = kind, .dtype = DType::BF16, .n = 700, .blocks = 2};
      run_steps(group, {step, step});
      const PreparedStep late(group, step, heap);
      const auto outcomes =
          launch_on(3, [](int rank) { return rank != 1; }, [&](int rank) { return late.launch(rank, nullptr); });
      for (int r : {0, 2}) {
        const FailureRecord& record = group.record(r);
        EXPECT(outcomes[static_cast<size_t>(r)] == cudaErrorLaunchFailure, "the kernel of rank ", r,
               " did not end in a trap");
        EXPECT(record.failure == kLate && record.epoch == 3 && record.stage == 1, text_of(step));
        EXPECT(record.missing == 0b010, record.missing);
        EXPECT(record.last_seen[0] == 3 && record.last_seen[1] == 2 && record.last_seen[2] == 3);
        EXPECT(record.kind == kind_of_call(late.call(r)) && record.numel == 700);
        EXPECT(group.signals(r).epoch == 2, "a call that failed is not finished");
      }
      EXPECT(group.record(1).failure == 0);
      late.check_untouched();
      expect_no_reports("a late rank");
      emu::reset();
    }
  }
}

CASE(a_rank_that_stops_between_its_announcement_and_its_sums_is_recorded) {
  configure(2, 0);
  EmulatedGroup group(2, {.timeout_s = 0.3});
  HeapPlan heap;
  const PreparedStep step(group, {.kind = Kind::TwoShot, .dtype = DType::F32, .n = 256, .blocks = 1}, heap);
  std::memset(group.heap(1) - 2 * group.peers(0).slot_bytes, 0, 2 * group.peers(0).slot_bytes);
  const uint32_t threads = 64;  // 256 floats are 64 units
  pretend_to_announce(group, step.call(1), plan_of(Kernel::TwoShot, 1, threads), 1);
  const auto outcomes =
      launch_on(2, [](int rank) { return rank == 0; }, [&](int rank) { return step.launch(rank, nullptr); });
  EXPECT(outcomes[0] == cudaErrorLaunchFailure);
  const FailureRecord& record = group.record(0);
  EXPECT(record.failure == kLate && record.stage == 2 && record.missing == 0b10, record.failure, " at stage ",
         record.stage);
  EXPECT(record.last_seen[0] == 1 && record.last_seen[1] == 1);
  expect_no_reports("a rank that stops");
  emu::reset();
}

CASE(a_late_rank_that_comes_in_time_is_waited_for) {
  configure(2, 0);
  EmulatedGroup group(2, {.timeout_s = 20.0});
  HeapPlan heap;
  const PreparedStep step(group, {.kind = Kind::TwoShot, .dtype = DType::F32, .n = 300}, heap);
  emu::run_ranks(2, [&](int rank) {
    // Rank 1 launches only after the announcement of rank 0.
    const uint32_t* flag = &group.signals(1).arrived[1][0][0].flag;
    while (rank == 1 && __atomic_load_n(flag, __ATOMIC_ACQUIRE) == 0) std::this_thread::yield();
    EXPECT(step.launch(rank, nullptr) == cudaSuccess);
    EXPECT(cudaDeviceSynchronize() == cudaSuccess);
  });
  step.check();
  group.expect_no_failure();
  expect_no_reports("in time");
  emu::reset();
}

CASE(ranks_that_disagree_find_out_before_any_data_is_read) {
  uint64_t seed = 0;
  for (Kind kind : kKinds) {
    check_disagreement({.kind = kind, .change = [](Call& call) { call.numel += uint64_t{1} << 40; }}, ++seed);
    check_disagreement({.kind = kind, .change = [](Call& call) { call.shape_hash ^= 1; }}, ++seed);
    check_disagreement({.kind = kind, .change = [](Call& call) { call.op = Op::GemmAllReduce; }}, ++seed);
  }
  check_disagreement({.kind = Kind::TwoShot, .change = [](Call& call) { call.dtype = DType::I32; }}, ++seed);
  check_disagreement({.kind = Kind::OneShot, .change = [](Call& call) { call.reduce_op = ReduceOp::Max; }}, ++seed);
  check_disagreement({.kind = Kind::OneShot, .change = [](Call& call) { call.codec = Codec::Fp16; }}, ++seed);
}

// Blocks of a larger grid have no partner, and still find out.
CASE(ranks_that_cut_the_work_differently_find_out) {
  for (uint64_t seed : {0, 1, 2}) {
    for (int blocks : {1, 2, 5}) {
      for (Kind kind : kKinds) check_disagreement({.kind = kind, .blocks_of_one = blocks}, seed);
    }
  }
}

CASE(ranks_that_take_different_ways_find_out) {
  configure(2, 1);
  EmulatedGroup group(2);
  HeapPlan heap;
  Step step{.kind = Kind::OneShot, .dtype = DType::F32, .n = 300};
  const PreparedStep one(group, step, heap);
  step.kind = Kind::TwoShot;
  const PreparedStep two(group, step, heap);
  launch_on(2, everybody, [&](int rank) { return (rank == 0 ? one : two).launch(rank, nullptr); });
  for (int r = 0; r < 2; ++r) {
    EXPECT(group.record(r).failure == kMismatch && group.record(r).blamed == static_cast<uint32_t>(1 - r));
    EXPECT((group.record(r).theirs.plan & 0xffu) == static_cast<uint32_t>(r == 0 ? Kernel::TwoShot : Kernel::OneShot));
  }
  one.check_untouched(), two.check_untouched();
  expect_no_reports("different ways");
  emu::reset();
}

// The rank that brings too much knows it, too: all blame the same.
CASE(a_part_that_the_cut_does_not_give_is_refused_by_all) {
  configure(3, 2);
  EmulatedGroup group(3);
  HeapPlan heap;
  const PreparedStep gather(group, {.kind = Kind::AllGather, .dtype = DType::F32, .n = 300}, heap);
  launch_on(3, everybody, [&](int rank) {
    Call call = gather.call(rank);
    if (rank == 2) call.brings += 4;
    return gather.launch(rank, nullptr, call, 2);
  });
  for (int r = 0; r < 3; ++r) {
    EXPECT(group.record(r).failure == kMismatch && group.record(r).blamed == 2);
    EXPECT(group.record(r).theirs.brings == 104);
  }
  gather.check_untouched();
  expect_no_reports("a wrong part");
  emu::reset();
}

CASE(a_part_that_is_too_small_is_not_read_behind_its_end) {
  configure(2, 0);
  EmulatedGroup group(2);
  const std::vector<size_t> brought = {100, 20};
  DeviceCut cut{};
  std::vector<std::unique_ptr<DeviceBytes>> in, out;
  for (int r = 0; r < 2; ++r) {
    cut.first[r] = static_cast<size_t>(r) * 100, cut.count[r] = 100, cut.brings[r] = 100;
    in.push_back(std::make_unique<DeviceBytes>(r, Bytes(brought[static_cast<size_t>(r)] * 4)));
    out.push_back(std::make_unique<DeviceBytes>(r, Bytes(200 * 4)));
  }
  launch_on(2, everybody, [&](int rank) {
    const size_t r = static_cast<size_t>(rank);
    Call call{};
    call.op = Op::AllGather, call.numel = 200, call.heap_offset = kNotInHeap;
    call.brings = static_cast<uint32_t>(brought[r]);
    return launch_all_gather(group.peers(rank), call, in[r]->data(), out[r]->data(), cut, 2, nullptr);
  });
  for (int r = 0; r < 2; ++r) EXPECT(group.record(r).failure == kMismatch && group.record(r).blamed == 1);
  expect_no_reports("a part that is too small");
  emu::reset();
}

// Ranks that disagree about the size of a message launch different numbers of pieces; only the first one counts.
CASE(the_later_pieces_of_a_refused_call_do_nothing) {
  for (uint64_t seed : {0, 3}) {
    configure(2, seed);
    EmulatedGroup group(2);
    HeapPlan heap;
    const Step step{.kind = Kind::TwoShot, .dtype = DType::F32, .n = 400};
    const PreparedStep piece(group, step, heap);
    emu::run_ranks(2, [&](int rank) {
      for (uint32_t i = 0; i < (rank == 0 ? 4u : 2u); ++i) {
        Call call = piece.call(rank);
        call.numel = rank == 0 ? 1600 : 800, call.piece = i;
        EXPECT(piece.launch(rank, nullptr, call, 2) == cudaSuccess);
      }
      EXPECT(cudaDeviceSynchronize() == cudaSuccess);
    });
    for (int r = 0; r < 2; ++r) {
      EXPECT(group.signals(r).epoch == 1 && group.record(r).failure == kMismatch);
      EXPECT(group.record(r).theirs.numel == (r == 0 ? 800u : 1600u));
      group.record(r) = {};
    }
    piece.check_untouched();
    run_steps(group, {step});

    // Where all agree every piece counts.
    emu::run_ranks(2, [&](int rank) {
      for (uint32_t i = 0; i < 3; ++i) {
        Call call = piece.call(rank);
        call.numel = 1200, call.piece = i;
        EXPECT(piece.launch(rank, nullptr, call, 2) == cudaSuccess);
      }
      EXPECT(cudaDeviceSynchronize() == cudaSuccess);
    });
    EXPECT(group.signals(0).epoch == 5);
    piece.check();
    expect_no_reports("pieces");
    emu::reset();
  }
}

CASE(the_first_failure_stays_until_the_host_has_taken_it) {
  configure(2, 0);
  EmulatedGroup group(2);
  HeapPlan heap;
  const PreparedStep step(group, {.kind = Kind::OneShot, .dtype = DType::F32, .n = 100}, heap);
  for (uint64_t numel : {111, 222}) {
    launch_on(2, everybody, [&](int rank) {
      Call call = step.call(rank);
      if (rank == 1) call.numel = numel;
      return step.launch(rank, nullptr, call, 1);
    });
  }
  EXPECT(group.record(0).theirs.numel == 111 && group.record(0).epoch == 1);
  expect_no_reports("two failures");
  emu::reset();
}

CASE(what_does_not_fit_or_has_no_meaning_is_not_launched) {
  configure(2, 0);
  EmulatedGroup group(2, {.slot_bytes = 4096});
  const Peers peers = group.peers(0);
  Call call{};
  call.op = Op::AllReduce, call.heap_offset = kNotInHeap;
  DeviceCut cut{};
  cut.count[0] = 512, cut.count[1] = 513;
  char* const data = group.heap(0);
  const auto error = cudaErrorInvalidValue;
  EXPECT(launch_two_shot(peers, call, data, data, 1025, 1, nullptr) == error, "a slot and four bytes");
  EXPECT(launch_one_shot(peers, call, data, data, 1025, 1, nullptr) == error);
  EXPECT(launch_two_shot(peers, call, data, data, 1024, kMaxBlocks + 1, nullptr) == error);
  EXPECT(launch_two_shot(peers, call, data, data, 1024, 0, nullptr) == error);
  EXPECT(launch_multicast(peers, call, data, data, 1024, 1, nullptr) == error, "no switch");
  EXPECT(launch_reduce_scatter(peers, call, data, data, cut, 1, nullptr) == error,
         "513 and 513 values of a slot of 1024");
  call.codec = Codec::Fp16;
  EXPECT(launch_two_shot(peers, call, data, data, 2048, 1, nullptr) == error, "headers do not fit");
  call.reduce_op = ReduceOp::Max;
  EXPECT(launch_two_shot(peers, call, data, data, 100, 1, nullptr) == error);
  call.codec = Codec::None, call.reduce_op = ReduceOp::Avg, call.dtype = DType::I64;
  EXPECT(launch_one_shot(peers, call, data, data, 100, 1, nullptr) == error);
  EXPECT(group.signals(0).epoch == 0);
  emu::reset();
}
