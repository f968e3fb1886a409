// Transport `group` over connections, with threads for ranks and pairs of sockets for the network.
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <functional>
#include <thread>

#include "core/errors.h"
#include "cpu/transport/socket_transport.h"
#include "expect.h"
#include "rank_threads.h"

using namespace tpk;

namespace {

constexpr size_t kCapacity = size_t{1} << 16;  // so that messages run in pieces

// What a rank asked its watch, which knows nothing but what it is asked.
struct Asked {
  std::atomic<int> looks{0}, late{0}, ended{0};
  std::atomic<uint64_t> left_at{0};
};

class TestWatch final : public SocketExchange::Watch {
 public:
  explicit TestWatch(Asked& asked) : asked_(asked) {}
  void look(uint64_t, bool late, bool ended, const std::string& what) override {
    ++asked_.looks;
    if (late) ++asked_.late;
    if (ended) ++asked_.ended;
    if (late) throw TimeoutFailure("late: " + what);
    if (ended) throw PeerLost("ended: " + what);
  }
  void leave(uint64_t last_call) noexcept override { asked_.left_at = last_call; }

 private:
  Asked& asked_;
};

// sockets[r][q]: the end at rank r of the connection to rank q.
std::vector<std::vector<int>> connected(size_t world_size) {
  std::vector<std::vector<int>> sockets(world_size, std::vector<int>(world_size, -1));
  for (size_t r = 0; r < world_size; ++r) {
    for (size_t q = 0; q < r; ++q) {
      int ends[2];
      EXPECT(socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0);
      sockets[r][q] = ends[0];
      sockets[q][r] = ends[1];
    }
  }
  return sockets;
}

// Runs body(communicator) once for each rank, each in a thread; a rank whose body has ended leaves the group.
void with_ranks(int world_size, std::vector<Asked>& asked, const std::function<void(Communicator&)>& body,
                double timeout_s = 20.0) {
  const size_t ranks = static_cast<size_t>(world_size);
  const std::vector<std::vector<int>> sockets = connected(ranks);
  each_in_a_thread(ranks, [&](size_t r) {
    SocketCommunicator comm("test", "test", static_cast<int>(r), world_size, timeout_s,
                           std::make_unique<SocketExchange>(sockets[r], static_cast<int>(r), kCapacity, timeout_s,
                                                            std::make_unique<TestWatch>(asked[r])));
    try {
      body(comm);
    } catch (...) {
      comm.close();
      throw;
    }
    comm.close();
  });
}

void collectives_are_exact(int world_size, Codec codec) {
  const Wire& wire = wire_of(DType::F32, codec, ReduceOp::Sum);
  std::vector<Asked> asked(static_cast<size_t>(world_size));
  with_ranks(world_size, asked, [&](Communicator& comm) {
    uint32_t seed = 0;
    for (size_t n : {0, 1, 3, 255, 257, 2048, 5000, 131072, 300001}) {
      ++seed;
      const std::vector<float> mine = values_of(comm.rank(), n, seed);
      const std::vector<float> sum = sum_of(world_size, n, seed);
      std::vector<float> out(n), in_place = mine;
      comm.all_reduce(spec_for(Op::AllReduce, wire, n), wire, mine.data(), out.data(), n);
      EXPECT(out == sum, "all_reduce of ", n);
      EXPECT(mine == values_of(comm.rank(), n, seed), "the input stays");
      bool ran = false;
      comm.all_reduce_beside(spec_for(Op::AllReduceInplace, wire, n), wire, in_place.data(), n, [&] { ran = true; });
      EXPECT(in_place == sum && ran, "in place, ", n);
      const Cut cut = Cut::even(n, world_size);
      std::vector<float> part(cut.size(comm.rank()));
      comm.reduce_scatter(spec_for(Op::ReduceScatter, wire, n), wire, mine.data(), part.data(), cut);
      EXPECT(std::equal(part.begin(), part.end(), sum.begin() + static_cast<ptrdiff_t>(cut.start(comm.rank()))));
      std::vector<char> packed;
      for (int r = 0; r < world_size; ++r) {
        const size_t begin = packed.size();
        packed.resize(begin + wire.bytes(cut.size(r)));
        wire.encode(mine.data() + cut.start(r), packed.data() + begin, cut.size(r));
      }
      std::vector<float> of_packed(part.size(), -1.0f);
      const Input input = wire.is_plain() ? Input(packed.data()) : Input::packed(packed.data());
      comm.reduce_scatter(spec_for(Op::ReduceScatter, wire, n), wire, input, of_packed.data(), cut);
      EXPECT(of_packed == part, "packed, ", n);
      std::fill(out.begin(), out.end(), -1.0f);
      comm.all_gather(spec_for(Op::AllGather, wire, n, static_cast<int64_t>(part.size())), wire, part.data(),
                      out.data(), cut);
      EXPECT(out == sum, "all_gather of ", n);
    }
    const OpStats stats = comm.stats()[static_cast<size_t>(Op::AllReduce)];
    EXPECT(stats.calls == 9);
  });
}

CASE(collectives_are_exact_for_every_codec_and_number_of_ranks) {
  for (int world_size : {2, 3, 5}) {
    for (Codec codec : {Codec::None, Codec::Fp16, Codec::Bf16}) collectives_are_exact(world_size, codec);
  }
}

CASE(sums_are_in_rank_order_and_the_same_bits_everywhere) {
  constexpr size_t n = 30000;
  const Wire& wire = wire_of(DType::F32, Codec::None, ReduceOp::Avg);
  const auto value = [](int rank, size_t i) {
    return std::ldexp(1.0f + static_cast<float>(i) * 1e-4f, 8 * static_cast<int>((i + static_cast<size_t>(rank)) % 4));
  };
  std::vector<Asked> asked(3);
  with_ranks(3, asked, [&](Communicator& comm) {
    std::vector<float> x(n);
    for (size_t i = 0; i < n; ++i) x[i] = value(comm.rank(), i);
    comm.all_reduce(spec_for(Op::AllReduce, wire, n), wire, x.data(), x.data(), n);
    for (size_t i = 0; i < n; ++i) EXPECT(x[i] == (value(0, i) + value(1, i) + value(2, i)) / 3.0f, i);
  });
}

CASE(ranks_that_disagree_all_hear_of_it_and_go_on) {
  std::vector<Asked> asked(3);
  std::atomic<int> refused{0};
  with_ranks(3, asked, [&](Communicator& comm) {
    const Wire& wire = wire_of(DType::F32, Codec::None, ReduceOp::Sum);
    const size_t n = comm.rank() == 1 ? 70000 : 5000;
    std::vector<float> x(n, 1.0f);
    try {
      comm.all_reduce(spec_for(Op::AllReduce, wire, n), wire, x.data(), x.data(), n);
    } catch (const RankMismatch&) {
      ++refused;
    }
    EXPECT(x == std::vector<float>(n, 1.0f));
    comm.all_reduce(spec_for(Op::AllReduce, wire, 5000), wire, x.data(), x.data(), 5000);
    EXPECT(x[0] == 3.0f && x[4999] == 3.0f);
  });
  EXPECT(refused == 3);
}

CASE(a_rank_that_left_ends_the_wait_of_the_others) {
  std::vector<Asked> asked(3);
  std::atomic<int> lost{0};
  with_ranks(3, asked, [&](Communicator& comm) {
    comm.exchange(Op::Barrier, 0);
    if (comm.rank() == 2) return;
    try {
      comm.exchange(Op::Barrier, 0);
    } catch (const PeerLost& error) {
      if (std::string(error.what()).find("call 2") != std::string::npos) ++lost;
    }
    try {
      comm.exchange(Op::Barrier, 0);
    } catch (const PeerLost&) {  // the group stays broken
      ++lost;
    }
  });
  EXPECT(lost == 4 && asked[0].ended == 1 && asked[1].ended == 1 && asked[2].ended == 0);
  EXPECT(asked[2].left_at == 1);
}

CASE(a_late_rank_is_waited_for_until_the_deadline) {
  std::vector<Asked> asked(2);
  std::atomic<bool> over{false};
  with_ranks(
      2, asked,
      [&](Communicator& comm) {
        if (comm.rank() == 1) {
          while (!over) std::this_thread::yield();
          return;
        }
        bool late = false;
        try {
          comm.exchange(Op::Barrier, 0);
        } catch (const TimeoutFailure&) {
          late = true;
        }
        over = true;
        EXPECT(late);
      },
      0.5);
  // It has looked at the other rank in between, too.
  EXPECT(asked[0].late == 1 && asked[0].looks >= 2 && asked[0].ended == 0);
}

}  // namespace
