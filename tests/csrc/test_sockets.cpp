// Transport `group` over connections, with threads for ranks and pairs of sockets for the network.
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <thread>

#include "socket_ranks.h"

using namespace tpk;

namespace {

template <class Comm>
void collectives_are_exact(int world_size, Codec codec) {
  const Wire& wire = wire_of(DType::F32, codec, ReduceOp::Sum);
  std::vector<Asked> asked(static_cast<size_t>(world_size));
  with_ranks<Comm>(world_size, asked, [&](Communicator& comm) {
    uint32_t seed = 0;
    comm.link_bytes_per_s = 1e9;
    for (size_t n : {0, 1, 3, 255, 257, 2048, 5000, 131072, 300001}) {
      comm.link_hop_s = ++seed % 2 == 0 ? 1.0 : 1e-12;  // in one exchange, or not
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
    for (Codec codec : {Codec::None, Codec::Fp16, Codec::Bf16}) {
      collectives_are_exact<SocketCommunicator>(world_size, codec);
      collectives_are_exact<GroupCommunicator>(world_size, codec);  // through the buffers of its exchange
    }
  }
}

CASE(an_average_with_feedback_is_that_of_its_parts) {
  for (int world_size : {2, 3, 5}) {
    for (Codec codec : {Codec::Fp16, Codec::Int8}) {
      const Wire& wire = wire_of(DType::F32, codec, ReduceOp::Sum);
      const float scale = 1.0f / static_cast<float>(world_size);
      std::vector<Asked> asked(static_cast<size_t>(world_size));
      with_ranks(world_size, asked, [&](Communicator& comm) {
        for (size_t n : {0, 1, 257, 5000, 300001}) {
          const Cut cut = Cut::even(n, world_size);
          std::vector<std::vector<float>> kept(static_cast<size_t>(world_size), std::vector<float>(n, 0.25f));
          std::vector<float> residual = kept[0], out(n), mean(n);
          for (int p = 0; p < world_size; ++p) {
            const size_t begin = cut.start(p), size = cut.size(p);
            std::vector<std::vector<char>> packed;
            std::vector<const void*> inputs;
            for (int r = 0; r < world_size; ++r) {
              float* const of_rank = kept[static_cast<size_t>(r)].data() + begin;
              packed.emplace_back(wire.bytes(size) + 1);
              wire.encode_with_feedback(values_of(r, n, 7).data() + begin, of_rank, packed.back().data(), scale, size);
              inputs.push_back(packed.back().data());
            }
            std::vector<char> sum(wire.bytes(size) + 1);
            float* const of_owner = kept[static_cast<size_t>(p)].data() + begin;
            wire.reduce_with_feedback(inputs.data(), world_size, sum.data(), of_owner, mean.data() + begin, size);
          }
          const std::vector<float> mine = values_of(comm.rank(), n, 7);
          comm.average_with_feedback(spec_for(Op::AverageWithFeedback, wire, n), wire,
                                     {mine.data(), residual.data(), scale, out.data(), cut});
          EXPECT(out == mean, "the average of ", n);
          EXPECT(residual == kept[static_cast<size_t>(comm.rank())], "the residual of ", n);
        }
      });
    }
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
    comm.link_bytes_per_s = 1e9;
    for (double delay : {0.0, 1.0}) {
      comm.link_hop_s = delay;
      EXPECT(comm.sums_in_one_exchange(wire, n, false) == (delay > 0));
      std::vector<float> x(n);
      for (size_t i = 0; i < n; ++i) x[i] = value(comm.rank(), i);
      comm.reset_stats();
      comm.all_reduce(spec_for(Op::AllReduce, wire, n), wire, x.data(), x.data(), n);
      for (size_t i = 0; i < n; ++i) EXPECT(x[i] == (value(0, i) + value(1, i) + value(2, i)) / 3.0f, i);
      const uint64_t sent = comm.stats()[static_cast<size_t>(Op::AllReduce)].wire_bytes, all = n * sizeof(float);
      EXPECT(sent == 2 * 64 + (delay > 0 ? 2 * all : 2 * (all - all / 3) / 2 + 2 * all / 3), sent);
    }
  });
}

CASE(ranks_that_disagree_all_hear_of_it_and_go_on) {
  std::vector<Asked> asked(3);
  std::atomic<int> refused{0};
  with_ranks(3, asked, [&](Communicator& comm) {
    const Wire& wire = wire_of(DType::F32, Codec::None, ReduceOp::Sum);
    comm.link_bytes_per_s = 1e7;
    for (double delay : {0.0, 3e-3, 1.0}) {  // none, the shorter or both messages go with the opening
      comm.link_hop_s = delay;
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
    }
  });
  EXPECT(refused == 9);
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
