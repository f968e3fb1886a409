// The collectives over peers against the CPU's wires, bit for bit: every dtype, reduction and codec, sizes that divide
// by nothing, any alignment, in place, from heaps, calls that follow each other without a wait, under many schedules.
#include "emu_steps.h"

using namespace tpk;
using namespace tpk::testing;

namespace {

struct Format {
  DType dtype;
  Codec codec;
  ReduceOp op;
};

// All that wire_of takes.
std::vector<Format> all_formats() {
  std::vector<Format> formats;
  for (int d = 0; d < static_cast<int>(DType::Raw1); ++d) {
    const DType dtype = static_cast<DType>(d);
    for (ReduceOp op : {ReduceOp::Sum, ReduceOp::Avg, ReduceOp::Max, ReduceOp::Min}) {
      if (op != ReduceOp::Avg || is_floating(dtype)) formats.push_back({dtype, Codec::None, op});
      for (int c = 1; c < static_cast<int>(Codec::Count); ++c) {
        const bool packs = dtype == DType::F32 || dtype == DType::BF16 || dtype == DType::F16;
        if (packs && op <= ReduceOp::Avg) formats.push_back({dtype, static_cast<Codec>(c), op});
      }
    }
  }
  return formats;
}

// Fewer and smaller under the race detector, which remembers every access.
bool is_slow() { return emu::detects_races(); }
size_t largest() { return is_slow() ? 600 : 5000; }

constexpr size_t kSizes[] = {0, 1, 7, 511, 513, 4097};
constexpr Kind kReductions[] = {Kind::OneShot, Kind::TwoShot, Kind::ReduceScatter};

size_t size_at(size_t i) { return std::min(kSizes[i % std::size(kSizes)], largest()); }

// A step of anything, from a number. Multicast apart: its sums have another order.
Step any_step(std::mt19937_64& random, int ranks) {
  static const std::vector<Format> formats = all_formats();
  const Format& format = formats[random() % formats.size()];
  Step step{.kind = static_cast<Kind>(random() % 5),
            .dtype = format.dtype,
            .codec = format.codec,
            .op = format.op,
            .n = random() % 2 == 0 ? size_at(random()) : random() % largest()};
  if (step.kind == Kind::Multicast) step.kind = Kind::TwoShot;
  if (step.kind == Kind::AllGather && step.codec == Codec::None && random() % 2 == 0) {
    step.dtype = static_cast<DType>(static_cast<int>(DType::Raw1) + static_cast<int>(random() % 5));
  }
  step.blocks = static_cast<int>(1 + random() % (ranks == 8 ? 2 : 4));
  if (random() % 3 == 0 && step.dtype != DType::Raw16) step.in_shift = random() % 5, step.out_shift = random() % 5;
  step.in_place = random() % 3 == 0;
  step.heap = static_cast<Heap>(random() % 4);
  if (step.dtype == DType::Raw16 && step.heap == Heap::Crooked) step.heap = Heap::All;
  step.uneven = random() % 2 == 0;
  step.seed = random() % 100000;
  step.packed = step.codec != Codec::None && !moves(step.kind) && step.seed % 3 == 0;
  if (step.packed) step.in_place = false, step.heap = Heap::None;
  return step;
}

}  // namespace

CASE(every_format_is_summed_to_the_bits_of_the_cpu) {
  configure(3, 0);
  size_t i = 0;
  for (const Format& format : all_formats()) {
    EmulatedGroup group(3);
    std::vector<Step> steps;
    for (Kind kind : kReductions) {
      steps.push_back({.kind = kind,
                       .dtype = format.dtype,
                       .codec = format.codec,
                       .op = format.op,
                       .n = std::min<size_t>(1100 + 37 * (i % 9), largest()),
                       .seed = ++i});
    }
    run_steps(group, steps);
    emu::reset();
  }
}

CASE(any_number_of_ranks_and_values) {
  size_t i = 0;
  for (int ranks : {2, 3, 4, 8}) {
    configure(ranks, 0);
    for (size_t n : kSizes) {
      EmulatedGroup group(ranks);
      std::vector<Step> steps;
      for (Kind kind : {Kind::OneShot, Kind::TwoShot, Kind::ReduceScatter, Kind::AllGather}) {
        for (Codec codec : {Codec::None, packing_codec(i)}) {
          const DType dtype = i % 2 == 0 ? DType::F32 : DType::BF16;
          steps.push_back({.kind = kind, .dtype = dtype, .codec = codec, .n = std::min(n, largest()), .seed = ++i});
        }
      }
      run_steps(group, steps);
      emu::reset();
    }
  }
}

CASE(parts_may_be_uneven_and_empty) {
  for (uint64_t seed = 1; seed <= 6; ++seed) {
    configure(4, seed);
    EmulatedGroup group(4);
    std::vector<Step> steps;
    for (Codec codec : {Codec::None, packing_codec(seed), packing_codec(seed + 1)}) {
      for (Kind kind : {Kind::ReduceScatter, Kind::AllGather}) {
        steps.push_back(
            {.kind = kind, .dtype = DType::BF16, .codec = codec, .n = largest() / 2, .uneven = true, .seed = seed});
      }
    }
    run_steps(group, steps);
    emu::reset();
  }
}

CASE(inputs_that_are_packed_already_are_summed_as_they_are) {
  size_t i = 0;
  for (int c = 1; c < static_cast<int>(Codec::Count); ++c) {
    configure(3, i % 3);
    EmulatedGroup group(3);
    std::vector<Step> steps;
    for (Kind kind : kReductions) {
      for (size_t n : {size_t{0}, size_t{1}, size_t{1100}, std::min<size_t>(3 * 512, largest())}) {
        steps.push_back({.kind = kind,
                         .dtype = std::array{DType::F32, DType::BF16, DType::F16}[i % 3],
                         .codec = static_cast<Codec>(c),
                         .n = n,
                         .in_shift = i % 4 == 3 ? i % 16 : 0,
                         .uneven = i % 2 == 0,
                         .seed = ++i,
                         .packed = true});
      }
    }
    run_steps(group, steps);
    emu::reset();
  }
}

CASE(inputs_are_read_from_heaps_when_all_lie_there_and_copied_when_not) {
  for (uint64_t seed = 0; seed < 4; ++seed) {
    configure(3, seed);
    EmulatedGroup group(3);
    std::vector<Step> steps;
    for (Heap heap : {Heap::All, Heap::Some, Heap::Crooked, Heap::None}) {
      for (Kind kind : {Kind::TwoShot, Kind::OneShot, Kind::ReduceScatter, Kind::AllGather}) {
        steps.push_back(
            {.kind = kind, .dtype = DType::F16, .n = 503, .heap = heap, .uneven = seed % 2 == 1, .seed = seed + 1});
      }
    }
    run_steps(group, steps);
    emu::reset();
  }
}

// The same place in every heap, read where it lies by one call after the other, with a copy over it behind each.
CASE(an_input_in_a_heap_may_be_overwritten_as_soon_as_its_call_is_over) {
  constexpr int kRanks = 3, kCalls = 5;
  constexpr size_t kCount = 384, kPart = kCount / kRanks, kBytes = kCount * 4;
  const Wire& wire = wire_of(DType::F32, Codec::None, ReduceOp::Sum);
  for (uint64_t seed = 0; seed < 6; ++seed) {
    configure(kRanks, seed);
    EmulatedGroup group(kRanks);
    DeviceCut cut{}, brought{};
    for (int r = 0; r < kRanks; ++r) cut.first[r] = static_cast<size_t>(r) * kPart, cut.count[r] = kPart;
    brought = cut;
    for (uint32_t& brings : brought.brings) brings = kPart;
    std::vector<Bytes> values[kCalls];  // of every call and rank
    std::vector<std::unique_ptr<DeviceBytes>> next[kCalls], out[kCalls];
    for (size_t i = 0; i < kCalls; ++i) {
      for (int r = 0; r < kRanks; ++r) {
        values[i].push_back(random_values(DType::F32, kCount, seed * 64 + i * 8 + static_cast<uint64_t>(r), true));
        next[i].push_back(std::make_unique<DeviceBytes>(r, values[i].back()));
        out[i].push_back(std::make_unique<DeviceBytes>(r, Bytes(i == 0 ? kPart * 4 : kBytes)));
      }
    }
    emu::run_ranks(kRanks, [&](int rank) {
      const size_t r = static_cast<size_t>(rank);
      const Peers peers = group.peers(rank);
      char* const heap = group.heap(rank);
      Call call{};  // at the start of the heap
      call.op = Op::AllReduce, call.dtype = DType::F32, call.numel = kCount;
      Call gather = call;
      gather.op = Op::AllGather, gather.brings = kPart;
      for (size_t i = 0; i < kCalls; ++i) {
        char* const to = i == 4 ? heap : out[i][r]->data();
        EXPECT(cudaMemcpyAsync(heap, next[i][r]->data(), kBytes, cudaMemcpyDeviceToDevice, nullptr) == cudaSuccess);
        EXPECT(cudaSuccess == (i == 0   ? launch_reduce_scatter(peers, call, heap, to, cut, 2, nullptr)
                               : i == 1 ? launch_all_gather(peers, gather, heap, to, brought, 2, nullptr)
                               : i == 3 || seed % 2 == 1 ? launch_one_shot(peers, call, heap, to, kCount, 2, nullptr)
                                                         : launch_two_shot(peers, call, heap, to, kCount, 2, nullptr)));
      }
      EXPECT(cudaDeviceSynchronize() == cudaSuccess);
    });
    expect_no_reports("heaps that are written over");
    Bytes gathered;
    for (const Bytes& whole : values[1]) gathered.insert(gathered.end(), whole.begin(), whole.begin() + kPart * 4);
    for (int rank = 0; rank < kRanks; ++rank) {
      const size_t r = static_cast<size_t>(rank);
      EXPECT(out[0][r]->values() == slice(reduced(wire, values[0]), r * kPart * 4, kPart * 4), "rank ", r);
      EXPECT(out[1][r]->values() == gathered && out[2][r]->values() == reduced(wire, values[2]), "rank ", r);
      EXPECT(out[3][r]->values() == reduced(wire, values[3]), "rank ", r);
      EXPECT(Bytes(group.heap(rank), group.heap(rank) + kBytes) == reduced(wire, values[4]), "rank ", r);
    }
    emu::reset();
  }
}

CASE(any_calls_in_a_row_under_any_schedule) {
  const uint64_t runs = is_slow() ? 24 : 80;
  for (uint64_t run = 1; run <= runs; ++run) {
    std::mt19937_64 random(run);
    const int ranks = is_slow() ? 2 + static_cast<int>(run % 3) : std::array{2, 3, 4, 8}[run % 4];
    configure(ranks, run);
    EmulatedGroup group(ranks, {.slot_bytes = size_t{512} << 10});  // the largest uneven part, once for each rank
    std::vector<Step> steps;
    for (int i = 0; i < 5; ++i) steps.push_back(any_step(random, ranks));
    run_steps(group, steps);
    emu::reset();
  }
}

// Blocks depend on the same-numbered blocks only, so a device that has room for fewer than the grid still gets through
// when all ranks take them in the same order.
CASE(a_device_with_room_for_the_grid_or_less_gets_through) {
  for (int room : {4, 2, 1}) {
    configure(3, 0, room);
    EmulatedGroup group(3);
    run_steps(group, {{.kind = Kind::TwoShot, .dtype = DType::F32, .n = 1000, .blocks = 4},
                      {.kind = Kind::OneShot, .dtype = DType::F32, .codec = Codec::Fp16, .n = 1000, .blocks = 4},
                      {.kind = Kind::ReduceScatter, .dtype = DType::F32, .n = 999, .blocks = 4},
                      {.kind = Kind::AllGather, .dtype = DType::F32, .n = 999, .blocks = 4}});
    emu::reset();
  }
  for (uint64_t seed = 1; seed <= 4; ++seed) {  // shuffled blocks need room for all
    configure(2, seed, 4);
    EmulatedGroup group(2);
    run_steps(group, {{.kind = Kind::TwoShot, .dtype = DType::F32, .n = 1000, .blocks = 4, .seed = seed},
                      {.kind = Kind::TwoShot, .dtype = DType::F32, .n = 1000, .blocks = 4, .seed = seed + 1}});
    emu::reset();
  }
}

CASE(two_groups_take_turns) {
  for (uint64_t seed = 0; seed < 4; ++seed) {
    configure(3, seed);
    EmulatedGroup wide(3), narrow(2, {.slot_bytes = 16 << 10});
    HeapPlan heap_of_wide, heap_of_narrow;
    std::vector<std::unique_ptr<PreparedStep>> steps;
    for (uint64_t i = 0; i < 6; ++i) {
      const Step step{
          .kind = i % 3 == 0 ? Kind::OneShot : Kind::TwoShot, .dtype = DType::F32, .n = 400 + i, .seed = seed + i};
      steps.push_back(i % 2 == 0 ? std::make_unique<PreparedStep>(wide, step, heap_of_wide)
                                 : std::make_unique<PreparedStep>(narrow, step, heap_of_narrow));
    }
    emu::run_ranks(3, [&](int rank) {
      for (size_t i = 0; i < steps.size(); ++i) {
        if (i % 2 == 0 || rank < 2) EXPECT(steps[i]->launch(rank, nullptr) == cudaSuccess);
      }
      EXPECT(cudaDeviceSynchronize() == cudaSuccess);
    });
    expect_no_reports("two groups");
    for (const auto& step : steps) step->check();
    emu::reset();
  }
}

// Whole numbers: the order of the switch's sums does not show in them.
CASE(the_switch_sums_what_the_ranks_bring) {
  for (DType dtype : {DType::F32, DType::BF16, DType::F16}) {
    for (size_t n : kSizes) {
      configure(3, n % 5);
      EmulatedGroup group(3, {.multicast = true});
      const size_t count = std::min(n, largest());
      Bytes input(count * size_of(dtype)), expected(input);
      for (size_t i = 0; i < count; ++i)
        put(dtype, input, i, static_cast<double>(i % 17) - 8),
            put(dtype, expected, i, 3.0 * (static_cast<double>(i % 17) - 8));
      std::vector<std::unique_ptr<DeviceBytes>> buffers;
      for (int r = 0; r < 3; ++r) buffers.push_back(std::make_unique<DeviceBytes>(r, input));
      emu::run_ranks(3, [&](int rank) {
        Call call{};
        call.op = Op::AllReduce, call.dtype = dtype, call.numel = count, call.heap_offset = kNotInHeap;
        char* const data = buffers[static_cast<size_t>(rank)]->data();
        EXPECT(launch_multicast(group.peers(rank), call, data, data, count, 3, nullptr) == cudaSuccess);
        EXPECT(cudaDeviceSynchronize() == cudaSuccess);
      });
      expect_no_reports("multicast");
      for (const auto& buffer : buffers) EXPECT(buffer->values() == expected, name_of(dtype), " n = ", count);
      emu::reset();
    }
  }
}

CASE(a_barrier_waits_for_all) {
  configure(4, 3);
  EmulatedGroup group(4);
  emu::run_ranks(4, [&](int rank) {
    Call call{};
    call.op = Op::Barrier, call.reduce_op = ReduceOp::None, call.heap_offset = kNotInHeap;
    for (int i = 0; i < 5; ++i) EXPECT(launch_barrier(group.peers(rank), call, nullptr) == cudaSuccess);
    EXPECT(cudaDeviceSynchronize() == cudaSuccess);
  });
  for (int r = 0; r < 4; ++r) EXPECT(group.signals(r).epoch == 5);
  expect_no_reports("barrier");
  emu::reset();
}

// Also for blocks that took no part in the calls before: their flags are those that the signals begin with.
CASE(counters_wrap_around) {
  // The epoch reaches a quarter, a half and the whole of its range: flags that count several steps a call overflow
  // earlier, and a distance of half the range has no sign.
  for (uint32_t start : {0x20000000u - 2, 0x40000000u - 2, 0x80000000u - 2, 0xc0000000u - 2, 0xfffffffcu}) {
    for (uint64_t seed : {1u, 2u}) {
      configure(2, seed);
      EmulatedGroup group(2);
      for (int r = 0; r < 2; ++r) group.signals(r).epoch = start;
      std::vector<Step> steps;
      for (uint64_t i = 0; i < 8; ++i) {
        const int blocks = i < 4 ? 1 : 8;
        const Heap heap = i % 3 == 0 ? Heap::None : Heap::Some;
        steps.push_back(
            {.kind = Kind::TwoShot, .dtype = DType::F32, .n = 4097, .blocks = blocks, .heap = heap, .seed = i + 1});
      }
      run_steps(group, steps);
      const uint32_t end = start + 8;
      EXPECT(group.signals(0).epoch == (end < start ? end + 2 : end));
      emu::reset();
    }
  }
}
