// Calls of device groups captured into CUDA graphs: what a replay does must be what the calls do, to the bit.
#include "emu_graph.h"

using namespace tpk;
using namespace tpk::testing;
using cuda::AddNorm;
using cuda::Path;
using cuda::Stretch;

namespace {

constexpr int kRanks = 3;
constexpr int kReplays = 3;

size_t scaled(size_t n) { return emu::detects_races() ? n / 16 : n; }

// What a program of several ops does with x, into tensors of its own.
struct Program {
  Program(DeviceCommunicator& comm, const Floats& x)
      : comm(comm),
        x(x),
        cut(Cut::even(x.size(), kRanks)),
        sum(x.size()),
        packed(x.size()),
        part(cut.size(comm.rank())),
        whole(x.size()),
        weight(kWidth, [](size_t i) { return 1.0f + 0.01f * static_cast<float>(i); }),
        y(x.size()),
        residual(x.size()),
        inverse(x.size() / kWidth + 1) {}

  // Everything that a communicator has, twice, so that calls depend on calls.
  void run() {
    const Wire& wire = sum_of_floats();
    const size_t n = x.size();
    all_reduce(comm, x, sum);
    all_reduce(comm, sum, packed, Codec::Fp16);
    comm.reduce_scatter(spec_of(Op::ReduceScatter, wire, n), wire, packed.data(), part.data(), cut);
    comm.all_gather(spec_of(Op::AllGather, wire, n, static_cast<int64_t>(part.size())), wire, part.data(), whole.data(),
                    cut);
    const AddNorm args{whole.data(),   x.data(),   weight.data(), y.data(), residual.data(),
                       inverse.data(), n / kWidth, kWidth,        1e-5};
    comm.add_norm(spec_of(Op::AllReduceAddRmsNorm, wire, n), wire, args);
    comm.all_reduce_beside(spec_of(Op::ReplicatedGemmBackward, wire, n), wire, whole.data(), n,
                           [&] { copy_on_stream(sum.data(), packed.data(), n); });
  }
  void expect_same(const Program& called, const std::string& what) const {
    expect_same_bits(sum, called.sum, what + ", all_reduce");
    expect_same_bits(packed, called.packed, what + ", beside");
    expect_same_bits(part, called.part, what + ", reduce_scatter");
    expect_same_bits(whole, called.whole, what + ", all_gather and all_reduce beside");
    expect_same_bits(y, called.y, what + ", add_norm");
  }

  static constexpr size_t kWidth = 16;
  DeviceCommunicator& comm;
  const Floats& x;
  const Cut cut;
  const Floats sum, packed, part, whole, weight, y, residual, inverse;
};

// Captures the program and compares its replays, on new inputs, with calls on the same ones.
template <class Comm>
void try_program(int rank, Comm& comm, size_t n, const std::string& what) {
  const Floats x(n);
  fill(x, rank, 0);
  Program replayed(comm, x), called(comm, x);
  called.run();
  const Graph graph([&] { replayed.run(); });
  for (int turn = 0; turn < kReplays; ++turn) {
    wait();
    fill(x, rank, turn);
    graph.launch();
    called.run();  // between launches
    wait();
    replayed.expect_same(called, concat(what, ", turn ", turn));
  }
  comm.check();
}

}  // namespace

CASE(every_collective_gives_in_replays_what_calls_give) {
  for (Path path : {Path::OneShot, Path::TwoShot}) {
    for (size_t n : {size_t{48}, scaled(12800)}) {  // the second one in pieces, where nothing slows it down
      if (emu::detects_races() && (n == 48) != (path == Path::OneShot)) continue;
      set_up(kRanks, n);
      const auto comms = peers(kRanks);
      on_ranks(comms, [&](int rank, PeerCommunicator& comm) {
        comm.force({path, 2, 0});
        try_program(rank, comm, n, concat(name_of(path), " of ", n));
      });
      emu::reset();
    }
  }
}

CASE(a_process_group_is_captured_too) {
  set_up(kRanks);
  ThreadExchange::Shared shared(kRanks);
  std::vector<std::unique_ptr<cuda::DeviceGroupCommunicator>> comms;
  for (int r = 0; r < kRanks; ++r) {
    const DeviceScope scope(r);
    comms.push_back(std::make_unique<cuda::DeviceGroupCommunicator>(
        concat("group/", r), "tp", r, kRanks, 20.0, r,
        std::make_unique<ThreadExchange>(shared, r, kRanks * size_t{65536})));
  }
  on_ranks(comms,
           [&](int rank, cuda::DeviceGroupCommunicator& comm) { try_program(rank, comm, scaled(12800), "group"); });
  emu::reset();
}

CASE(chunked_pipelines_give_in_replays_what_calls_give) {
  for (int parts : {1, 2, 5}) {
    set_up(kRanks, static_cast<uint64_t>(parts));
    const auto comms = peers(kRanks);
    const size_t n = scaled(20000);
    on_ranks(comms, [&](int rank, PeerCommunicator& comm) {
      const Cut cut = Cut::even(n, kRanks);
      const Floats source(n), product(n), sum(n), gathered(n), consumed(n), after(n);
      const Floats want_sum(n), want_consumed(n);
      const Wire& wire = sum_of_floats();
      const auto start = [&](size_t of, int i) { return of * static_cast<size_t>(i) / static_cast<size_t>(parts); };
      const auto stretch = [&](int part) {
        Stretch found = Stretch::all(cut);
        for (int r = 0; r < kRanks; ++r) {
          found.begin[static_cast<size_t>(r)] = start(cut.size(r), part);
          found.end[static_cast<size_t>(r)] = start(cut.size(r), part + 1);
        }
        return found;
      };
      const auto pipelines = [&] {
        comm.produce_and_send(
            Op::GemmAllReduce, parts,
            [&](int i) {
              copy_on_stream(source.data() + start(n, i), product.data() + start(n, i), start(n, i + 1) - start(n, i));
            },
            [&](int i) {
              comm.send_all_reduce(spec_of(Op::GemmAllReduce, wire, n), wire, product.data() + start(n, i),
                                   sum.data() + start(n, i), start(n, i + 1) - start(n, i));
            });
        comm.receive_and_consume(
            Op::AllGatherGemm, parts,
            [&](int i) {
              comm.send_all_gather(spec_of(Op::AllGatherGemm, wire, n, static_cast<int64_t>(cut.size(rank))), wire,
                                   sum.data() + cut.start(rank), gathered.data(), cut, stretch(i));
            },
            [&](int i) {
              const Stretch here = stretch(i);
              for (int r = 0; r < kRanks; ++r) {
                const size_t at = cut.start(r) + here.begin[static_cast<size_t>(r)];
                copy_on_stream(gathered.data() + at, consumed.data() + at, here.size(r));
              }
            });
        copy_on_stream(sum.data(), after.data(), n);  // the caller's stream has waited for the last part
      };
      const Graph graph(pipelines);
      for (int turn = 0; turn < kReplays; ++turn) {
        fill(source, rank, turn);
        pipelines();
        wait();
        std::memcpy(want_sum.data(), after.data(), n * sizeof(float));
        std::memcpy(want_consumed.data(), consumed.data(), n * sizeof(float));
        for (const Floats* x : {&product, &sum, &gathered, &consumed, &after}) {
          std::memset(x->data(), 0xff, n * sizeof(float));
        }
        emu::host_threads_met();
        comm.exchange(Op::Barrier, 0);
        graph.launch();
        wait();
        expect_same_bits(after, want_sum, concat(parts, " parts, produced"));
        expect_same_bits(consumed, want_consumed, concat(parts, " parts, consumed"));
      }
      comm.check();
      const auto calls = comm.stats()[static_cast<size_t>(Op::GemmAllReduce)].calls;
      EXPECT(calls == 1 + kReplays, "captured once and called ", kReplays, " times, counted ", calls);
    });
    emu::reset();
  }
}

CASE(graphs_and_calls_may_follow_one_another_without_a_wait) {
  for (uint64_t seed : {0, 3}) {
    set_up(kRanks, seed);
    const auto comms = peers(kRanks);
    on_ranks(comms, [&](int, PeerCommunicator& comm) {
      const Floats x(1000, [](size_t) { return 1.0f; });
      const Graph twice([&] {
        all_reduce(comm, x, x);
        all_reduce(comm, x, x);
      });
      const Graph once([&] { all_reduce(comm, x, x); });
      float expected = 1;
      for (int turn = 0; turn < 3; ++turn) {
        twice.launch();
        all_reduce(comm, x, x);
        once.launch();
        once.launch();
        expected *= kRanks * kRanks * kRanks * kRanks * kRanks;
      }
      comm.check();
      for (size_t i = 0; i < x.size(); ++i) EXPECT(x[i] == expected, i, " is ", x[i]);
    });
    emu::reset();
  }
}

CASE(calls_on_two_streams_stay_ordered_when_a_graph_was_captured_between_them) {
  set_up(kRanks);
  const auto comms = peers(kRanks);
  on_ranks(comms, [&](int rank, PeerCommunicator& comm) {
    const cudaStream_t first = cuda::current_stream(), second = new_stream();
    const Floats x(1000, [&](size_t i) { return static_cast<float>(i % 7 + static_cast<size_t>(rank)); });
    const Floats y(1000), z(1000), other(1000);
    std::atomic<bool> open{false};
    const auto hold = [](void* gate) {
      while (!*static_cast<std::atomic<bool>*>(gate)) std::this_thread::yield();
    };
    TPK_CUDA_CHECK(cudaLaunchHostFunc(first, hold, &open));
    all_reduce(comm, x, y);
    {
      const StreamScope scope(second);
      const Graph graph([&] { all_reduce(comm, x, other); });
      all_reduce(comm, y, z);
      EXPECT(cudaStreamQuery(second) == cudaErrorNotReady, "the second call has not waited for the first one");
      open = true;
      wait();
    }
    comm.check();
    for (size_t i = 0; i < x.size(); ++i) EXPECT(z[i] == static_cast<float>(kRanks * (kRanks * (i % 7) + 3)), i);
  });
  emu::reset();
}

CASE(what_needs_the_host_is_refused_while_a_graph_is_captured_and_does_it_no_harm) {
  set_up(kRanks);
  const auto comms = peers(kRanks);
  on_ranks(comms, [&](int rank, PeerCommunicator& comm) {
    const Floats x(100, [&](size_t i) { return input(rank, i, 0); }), y(100), want(100);
    all_reduce(comm, x, want);
    wait();
    const Graph graph([&] {
      all_reduce(comm, x, y);
      EXPECT(error_of<std::invalid_argument>([&] { comm.check(); }).find("while a CUDA graph is captured") !=
             std::string::npos);
      error_of<std::invalid_argument>([&] { comm.exchange(Op::Sizes, 1); });
      error_of<std::invalid_argument>([&] { comm.exchange(Op::Barrier, 0); });
    });
    graph.launch();
    wait();
    expect_same_bits(y, want, "after refusals");
    comm.check();
  });
  emu::reset();
}

CASE(an_error_in_the_middle_of_a_pipeline_leaves_a_capture_that_can_be_ended) {
  set_up(kRanks);
  const auto comms = peers(kRanks);
  on_ranks(comms, [&](int rank, PeerCommunicator& comm) {
    const Floats x(300, [&](size_t i) { return input(rank, i, 0); }), y(300), want(300);
    const Wire& wire = sum_of_floats();
    all_reduce(comm, x, want);
    const auto pipeline = [&](int fails_at) {
      comm.produce_and_send(
          Op::GemmAllReduce, 3,
          [&](int i) {
            if (i == fails_at) throw std::domain_error("no product");
          },
          [&](int i) {
            comm.send_all_reduce(spec_of(Op::GemmAllReduce, wire, 300), wire, x.data() + 100 * i, y.data() + 100 * i,
                                 100);
          });
    };
    for (int fails_at : {0, 1, 2}) {
      const Graph graph([&] { error_of<std::domain_error>([&] { pipeline(fails_at); }); });
      const auto expect_parts = [&](const char* how) {
        wait();  // for the parts that were sent, too
        for (size_t i = 0; i < y.size(); ++i) {
          const bool sent = i < static_cast<size_t>(100 * fails_at);
          EXPECT(y[i] == (sent ? want[i] : -1.0f), how, ", failed at ", fails_at, ": value ", i, " is ", y[i]);
        }
      };
      for (bool in_graph : {true, false}) {
        wait();
        std::fill(y.data(), y.data() + y.size(), -1.0f);
        emu::host_threads_met();
        if (in_graph) graph.launch();
        if (!in_graph) error_of<std::domain_error>([&] { pipeline(fails_at); });
        expect_parts(in_graph ? "a replay" : "a call");
      }
    }
    comm.check();
  });
  emu::reset();
}

CASE(ranks_whose_graphs_disagree_are_told_after_each_replay_and_the_rest_of_the_graph_is_right) {
  set_up(kRanks, 2);
  const auto comms = peers(kRanks);
  on_ranks(comms, [&](int rank, PeerCommunicator& comm) {
    const Floats x(100, [&](size_t i) { return input(rank, i, 0); }), y(100), want(100);
    // Of more pieces on some ranks than on others.
    const Floats odd(10 + scaled(20000) * static_cast<size_t>(rank)), lost(odd.size());
    all_reduce(comm, x, want);
    const Graph graph([&] {
      all_reduce(comm, odd, lost);
      all_reduce(comm, x, y);
    });
    for (int turn = 0; turn < kReplays; ++turn) {
      graph.launch();
      wait();
      expect_same_bits(y, want, "behind a refused call");
      std::memset(y.data(), 0, y.size() * sizeof(float));
      const std::string text = error_of<RankMismatch>([&] { comm.check(); });
      EXPECT(text.find("the ranks disagree: rank") != std::string::npos, text);
      comm.check();  // raised once
    }
    all_reduce(comm, x, y);
    comm.check();
    expect_same_bits(y, want, "called after the replays");
  });
  emu::reset();
}

// What DeviceExchange in Python does by a thread: the test itself sees that the stream is stuck, and lets it go.
CASE(an_exchange_that_is_given_up_stops_the_device_and_is_told_by_every_later_call) {
  for (bool in_graph : {false, true}) {
    set_up(kRanks);
    ThreadExchange::Shared shared(kRanks);
    std::vector<ThreadExchange*> exchanges;
    std::vector<std::unique_ptr<cuda::DeviceGroupCommunicator>> comms;
    for (int r = 0; r < kRanks; ++r) {
      const DeviceScope scope(r);
      auto exchange = std::make_unique<ThreadExchange>(shared, r, kRanks * size_t{65536}, true);
      exchanges.push_back(exchange.get());
      comms.push_back(std::make_unique<cuda::DeviceGroupCommunicator>(concat("group/", r), "tp", r, kRanks, 20.0, r,
                                                                      std::move(exchange)));
    }
    std::barrier<> given_up(kRanks - 1);
    on_ranks(comms, [&](int rank, cuda::DeviceGroupCommunicator& comm) {
      const auto r = static_cast<size_t>(rank);
      cuda::ExchangeMarks& marks = *static_cast<cuda::ExchangeMarks*>(exchanges[r]->marks());
      const Floats x(96), y(96);  // chunks of one size, so that what is left of rank 1 fits
      fill(x, rank, 0);
      all_reduce(comm, x, y);
      const Graph graph([&] { all_reduce(comm, x, y); });
      wait();
      EXPECT(marks.begun == 2 && marks.ended == 2, "an all_reduce is two exchanges, got ", marks.begun);
      if (rank == 1) return;
      if (in_graph) graph.launch();
      if (!in_graph) all_reduce(comm, x, y);
      while (__atomic_load_n(&marks.begun, __ATOMIC_ACQUIRE) != 3) std::this_thread::yield();
      EXPECT(marks.ended == 2 && marks.op == static_cast<uint32_t>(Op::AllReduce));
      EXPECT(marks.call == (in_graph ? 2u : 3u), "the call that is stuck: ", marks.call);
      __atomic_store_n(&marks.given_up, 1u, __ATOMIC_RELEASE);
      given_up.arrive_and_wait();
      if (rank == 0) shared.streams.arrive_and_drop();
      EXPECT(cudaStreamSynchronize(cuda::current_stream()) == cudaErrorLaunchFailure, "it must not go on");
      EXPECT(marks.ended == 2);
      const std::string late = error_of<TimeoutFailure>([&] { comm.check(); });
      EXPECT(late == "given up", late);
      const std::string broken = error_of<PeerLost>([&] { all_reduce(comm, x, y); });
      EXPECT(broken.find("broken since an earlier call: given up") != std::string::npos, broken);
    });
    emu::reset();
  }
}

CASE(a_rank_that_does_not_launch_its_graph_is_named_and_the_group_is_broken_from_then_on) {
  set_up(kRanks);
  const auto comms = peers(kRanks, 0.3);
  on_ranks(comms, [&](int rank, PeerCommunicator& comm) {
    const Floats x(10, [](size_t) { return 1.0f; }), y(10);
    const Graph graph([&] { all_reduce(comm, x, y); });
    graph.launch();
    graph.launch();
    wait();
    if (rank == 1) return;
    graph.launch();
    EXPECT(cudaStreamSynchronize(cuda::current_stream()) != cudaSuccess, "the launch cannot have ended well");
    const std::string late = error_of<TimeoutFailure>([&] { comm.check(); });
    EXPECT(late.find(concat("all_reduce on group 'tp' (rank ", rank,
                            " of 3), call 3: ranks [1] did not signal within 0.3 s. Ranks [0, 2] did. Rank 1 was last "
                            "seen at call 2.")) == 0,
           late);
    const std::string broken = error_of<PeerLost>([&] { all_reduce(comm, x, y); });
    EXPECT(broken.find("broken since an earlier call") != std::string::npos, broken);
  });
  emu::reset();
}
