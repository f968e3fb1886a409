// The host side of the CUDA backend on emulated devices: pieces, streams, pipelines, failures, every transport.
#include "emu_host.h"

using namespace tpk;
using namespace tpk::testing;
using cuda::Forced;
using cuda::Path;
using cuda::Stretch;

namespace {

constexpr int kRanks = 3;

size_t scaled(size_t n) { return emu::detects_races() ? n / 16 : n; }
float input(int rank, size_t i) { return static_cast<float>((i * 7 + static_cast<size_t>(rank) * 3) % 101); }
float total(size_t i) {
  float sum = 0;
  for (int r = 0; r < kRanks; ++r) sum += input(r, i);
  return sum;
}

void all_reduce(DeviceCommunicator& comm, const Floats& in, const Floats& out, Codec codec = Codec::None) {
  const Wire& wire = sum_of_floats(codec);
  comm.all_reduce(spec_of(Op::AllReduce, wire, in.size()), wire, in.data(), out.data(), in.size());
}

void expect_total(const Floats& out, const std::string& what) {
  wait();
  for (size_t i = 0; i < out.size(); ++i) EXPECT(out[i] == total(i), what, ": value ", i, " is ", out[i]);
}

// Every collective, whatever the transport: values in whole numbers, so that every sum is exact.
void try_all(int rank, DeviceCommunicator& comm, size_t n, const std::string& what) {
  const Floats x(n, [&](size_t i) { return input(rank, i); });
  const Floats sum(n);
  all_reduce(comm, x, sum);
  expect_total(sum, what + ", all_reduce");

  const Wire& wire = sum_of_floats();
  const Cut cut = Cut::even(n, kRanks);
  const Floats part(cut.size(rank)), whole(n);
  comm.reduce_scatter(spec_of(Op::ReduceScatter, wire, n), wire, x.data(), part.data(), cut);
  comm.all_gather(spec_of(Op::AllGather, wire, n, static_cast<int64_t>(part.size())), wire, part.data(), whole.data(),
                  cut);
  expect_total(whole, what + ", reduce_scatter and all_gather");
}

}  // namespace

CASE(messages_larger_than_a_slot_travel_in_pieces_by_every_path) {
  for (Path path : {Path::OneShot, Path::TwoShot}) {
    for (size_t n : {size_t{0}, size_t{5}, scaled(12288), scaled(40001)}) {
      set_up(kRanks, n);
      const auto comms = peers(kRanks);
      on_ranks(comms, [&](int rank, PeerCommunicator& comm) {
        comm.force({path, 2, 0});
        try_all(rank, comm, n, concat(name_of(path), " of ", n));
        comm.check();
      });
      emu::reset();
    }
  }
}

CASE(no_more_blocks_are_launched_than_a_device_holds) {
  for (uint64_t seed : {1, 2, 3}) {
    set_up(kRanks, seed, 3);
    const auto comms = peers(kRanks);
    on_ranks(comms, [&](int rank, PeerCommunicator& comm) {
      comm.force({Path::TwoShot, 16, 0});
      try_all(rank, comm, scaled(40001), "blocks of a small device");
      comm.check();
    });
    emu::reset();
  }
}

// Path fused of one rank is a product and nothing else, which the bench compares with that of the vendor.
CASE(one_rank_alone_may_have_an_arena) {
  set_up(1);
  on_ranks(peers(1), [&](int, PeerCommunicator& comm) {
    const cuda::ShardedGemm gemm{Op::GemmReduceScatter, DType::BF16, Codec::None, 64, 64};
    EXPECT(cuda::choose_gemm(comm.machine(), {Path::Fused, 0, 0, 0}, gemm, {}).fused);
  });
  emu::reset();
}

CASE(an_arena_of_the_usual_size_has_slots_for_whole_waves_of_tiles) {
  const cuda::DeviceArena arena = cuda::DeviceArena::of(size_t{256} << 20);
  EXPECT(arena.slot_bytes == size_t{64} << 20 && arena.heap_bytes() >= size_t{127} << 20);  // waves: test_tiles
}

CASE(inputs_in_the_heap_give_the_same_sums) {
  set_up(kRanks);
  const auto comms = peers(kRanks);
  const size_t n = scaled(12000);
  on_ranks(comms, [&](int rank, PeerCommunicator& comm) {
    float* const heap = static_cast<float*>(comm.heap_allocate(n * sizeof(float)));
    EXPECT(heap != nullptr);
    const Floats out(n);
    for (int time = 0; time < 3; ++time) {
      for (size_t i = 0; i < n; ++i) heap[i] = input(rank, i);  // no rank may still be reading
      const Wire& wire = sum_of_floats();
      comm.all_reduce(spec_of(Op::AllReduce, wire, n), wire, heap, out.data(), n);
      expect_total(out, "heap");
    }
    comm.heap_free(heap);
    EXPECT(comm.heap_allocate(comm.heap_bytes() + 1) == nullptr);
  });
  emu::reset();
}

CASE(calls_on_different_streams_run_in_the_order_they_were_made) {
  for (uint64_t seed : {0, 1, 2}) {
    set_up(kRanks, seed);
    const auto comms = peers(kRanks);
    on_ranks(comms, [&](int, PeerCommunicator& comm) {
      const Floats x(1000, [](size_t) { return 1.0f; });
      const cudaStream_t streams[] = {cuda::current_stream(), new_stream()};
      float expected = 1;
      for (int i = 0; i < 6; ++i, expected *= kRanks) {
        const StreamScope scope(streams[i % 2]);
        all_reduce(comm, x, x);
      }
      comm.check();
      for (size_t i = 0; i < x.size(); ++i) EXPECT(x[i] == expected, i, " is ", x[i]);
    });
    emu::reset();
  }
}

CASE(a_part_is_sent_when_it_has_been_produced_and_no_earlier) {
  for (int parts : {1, 2, 5}) {
    set_up(kRanks, static_cast<uint64_t>(parts));
    const auto comms = peers(kRanks);
    const size_t n = scaled(20000);
    on_ranks(comms, [&](int rank, PeerCommunicator& comm) {
      const Floats source(n, [&](size_t i) { return input(rank, i); });
      const Floats product(n), out(n), after(n);
      const auto start = [&](int i) { return n * static_cast<size_t>(i) / static_cast<size_t>(parts); };
      const Wire& wire = sum_of_floats();
      comm.produce_and_send(
          Op::GemmAllReduce, parts,
          [&](int i) { copy_on_stream(source.data() + start(i), product.data() + start(i), start(i + 1) - start(i)); },
          [&](int i) {
            comm.send_all_reduce(spec_of(Op::GemmAllReduce, wire, n), wire, product.data() + start(i),
                                 out.data() + start(i), start(i + 1) - start(i));
          });
      copy_on_stream(out.data(), after.data(), n);  // the caller's stream has waited for the last part
      expect_total(after, concat(parts, " parts"));
      EXPECT(comm.stats()[static_cast<size_t>(Op::GemmAllReduce)].calls == 1, "parts count as one call");
    });
    emu::reset();
  }
}

CASE(a_product_on_another_stream_waits_until_peers_have_read_the_one_before) {
  for (int parts : {1, 2}) {
    set_up(kRanks, 6);
    const auto comms = peers(kRanks);
    const size_t n = scaled(4000);
    on_ranks(comms, [&](int rank, PeerCommunicator& comm) {
      constexpr size_t kCalls = 6;
      float* const product = static_cast<float*>(comm.heap_allocate(n * sizeof(float)));  // the same for all calls
      std::vector<Floats> sources, sums;
      for (size_t call = 0; call < kCalls; ++call) {
        sources.emplace_back(n, [&](size_t i) { return input(rank, i + call); });
        sums.emplace_back(n);
      }
      const Wire& wire = sum_of_floats();
      const cudaStream_t streams[] = {cuda::current_stream(), new_stream()};
      const auto start = [&](int i) { return n * static_cast<size_t>(i) / static_cast<size_t>(parts); };
      for (size_t call = 0; call < kCalls; ++call) {
        const StreamScope scope(streams[call % 2]);
        comm.produce_and_send(
            Op::GemmAllReduce, parts,
            [&](int i) {
              copy_on_stream(sources[call].data() + start(i), product + start(i), start(i + 1) - start(i));
            },
            [&](int i) {
              comm.send_all_reduce(spec_of(Op::GemmAllReduce, wire, n), wire, product + start(i),
                                   sums[call].data() + start(i), start(i + 1) - start(i));
            });
      }
      comm.check();
      for (size_t call = 0; call < kCalls; ++call) {
        for (size_t i = 0; i < n; ++i) EXPECT(sums[call][i] == total(i + call), "call ", call, ", value ", i);
      }
    });
    emu::reset();
  }
}

CASE(a_part_is_consumed_when_it_has_arrived_and_no_earlier) {
  for (int parts : {1, 2, 4}) {
    set_up(kRanks, static_cast<uint64_t>(parts));
    const auto comms = peers(kRanks);
    const size_t n = scaled(30001);
    on_ranks(comms, [&](int rank, PeerCommunicator& comm) {
      const Cut cut = Cut::even(n, kRanks);
      const Floats shard(cut.size(rank), [&](size_t i) { return input(0, cut.start(rank) + i); });
      const Floats whole(n), consumed(n);
      const Wire& wire = sum_of_floats();
      const auto stretch = [&](int part) {
        Stretch found = Stretch::all(cut);
        for (int r = 0; r < kRanks; ++r) {
          const size_t size = cut.size(r), count = static_cast<size_t>(parts), p = static_cast<size_t>(part);
          found.begin[static_cast<size_t>(r)] = size * p / count;
          found.end[static_cast<size_t>(r)] = size * (p + 1) / count;
        }
        return found;
      };
      comm.receive_and_consume(
          Op::AllGatherGemm, parts,
          [&](int i) {
            comm.send_all_gather(spec_of(Op::AllGatherGemm, wire, n, static_cast<int64_t>(shard.size())), wire,
                                 shard.data(), whole.data(), cut, stretch(i));
          },
          [&](int i) {
            const Stretch here = stretch(i);
            for (int r = 0; r < kRanks; ++r) {
              const size_t at = cut.start(r) + here.begin[static_cast<size_t>(r)];
              copy_on_stream(whole.data() + at, consumed.data() + at, here.size(r));
            }
          });
      wait();
      for (size_t i = 0; i < n; ++i) EXPECT(consumed[i] == input(0, i), parts, " parts: value ", i);
    });
    emu::reset();
  }
}

CASE(what_is_done_beside_a_call_runs_while_it_travels) {
  set_up(kRanks, 4);
  const auto comms = peers(kRanks);
  const size_t n = scaled(20000);
  on_ranks(comms, [&](int rank, PeerCommunicator& comm) {
    const Floats x(n, [&](size_t i) { return input(rank, i); }), other(n, [](size_t i) { return input(1, i); });
    const Floats copied(n);
    const Wire& wire = sum_of_floats();
    comm.all_reduce_beside(spec_of(Op::ReplicatedGemmBackward, wire, n), wire, x.data(), n,
                           [&] { copy_on_stream(other.data(), copied.data(), n); });
    expect_total(x, "beside");
    for (size_t i = 0; i < n; ++i) EXPECT(copied[i] == input(1, i), "beside it: value ", i);
  });
  emu::reset();
}

CASE(ranks_tell_each_other_numbers_and_meet) {
  set_up(kRanks);
  const auto comms = peers(kRanks);
  on_ranks(comms, [&](int rank, PeerCommunicator& comm) {
    const std::vector<int64_t> expected{100, 101, 102};
    for (int time = 0; time < 2; ++time) EXPECT(comm.exchange(Op::Sizes, 100 + rank) == expected);
    comm.exchange(Op::Barrier, 0);
  });
  emu::reset();
}

CASE(a_disagreement_is_told_to_every_rank_whatever_the_number_of_pieces_and_the_group_goes_on) {
  for (size_t step : {size_t{1}, scaled(30000)}) {
    set_up(kRanks, 5);
    const auto comms = peers(kRanks);
    on_ranks(comms, [&](int rank, PeerCommunicator& comm) {
      const Floats x(100 + step * static_cast<size_t>(rank), [](size_t) { return 1.0f; }), out(x.size());
      all_reduce(comm, x, out);
      const std::string text = error_of<RankMismatch>([&] { comm.check(); });
      EXPECT(text.find("the ranks disagree: rank") != std::string::npos, text);
      EXPECT(text.find(concat("all_reduce(", x.size(), " values of float32")) != std::string::npos, text);
      comm.check();  // raised once
      try_all(rank, comm, 1000, "after a mismatch");
    });
    emu::reset();
  }
}

CASE(a_disagreement_that_nobody_checked_for_comes_with_the_next_call_which_is_made_all_the_same) {
  set_up(kRanks);
  const auto comms = peers(kRanks);
  on_ranks(comms, [&](int rank, PeerCommunicator& comm) {
    const Floats x(10 + static_cast<size_t>(rank), [](size_t) { return 1.0f; }), out(x.size());
    all_reduce(comm, x, out);
    wait();
    const Floats y(50, [&](size_t i) { return input(rank, i); }), sum(50);
    error_of<RankMismatch>([&] { all_reduce(comm, y, sum); });
    expect_total(sum, "the call that raised");
  });
  emu::reset();
}

CASE(a_rank_that_does_not_come_is_named_and_the_group_is_broken_from_then_on) {
  set_up(kRanks);
  const auto comms = peers(kRanks, 0.3);
  on_ranks(comms, [&](int rank, PeerCommunicator& comm) {
    try_all(rank, comm, 10, "before");
    wait();
    if (rank == 1) return;
    const Floats x(10, [](size_t) { return 1.0f; }), out(10);
    const std::string late = error_of<TimeoutFailure>([&] {
      all_reduce(comm, x, out);
      comm.check();
    });
    EXPECT(late.find(concat("all_reduce on group 'tp' (rank ", rank,
                            " of 3), call 4: ranks [1] did not signal within "
                            "0.3 s. Ranks [0, 2] did. Rank 1 was last seen at call 3.")) == 0,
           late);
    const std::string broken = error_of<PeerLost>([&] { all_reduce(comm, x, out); });
    EXPECT(broken.find("broken since an earlier call") != std::string::npos, broken);
  });
  emu::reset();
}

CASE(tensors_of_another_device_are_refused) {
  set_up(kRanks);
  const auto comms = peers(kRanks);
  on_ranks(comms, [&](int rank, PeerCommunicator& comm) {
    const Floats x(10), out(10);
    const DeviceScope elsewhere((rank + 1) % kRanks);
    const std::string text = error_of<std::invalid_argument>([&] { all_reduce(comm, x, out); });
    EXPECT(text == concat("group 'tp' is on cuda:", rank, ", got tensors on cuda:", (rank + 1) % kRanks), text);
  });
  emu::reset();
}

CASE(ids_outside_the_vocabulary_are_an_error_of_a_later_call) {
  set_up(kRanks);
  const auto comms = peers(kRanks);
  on_ranks(comms, [&](int rank, PeerCommunicator& comm) {
    *comm.bad_ids(500) += 2;
    const std::string text = error_of<std::invalid_argument>([&] { comm.check(); });
    EXPECT(text.find("vocab_embedding: ids must be in [0, 500), got 2 outside of it") == 0, text);
    try_all(rank, comm, 10, "after bad ids");
  });
  emu::reset();
}

CASE(a_process_group_gives_the_same_sums_and_compares_a_signature_once) {
  set_up(kRanks);
  ThreadExchange::Shared shared(kRanks);
  std::vector<std::unique_ptr<cuda::DeviceGroupCommunicator>> comms;
  for (int r = 0; r < kRanks; ++r) {
    const DeviceScope scope(r);
    comms.push_back(std::make_unique<cuda::DeviceGroupCommunicator>(
        concat("group/", r), "tp", r, kRanks, 20.0, r,
        std::make_unique<ThreadExchange>(shared, r, kRanks * size_t{65536})));
  }
  on_ranks(comms, [&](int rank, cuda::DeviceGroupCommunicator& comm) {
    for (size_t n : {size_t{0}, size_t{1}, size_t{1001}, scaled(200003)}) {
      for (int time = 0; time < 2; ++time) try_all(rank, comm, n, concat("group of ", n));
    }
    for (int codec = 1; codec < static_cast<int>(Codec::Count); ++codec) {
      const Floats x(3000, [&](size_t i) { return input(rank, i); }), out(3000);
      all_reduce(comm, x, out, static_cast<Codec>(codec));
      wait();
      for (size_t i = 0; i < 3000; ++i) {
        float packed = std::abs(total(i));  // what is rounded on the way: R inputs, and their sum
        for (int r = 0; r < kRanks; ++r) packed += std::abs(input(r, i));
        const float lost = static_cast<Codec>(codec) == Codec::Fp8 ? packed / 16 : 0;
        EXPECT(std::abs(out[i] - total(i)) <= 8 + lost, name_of(static_cast<Codec>(codec)));
      }
    }
    EXPECT((comm.exchange(Op::Sizes, rank) == std::vector<int64_t>{0, 1, 2}));
    comm.exchange(Op::Barrier, 0);
    const Floats x(5 + static_cast<size_t>(rank)), out(x.size());
    error_of<RankMismatch>([&] { all_reduce(comm, x, out); });
    try_all(rank, comm, 77, "after a mismatch");
    comm.check();
  });
  // 3 collectives of 5 sizes, the codecs, two exchanges and the mismatch: repeated calls asked for nothing.
  EXPECT(shared.times_agreed == 15 + static_cast<int>(Codec::Count) - 1 + 2 + 1, shared.times_agreed.load());
  emu::reset();
}

CASE(a_group_of_one_copies) {
  set_up(1);
  const std::shared_ptr<Communicator> comm = cuda::make_local("one", "one", 0);
  emu::run_ranks(1, [&](int) {
    const Floats x(100, [](size_t i) { return input(0, i); }), out(100);
    const Wire& wire = sum_of_floats();
    comm->all_reduce(spec_of(Op::AllReduce, wire, 100), wire, x.data(), out.data(), 100);
    comm->check();
    for (size_t i = 0; i < 100; ++i) EXPECT(out[i] == input(0, i));
    EXPECT(comm->exchange(Op::Sizes, 7) == std::vector<int64_t>{7});
  });
  emu::reset();
}

CASE(what_cannot_be_opened_says_why) {
  set_up(2);
  const auto open = [](int ranks, size_t arenas, size_t bytes) {
    return error_of<std::invalid_argument>(
        [&] { PeerCommunicator("x", "x", 0, ranks, 1.0, 0, std::vector<uintptr_t>(arenas, 0), bytes, 0); });
  };
  EXPECT(open(0, 0, kSmallArena).find("needs 1 to 8 ranks, got 0") != std::string::npos);
  EXPECT(open(9, 9, kSmallArena).find("needs 1 to 8 ranks, got 9") != std::string::npos);
  EXPECT(open(2, 3, kSmallArena).find("an arena for each of 2 ranks, got 3") != std::string::npos);
  EXPECT(open(2, 2, 1000).find("arena_bytes must be a multiple of 4096, at least 262144, got 1000") !=
         std::string::npos);
  emu::reset();
}
