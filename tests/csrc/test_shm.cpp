// The shared-memory communicator with threads for ranks: every transport-level promise that needs no Python.
#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cmath>
#include <functional>
#include <string>

#include "core/errors.h"
#include "cpu/transport/shm.h"
#include "expect.h"
#include "rank_threads.h"

using namespace tpk;

namespace {

constexpr size_t kArenaBytes = size_t{4} << 20;

// Runs body(communicator) once for each rank, each in a thread with a mapping of its own.
void with_ranks(int world_size, const std::function<void(Communicator&)>& body, double timeout_s = 20.0,
                int cores = 64) {
  const int fd = memfd_create("test", 0);
  EXPECT(ftruncate(fd, static_cast<off_t>(kArenaBytes) * world_size) == 0);
  const std::vector<int> pids(static_cast<size_t>(world_size), getpid());
  std::vector<std::unique_ptr<ShmCommunicator>> ranks;
  for (int r = 0; r < world_size; ++r) {
    ranks.push_back(
        std::make_unique<ShmCommunicator>("test", "test", r, world_size, timeout_s, fd, kArenaBytes, pids, cores));
  }
  close(fd);
  each_in_a_thread(ranks.size(), [&](size_t r) {
    try {
      body(*ranks[r]);
    } catch (...) {
      ranks[r]->close();  // the others need not wait for the deadline
      throw;
    }
  });
}

const size_t kSizes[] = {0, 1, 3, 511, 2048, 2049, 5000, 131072, 300001};

void collectives_are_exact(int world_size, Codec codec) {
  const Wire& wire = wire_of(DType::F32, codec, ReduceOp::Sum);
  with_ranks(world_size, [&](Communicator& comm) {
    uint32_t seed = 0;
    for (int round = 0; round < 3; ++round) {
      for (size_t n : kSizes) {
        ++seed;
        const std::vector<float> mine = values_of(comm.rank(), n, seed), sum = sum_of(world_size, n, seed);
        std::vector<float> out(n);
        comm.all_reduce(spec_for(Op::AllReduce, wire, n), wire, mine.data(), out.data(), n);
        EXPECT(out == sum);
        std::vector<float> in_place = mine;
        comm.all_reduce(spec_for(Op::AllReduceInplace, wire, n), wire, in_place.data(), in_place.data(), n);
        EXPECT(in_place == sum);
        const Cut cut = Cut::even(n, world_size);
        std::vector<float> part(cut.size(comm.rank()));
        comm.reduce_scatter(spec_for(Op::ReduceScatter, wire, n), wire, mine.data(), part.data(), cut);
        const size_t start = cut.start(comm.rank());
        EXPECT(std::equal(part.begin(), part.end(), sum.begin() + static_cast<ptrdiff_t>(start)));
        std::fill(out.begin(), out.end(), -1.0f);
        comm.all_gather(spec_for(Op::AllGather, wire, n, static_cast<int64_t>(part.size())), wire, part.data(),
                        out.data(), cut);
        EXPECT(out == sum);
      }
    }
  });
}

// Inputs in the heap of all ranks, of some, of none: the same sums.
void heaps_are_read_in_place(int world_size) {
  const Wire& wire = wire_of(DType::F32, Codec::None, ReduceOp::Sum);
  with_ranks(world_size, [&](Communicator& comm) {
    uint32_t seed = 100;
    for (size_t n : {5000, 200000}) {
      for (int in_heap = 0; in_heap <= comm.world_size(); ++in_heap) {
        ++seed;
        const std::vector<float> mine = values_of(comm.rank(), n, seed), sum = sum_of(comm.world_size(), n, seed);
        std::vector<float> own = mine, out(n);
        float* data = own.data();
        if (comm.rank() < in_heap) {
          data = static_cast<float*>(comm.heap_allocate(n * sizeof(float)));
          EXPECT(data != nullptr);
          std::copy(mine.begin(), mine.end(), data);
        }
        comm.all_reduce(spec_for(Op::AllReduce, wire, n), wire, data, out.data(), n);
        EXPECT(out == sum);
        EXPECT(std::equal(mine.begin(), mine.end(), data));
        comm.all_reduce(spec_for(Op::AllReduceInplace, wire, n), wire, data, data, n);
        EXPECT(std::equal(sum.begin(), sum.end(), data));
        if (comm.rank() < in_heap) comm.heap_free(data);
      }
    }
  });
}

CASE(a_late_rank_is_named) {
  std::atomic<int> named{0};
  with_ranks(
      3,
      [&](Communicator& comm) {
        comm.exchange(Op::Barrier, 0);
        if (comm.rank() == 2) return;
        try {
          comm.exchange(Op::Barrier, 0);
        } catch (const TimeoutFailure& error) {
          const std::string text = error.what();
          if (text.find("call 2") != std::string::npos && text.find("2") != std::string::npos) ++named;
        }
      },
      0.3);
  EXPECT(named == 2);
}

CASE(a_closed_rank_is_named) {
  std::atomic<int> named{0};
  with_ranks(3, [&](Communicator& comm) {
    comm.exchange(Op::Barrier, 0);
    if (comm.rank() == 1) return comm.close();
    try {
      comm.exchange(Op::Barrier, 0);
    } catch (const PeerLost& error) {
      if (std::string(error.what()).find("rank 1") != std::string::npos) ++named;
    }
    bool refused = false;
    try {
      comm.exchange(Op::Barrier, 0);
    } catch (const PeerLost&) {
      refused = true;
    }
    EXPECT(refused);
  });
  EXPECT(named == 2);
}

CASE(who_was_late_is_named_after_a_rank_gave_up_and_left) {
  for (const bool by_its_own_call : {true, false}) {
    std::atomic<bool> left{false};
    std::atomic<int> gave_up{0};
    std::array<std::string, 2> found;
    with_ranks(
        3,
        [&](Communicator& comm) {
          comm.exchange(Op::Barrier, 0);
          if (comm.rank() == 2) {
            while (gave_up < 2) std::this_thread::yield();
            return;
          }
          while (comm.rank() == 1 && !left) std::this_thread::yield();
          try {
            if (comm.rank() == 1 || by_its_own_call) {
              comm.exchange(Op::Barrier, 0);
            } else {
              comm.give_up(true);
            }
          } catch (const TimeoutFailure& error) {
            found[static_cast<size_t>(comm.rank())] = error.what();
          } catch (const PeerLost&) {
          }
          comm.close();
          left = true;
          ++gave_up;
        },
        0.3);
    EXPECT((found[0].find("ranks [1, 2]") != std::string::npos) == by_its_own_call, found[0]);
    const std::string culprit = by_its_own_call ? "because rank 1 (this rank) did not" : "because rank 0 did not";
    EXPECT(found[1].find(culprit) != std::string::npos, found[1]);
  }
}

// Every rank sees the disagreement, reads nothing, and the group goes on.
CASE(ranks_that_disagree_all_hear_of_it) {
  const Wire& wire = wire_of(DType::F32, Codec::None, ReduceOp::Sum);
  const Wire& max = wire_of(DType::F32, Codec::None, ReduceOp::Max);
  std::atomic<int> heard{0};
  with_ranks(3, [&](Communicator& comm) {
    for (int round = 0; round < 20; ++round) {
      std::vector<float> x(100000, 1.0f);
      const bool odd = comm.rank() == round % 3;
      const Wire& used = odd && round % 2 ? max : wire;
      const size_t n = odd && round % 2 == 0 ? 77 : x.size();
      try {
        comm.all_reduce(spec_for(Op::AllReduce, used, n), used, x.data(), x.data(), n);
      } catch (const RankMismatch&) {
        ++heard;
      }
      EXPECT(x[0] == 1.0f);
      comm.all_reduce(spec_for(Op::AllReduce, wire, x.size()), wire, x.data(), x.data(), x.size());
      EXPECT(x.front() == 3.0f && x.back() == 3.0f);
    }
  });
  EXPECT(heard == 60);
}

CASE(more_ranks_than_cores_still_finish) {
  const Wire& wire = wire_of(DType::F32, Codec::None, ReduceOp::Sum);
  with_ranks(
      8,
      [&](Communicator& comm) {
        std::vector<float> x(3000, 1.0f);
        for (int i = 0; i < 300; ++i) {
          std::fill(x.begin(), x.end(), 1.0f);
          comm.all_reduce(spec_for(Op::AllReduce, wire, x.size()), wire, x.data(), x.data(), x.size());
          EXPECT(x[1] == 8.0f);
        }
      },
      60.0, 2);
}

CASE(a_heap_gives_back_what_is_freed) {
  std::vector<char> memory(1 << 20);
  Heap heap;
  heap.reset(memory.data(), memory.size());
  EXPECT(heap.allocate(memory.size() + 1) == nullptr);
  void* a = heap.allocate(1000);
  void* b = heap.allocate(300000);
  void* c = heap.allocate(1);
  EXPECT(a != nullptr && b != nullptr && c != nullptr && a != b && b != c);
  heap.free(b);
  EXPECT(heap.allocate(300000) == b);
  heap.free(a), heap.free(b), heap.free(c);
  EXPECT(heap.allocate(memory.size()) == memory.data());
}

CASE(what_is_sent_is_counted) {
  const size_t n = 100000;
  for (int c = 0; c < static_cast<int>(Codec::Count); ++c) {
    const Wire& wire = wire_of(DType::F32, static_cast<Codec>(c), ReduceOp::Sum);
    with_ranks(2, [&](Communicator& comm) {
      std::vector<float> x(n, 1.0f);
      comm.all_reduce(spec_for(Op::AllReduce, wire, n), wire, x.data(), x.data(), n);
      const OpStats stats = comm.stats()[static_cast<size_t>(Op::AllReduce)];
      EXPECT(stats.calls == 1);
      // Two ranks: half out, half back, give or take a block.
      const double expected = static_cast<double>(wire.bytes(n));
      EXPECT(std::abs(static_cast<double>(stats.wire_bytes) - expected) <= 2.0 * 1040);
    });
  }
}

CASE(collectives_are_exact_for_every_codec_and_number_of_ranks) {
  for (int world_size : {1, 2, 3, 4, 7}) {
    for (Codec codec : {Codec::None, Codec::Fp16, Codec::Bf16}) collectives_are_exact(world_size, codec);
  }
}

CASE(what_every_rank_sums_has_the_bits_of_what_is_summed_in_parts) {
  for (int c = 0; c < static_cast<int>(Codec::Count); ++c) {
    const Wire& wire = wire_of(DType::F32, static_cast<Codec>(c), ReduceOp::Sum);
    with_ranks(3, [&](Communicator& comm) {
      for (size_t n : {1, 300, 1029, 4000}) {
        std::vector<float> mine(n), sums[2] = {std::vector<float>(n), std::vector<float>(n)};
        for (size_t i = 0; i < n; ++i)
          mine[i] =
              std::sin(static_cast<float>(i + 1) * static_cast<float>(comm.rank() + 1)) * static_cast<float>(1 + i % 9);
        uint64_t sent[2];
        for (const bool once : {false, true}) {
          comm.one_shot_bytes = once ? kMostOneShotBytes : 0;
          const uint64_t before = comm.stats()[static_cast<size_t>(Op::AllReduce)].wire_bytes;
          comm.all_reduce(spec_for(Op::AllReduce, wire, n), wire, mine.data(), sums[once].data(), n);
          sent[once] = comm.stats()[static_cast<size_t>(Op::AllReduce)].wire_bytes - before;
        }
        EXPECT(sums[0] == sums[1], name_of(wire.codec), ", ", n, " values");
        EXPECT(sent[1] == 2 * wire.bytes(n) && (sent[0] != sent[1] || n == 1 || wire.block_values > 1), n);
      }
    });
  }
}

CASE(heaps_of_all_some_or_no_ranks_give_the_same_sums) {
  for (int world_size : {2, 3}) heaps_are_read_in_place(world_size);
}

CASE(a_block_of_the_heap_outlives_close) {
  with_ranks(2, [](Communicator& comm) {
    char* const block = static_cast<char*>(comm.heap_allocate(5000));
    comm.exchange(Op::Barrier, 0);
    comm.close();
    block[4999] = 1;
    EXPECT(block[4999] == 1);
    comm.heap_free(block);
    bool refused = false;
    try {
      comm.heap_allocate(1);
    } catch (const PeerLost&) {
      refused = true;
    }
    EXPECT(refused);
  });
}

}  // namespace
