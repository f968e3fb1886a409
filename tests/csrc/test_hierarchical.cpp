// Transport `hierarchical`, with threads for ranks and pairs of sockets inside the hosts and between them.
#include "cpu/transport/hierarchical_transport.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "socket_ranks.h"

using namespace tpk;

namespace {

using Hosts = HierarchicalCommunicator::Hosts;
const std::vector<Hosts> kLayouts{{{0, 1}, {2, 3}}, {{0, 1, 2}, {3}}, {{0, 2}, {1, 3}}, {{0, 4}, {1}, {2, 3}}};

int ranks_of(const Hosts& hosts) {
  size_t ranks = 0;
  for (const std::vector<int>& host : hosts) ranks += host.size();
  return static_cast<int>(ranks);
}

std::unique_ptr<SocketExchange> exchange(const std::vector<int>& sockets, size_t rank, Asked& asked) {
  return std::make_unique<SocketExchange>(sockets, static_cast<int>(rank), kCapacity, 20.0,
                                          std::make_unique<TestWatch>(asked));
}

// Runs body(communicator) once for each rank, each in a thread; a rank whose body has ended leaves the group.
void with_hosts(const Hosts& hosts, std::vector<Asked>& asked, const std::function<void(Communicator&)>& body) {
  size_t slices = hosts[0].size();
  for (const std::vector<int>& host : hosts) slices = std::min(slices, host.size());
  std::vector<std::vector<std::vector<int>>> inside, between;
  for (const std::vector<int>& host : hosts) inside.push_back(connected(host.size()));
  for (size_t l = 0; l < slices; ++l) between.push_back(connected(hosts.size()));
  each_in_a_thread(asked.size(), [&](size_t r) {
    const int rank = static_cast<int>(r);
    for (size_t h = 0; h < hosts.size(); ++h) {
      for (size_t k = 0; k < hosts[h].size(); ++k) {
        if (hosts[h][k] != rank) continue;
        const auto inner = std::make_shared<SocketCommunicator>("inner", "inner", static_cast<int>(k),
                                                                static_cast<int>(hosts[h].size()), 20.0,
                                                                exchange(inside[h][k], k, asked[r]));
        HierarchicalCommunicator comm("test", "test", rank, ranks_of(hosts), 20.0, hosts, inner,
                                      k < slices ? between[k][h] : std::vector<int>{}, kCapacity,
                                      std::make_unique<TestWatch>(asked[r]));
        run_and_leave(comm, body);
      }
    }
  });
}

void with_hosts(const Hosts& hosts, const std::function<void(Communicator&)>& body) {
  std::vector<Asked> asked(static_cast<size_t>(ranks_of(hosts)));
  with_hosts(hosts, asked, body);
}

// Small messages, which all ranks of a host get, and larger ones: over a link whose delay is long their sums go with
// the opening, over one without they do not.
const size_t kSizes[] = {0, 1, 3, 255, 257, 1024, 1025, 5000, 70001};

CASE(collectives_are_exact_on_hosts_of_any_kind) {
  for (const Hosts& hosts : kLayouts) {
    for (Codec codec : {Codec::None, Codec::Fp16, Codec::Bf16}) {
      const Wire& wire = wire_of(DType::F32, codec, ReduceOp::Sum);
      const int R = ranks_of(hosts);
      with_hosts(hosts, [&](Communicator& comm) {
        uint32_t seed = 0;
        for (size_t n : kSizes) {
          comm.link_hop_s = ++seed % 2 == 0 ? 1.0 : 1e-12;
          const std::vector<float> mine = values_of(comm.rank(), n, seed), sum = sum_of(R, n, seed);
          std::vector<float> out(n), in_place = mine;
          comm.all_reduce(spec_for(Op::AllReduce, wire, n), wire, mine.data(), out.data(), n);
          EXPECT(out == sum, "all_reduce of ", n);
          comm.all_reduce(spec_for(Op::AllReduceInplace, wire, n), wire, in_place.data(), in_place.data(), n);
          EXPECT(in_place == sum, "in place, ", n);
          const Cut cut = Cut::even(n, R);
          std::vector<float> part(cut.size(comm.rank()));
          comm.reduce_scatter(spec_for(Op::ReduceScatter, wire, n), wire, mine.data(), part.data(), cut);
          EXPECT(std::equal(part.begin(), part.end(), sum.begin() + static_cast<ptrdiff_t>(cut.start(comm.rank()))));
          std::fill(out.begin(), out.end(), -1.0f);
          comm.all_gather(spec_for(Op::AllGather, wire, n, static_cast<int64_t>(part.size())), wire, part.data(),
                          out.data(), cut);
          EXPECT(out == sum, "all_gather of ", n);
          EXPECT(comm.exchange(Op::AllGather, 7 * comm.rank()).back() == 7 * (R - 1));
        }
      });
    }
  }
}

CASE(sums_are_those_of_the_hosts_in_order_whatever_goes_with_the_opening) {
  const Wire& wire = wire_of(DType::F32, Codec::None, ReduceOp::Sum);
  const auto value = [](int rank, size_t i) {
    return std::ldexp(1.0f + static_cast<float>(i) * 1e-4f, 8 * static_cast<int>((i + static_cast<size_t>(rank)) % 4));
  };
  for (const Hosts& hosts : kLayouts) {
    with_hosts(hosts, [&](Communicator& comm) {
      for (size_t n : {5, 1000, 1100, 1101, 30000, 30001}) {
        comm.link_hop_s = n % 2 == 0 ? 1.0 : 1e-12;
        std::vector<float> x(n);
        for (size_t i = 0; i < n; ++i) x[i] = value(comm.rank(), i);
        comm.all_reduce(spec_for(Op::AllReduce, wire, n), wire, x.data(), x.data(), n);
        for (size_t i = 0; i < n; ++i) {
          float total = 0;
          for (size_t h = 0; h < hosts.size(); ++h) {
            float sum = value(hosts[h][0], i);
            for (size_t k = 1; k < hosts[h].size(); ++k) sum += value(hosts[h][k], i);
            total = h == 0 ? sum : total + sum;
          }
          EXPECT(x[i] == total, n, " values, value ", i);
        }
      }
    });
  }
}

// Of two hosts with two ranks each every rank leads a slice, and sends one message to the other rank of its host and
// one to the leader of the slice on the other host.
CASE(a_small_message_brings_its_own_bytes_and_no_room) {
  const Wire& wire = wire_of(DType::F32, Codec::None, ReduceOp::Sum);
  with_hosts(kLayouts[0], [&](Communicator& comm) {
    const auto bytes_of = [&](size_t n) {
      std::vector<float> x(n, 1.0f);
      comm.reset_stats();
      comm.all_reduce(spec_for(Op::AllReduce, wire, n), wire, x.data(), x.data(), n);
      return comm.stats()[static_cast<size_t>(Op::AllReduce)].wire_bytes;
    };
    EXPECT(bytes_of(1001) == bytes_of(1) + 2 * 4000);
  });
}

CASE(ranks_that_disagree_all_hear_of_it_and_go_on) {
  const Wire& wire = wire_of(DType::F32, Codec::None, ReduceOp::Sum);
  for (const Hosts& hosts : kLayouts) {
    const int R = ranks_of(hosts);
    with_hosts(hosts, [&](Communicator& comm) {
      for (int odd = 0; odd < R; ++odd) {
        for (size_t n : {10, 1024, 5000}) {
          const size_t mine = n + (comm.rank() == odd ? 1 : 0);
          std::vector<float> x(mine, 1.0f);
          bool heard = false;
          try {
            comm.all_reduce(spec_for(Op::AllReduce, wire, mine), wire, x.data(), x.data(), mine);
          } catch (const RankMismatch&) {
            heard = true;
          }
          EXPECT(heard && x == std::vector<float>(mine, 1.0f), "rank ", comm.rank(), ", odd one ", odd);
          x.assign(n, 2.0f);
          comm.all_reduce(spec_for(Op::AllReduce, wire, n), wire, x.data(), x.data(), n);
          EXPECT(x == std::vector<float>(n, 2.0f * static_cast<float>(R)));
        }
      }
    });
  }
}

// Values whose sums round.
std::vector<float> rounding(int rank, size_t n) {
  std::vector<float> values = values_of(rank, n, 3);
  for (size_t i = 0; i < n; ++i) values[i] *= 1.0f + 1e-3f * static_cast<float>(i % 7);
  return values;
}

// In place, of chunks of so many values.
Chunks chunks_of(std::vector<float>& x, size_t each) {
  Chunks chunks;
  for (size_t begin = 0; begin < x.size(); begin += each)
    chunks.list.push_back({begin, std::min(begin + each, x.size())});
  chunks.make = [&x, list = chunks.list](size_t c) { return x.data() + list[c].begin; };
  return chunks;
}

CASE(sums_of_chunks_have_the_bits_of_the_whole) {
  for (const Hosts& hosts : kLayouts) {
    for (Codec codec : {Codec::None, Codec::Fp16, Codec::Int8}) {
      const Wire& wire = wire_of(DType::F32, codec, ReduceOp::Sum);
      with_hosts(hosts, [&](Communicator& comm) {
        for (size_t n : {512, 5000, 70001}) {
          std::vector<float> want = rounding(comm.rank(), n);
          comm.all_reduce(spec_for(Op::AllReduce, wire, n), wire, want.data(), want.data(), n);
          for (size_t each : {512, 4096, 80000}) {
            std::vector<float> x = rounding(comm.rank(), n);
            Chunks chunks = chunks_of(x, each);
            size_t used = 0, ran = 0;
            chunks.use = [&](size_t c) { EXPECT(c == used++); };
            comm.all_reduce_chunks(spec_for(Op::GemmAllReduce, wire, n), wire, chunks, [&] { ++ran; });
            EXPECT(x == want && ran == 1 && used == chunks.list.size(), n, " values, chunks of ", each);
          }
        }
      });
    }
  }
}

// What a rank throws while it makes a chunk reaches its caller; the others, on its host and on others, learn that it is
// gone.
CASE(a_product_that_fails_ends_the_call_on_every_rank) {
  const Wire& wire = wire_of(DType::F32, Codec::None, ReduceOp::Sum);
  for (const Hosts& hosts : kLayouts) {
    std::vector<Asked> asked(static_cast<size_t>(ranks_of(hosts)));
    std::atomic<int> failed{0}, lost{0}, later{0};
    with_hosts(hosts, asked, [&](Communicator& comm) {
      std::vector<float> x(70000, 1.0f);
      Chunks chunks = chunks_of(x, 7000);
      chunks.make = [&, make = chunks.make](size_t c) {
        if (comm.rank() == 1 && c == 5) throw std::runtime_error("no memory for the product");
        return make(c);
      };
      try {
        comm.all_reduce_chunks(spec_for(Op::GemmAllReduce, wire, x.size()), wire, chunks, [] {});
      } catch (const PeerLost&) {
        ++lost;
      } catch (const std::runtime_error& error) {
        EXPECT(comm.rank() == 1 && std::string(error.what()) == "no memory for the product", error.what());
        ++failed;
      }
      try {
        comm.exchange(Op::Barrier, 0);
      } catch (const PeerLost&) {
        ++later;
      }
    });
    EXPECT(failed == 1 && lost == ranks_of(hosts) - 1 && later == ranks_of(hosts));
  }
}

CASE(a_rank_that_leaves_ends_the_calls_of_all_others) {
  const Wire& wire = wire_of(DType::F32, Codec::None, ReduceOp::Sum);
  for (const Hosts& hosts : kLayouts) {
    for (int leaves = 0; leaves < ranks_of(hosts); ++leaves) {
      with_hosts(hosts, [&](Communicator& comm) {
        float x = 1.0f;
        comm.all_reduce(spec_for(Op::AllReduce, wire, 1), wire, &x, &x, 1);
        if (comm.rank() == leaves) return;
        std::string text;
        try {
          comm.all_reduce(spec_for(Op::AllReduce, wire, 1), wire, &x, &x, 1);
        } catch (const PeerLost& error) {
          text = error.what();
        }
        EXPECT(text.find("all_reduce on group 'test'") == 0, text);
      });
    }
  }
}

}  // namespace
