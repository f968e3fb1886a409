// Sums and gathers whose chunks the calling thread makes or uses while the thread of the group moves them.
#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <thread>

#include "cpu/chunks.h"
#include "socket_ranks.h"

using namespace tpk;

namespace {

constexpr size_t kRow = 640;  // values: rows end inside blocks of fp16

const Wire& wire_of(Codec codec) { return tpk::wire_of(DType::F32, codec, ReduceOp::Sum); }

// Chunks of the full tensor that end at those of `chunk_ends`; `mine` is what each of them copies from.
struct Made {
  Made(Communicator& comm, const Wire& wire, const std::vector<float>& mine, int num_chunks) : mine(mine) {
    comm.forced_chunks = num_chunks;
    size_t begin = 0;
    for (size_t end : chunk_ends(comm, wire, mine.size() / kRow, kRow, 2)) {
      chunks.list.push_back({begin * kRow, end * kRow});
      begin = end;
    }
    chunks.make = [this](size_t c) {
      const Chunks::Chunk& chunk = chunks.list[c];
      const auto at = [this](size_t i) { return this->mine.begin() + static_cast<ptrdiff_t>(i); };
      made.emplace_back(at(chunk.begin), at(chunk.end));
      return static_cast<void*>(made.back().data());
    };
    chunks.use = [this](size_t c) { used.push_back(c); };
  }
  // What the chunks hold now.
  std::vector<float> all() const {
    std::vector<float> values;
    for (const std::vector<float>& chunk : made) values.insert(values.end(), chunk.begin(), chunk.end());
    return values;
  }
  const std::vector<float>& mine;
  Chunks chunks;
  std::vector<std::vector<float>> made;
  std::vector<size_t> used;  // by the thread of the group
};

void sums_of_chunks_are_those_of_the_whole(int world_size, Codec codec) {
  const Wire& wire = wire_of(codec);
  std::vector<Asked> asked(static_cast<size_t>(world_size));
  with_ranks(world_size, asked, [&](Communicator& comm) {
    for (size_t rows : {1, 33, 300, 1000}) {
      const size_t n = rows * kRow;
      std::vector<float> mine = values_of(comm.rank(), n, 3), want(n);
      for (size_t i = 0; i < n; ++i) mine[i] *= 1.0f + 1e-3f * static_cast<float>(i % 7);  // sums that round
      comm.all_reduce(spec_for(Op::AllReduce, wire, n), wire, mine.data(), want.data(), n);
      for (int num_chunks : {1, 2, 3, 7}) {
        Made made(comm, wire, mine, num_chunks);
        int ran = 0;
        comm.all_reduce_chunks(spec_for(Op::GemmAllReduce, wire, n), wire, made.chunks, [&] { ++ran; });
        EXPECT(made.all() == want && ran == 1, rows, " rows in ", made.chunks.list.size(), " chunks");
        EXPECT(made.made.size() == made.chunks.list.size() && made.used.size() == made.made.size());
        EXPECT(std::is_sorted(made.used.begin(), made.used.end()));
      }
    }
    const OpStats whole = comm.stats()[static_cast<size_t>(Op::AllReduce)];
    const OpStats chunked = comm.stats()[static_cast<size_t>(Op::GemmAllReduce)];
    EXPECT(whole.calls == 4 && chunked.calls == 16);
  });
}

CASE(sums_of_chunks_have_the_bits_of_the_whole) {
  for (int world_size : {2, 3}) {
    for (Codec codec : {Codec::None, Codec::Fp16, Codec::Int8})
      sums_of_chunks_are_those_of_the_whole(world_size, codec);
  }
}

void parts_of_chunks_are_those_of_the_whole(int world_size, Codec codec) {
  const Wire& wire = wire_of(codec);
  std::vector<Asked> asked(static_cast<size_t>(world_size));
  with_ranks(world_size, asked, [&](Communicator& comm) {
    for (size_t rows : {1, 50, 700}) {
      const size_t n = rows * kRow;
      const Cut cut = Cut::even(rows, comm.world_size(), kRow);
      const std::vector<float> mine = values_of(comm.rank(), n, 5);
      std::vector<float> want(cut.size(comm.rank())), whole(n);
      comm.reduce_scatter(spec_for(Op::ReduceScatter, wire, n), wire, mine.data(), want.data(), cut);
      for (int num_chunks : {1, 3}) {
        comm.forced_chunks = num_chunks;
        Chunks chunks;
        for (int i = 1; i <= world_size; ++i) {
          const int part = (comm.rank() + i) % world_size;
          size_t begin = 0;
          for (size_t end : chunk_ends(comm, wire, cut.size(part) / kRow, kRow, 1)) {
            if (end > begin) chunks.list.push_back({begin * kRow, end * kRow, part});
            begin = end;
          }
        }
        // Also in the order of panels: every part's first chunk before the second of any.
        if (num_chunks == 3) {
          std::stable_sort(chunks.list.begin(), chunks.list.end(),
                           [](const auto& a, const auto& b) { return (a.begin > 0) < (b.begin > 0); });
        }
        chunks.make = [&](size_t c) {
          return const_cast<float*>(mine.data()) + cut.start(chunks.list[c].part) + chunks.list[c].begin;
        };
        size_t used = 0, own = 0;
        for (const Chunks::Chunk& chunk : chunks.list) own += chunk.part == comm.rank();
        chunks.use = [&](size_t c) { used += chunks.list[c].part == comm.rank(); };
        std::vector<float> out(want.size(), -1.0f);
        comm.reduce_scatter_chunks(spec_for(Op::GemmReduceScatter, wire, n), wire, chunks, out.data(), cut, [] {});
        EXPECT(out == want && used == own, rows, " rows");
      }
      const int64_t brings = static_cast<int64_t>(want.size());
      comm.all_gather(spec_for(Op::AllGather, wire, n, brings), wire, want.data(), whole.data(), cut);
      std::vector<float> out(n, -1.0f);
      const std::vector<size_t> ends{cut.largest() / 3, cut.largest()};
      size_t used = 0;
      const auto holds = [&](int r, size_t values) {  // of that part, in out
        const auto begin = static_cast<ptrdiff_t>(cut.start(r));
        return std::equal(out.begin() + begin, out.begin() + begin + static_cast<ptrdiff_t>(values),
                          whole.begin() + begin);
      };
      comm.all_gather_chunks(
          spec_for(Op::AllGatherGemm, wire, n, brings), wire, want.data(), out.data(), cut, ends,
          [&] { EXPECT(holds(comm.rank(), cut.size(comm.rank())), "this rank's part"); },
          [&](size_t i) {
            EXPECT(i == used++);
            for (int r = 0; r < world_size; ++r) EXPECT(holds(r, std::min(ends[i], cut.size(r))), "part ", r);
          });
      EXPECT(out == whole && used == 2, rows, " rows");
    }
  });
}

CASE(scattered_and_gathered_chunks_have_the_bits_of_the_whole) {
  for (int world_size : {2, 3}) {
    for (Codec codec : {Codec::None, Codec::Fp16, Codec::Int8}) {
      parts_of_chunks_are_those_of_the_whole(world_size, codec);
    }
  }
}

CASE(chunks_are_whole_blocks_and_cover_all_rows) {
  std::vector<Asked> asked(1);
  with_ranks(1, asked, [&](Communicator& comm) {
    for (Codec codec : {Codec::None, Codec::Fp16, Codec::Int8}) {
      const Wire& wire = wire_of(codec);
      for (size_t row_values : {1, 7, 640, 4096}) {
        for (size_t rows : {0, 1, 100, 256, 511, 5000}) {
          for (int num_chunks : {0, 1, 2, 3, 7}) {
            comm.forced_chunks = num_chunks;
            const std::vector<size_t> ends = chunk_ends(comm, wire, rows, row_values, 2);
            EXPECT(ends.back() == rows && ends.size() <= static_cast<size_t>(num_chunks > 0 ? num_chunks : 16));
            for (size_t i = 0; i + 1 < ends.size(); ++i) {
              EXPECT(ends[i] < ends[i + 1] && ends[i] * row_values % wire.block_values == 0, rows, " x ", row_values);
            }
          }
        }
      }
    }
    comm.forced_chunks = 0;
  });
}

// Every value of y is in one block, which ends at blocks of the codec; values of panels lie behind one another.
CASE(blocks_cover_a_product_once) {
  std::vector<Asked> asked(2);
  with_ranks(2, asked, [&](Communicator& comm) {
    for (Codec codec : {Codec::None, Codec::Fp16, Codec::Int8}) {
      const Wire& wire = wire_of(codec);
      for (size_t rows : {1, 3, 100, 301, 512}) {
        for (size_t columns : {1, 63, 640, 1024, 4100}) {
          for (int num_chunks : {0, 1, 2, 3, 7}) {
            comm.forced_chunks = num_chunks;
            const ChunkCut cut = chunks_of_sum(comm, wire, rows, columns, 2);
            std::vector<int> covered(rows * columns);
            size_t end = 0;
            for (const Block& block : blocks_of_sum(comm, wire, cut, rows, columns)) {
              EXPECT(block.begin == end && block.end > end && block.begin % wire.block_values == 0);
              const size_t width = block.last_column - block.column;
              EXPECT(cut.of_columns || width == columns);
              EXPECT(block.end - block.begin == (block.last_row - block.row) * width);
              EXPECT(!cut.of_columns || width % wire.block_values == 0, "blocks of the codec begin with a row");
              for (size_t row = block.row; row < block.last_row; ++row) {
                for (size_t column = block.column; column < block.last_column; ++column)
                  ++covered[row * columns + column];
              }
              end = block.end;
            }
            EXPECT(end == rows * columns && std::count(covered.begin(), covered.end(), 1) == std::ptrdiff_t(end));
          }
        }
      }
    }
  });
}

CASE(the_number_of_chunks_follows_the_link) {
  std::vector<Asked> asked(2);
  with_ranks(2, asked, [&](Communicator& comm) {
    const auto chunks = [&](Codec codec, double link, size_t rows, size_t columns) {
      comm.link_bytes_per_s = link;
      return chunks_of_sum(comm, wire_of(codec), rows, columns, 2).ends.size();
    };
    const double gbit = 1.25e8;
    EXPECT(chunks(Codec::None, gbit, 512, 4096) == 16);
    EXPECT(chunks(Codec::Int8, gbit, 512, 4096) == 8);
    EXPECT(chunks(Codec::None, gbit / 10, 512, 4096) == 16, "the most");
    EXPECT(chunks(Codec::Fp16, gbit / 10, 512, 4096) == 8, "as many as the row has blocks");
    for (Codec codec : {Codec::None, Codec::Fp16, Codec::Int8})
      EXPECT(chunks(codec, 10 * gbit, 512, 4096) == 1, "a link that is faster than the core packs and sends");
    EXPECT(chunks(Codec::Int8, 2.5 * gbit, 512, 4096) == 1, "which hides less than chunks cost");
    EXPECT(chunks(Codec::None, 2.5 * gbit, 512, 4096) == 10, "of more bytes it hides more");
    EXPECT(chunks(Codec::None, gbit, 16, 1024) == 1, "few bytes");
    EXPECT(chunks(Codec::None, gbit, 255, 200) == 1, "few rows of few columns");
    comm.link_bytes_per_s = gbit;
    EXPECT(chunk_ends(comm, wire_of(Codec::None), 512, 4096, 2) == std::vector<size_t>({64, 160, 288, 416, 480, 512}));
  });
}

// Of 512 gathered rows over two ranks, whose product takes 56 ms.
CASE(gathered_rows_are_cut_where_the_link_is_slower_than_the_product) {
  std::vector<Asked> asked(2);
  with_ranks(2, asked, [&](Communicator& comm) {
    const auto ends = [&](Codec codec, double link) {
      comm.link_bytes_per_s = link;
      return ends_of_gathered(comm, wire_of(codec), 512, 4096, 0.056, size_t{32} << 20);
    };
    using Ends = std::vector<size_t>;
    const double gbit = 1.25e8;
    EXPECT(ends(Codec::None, 10 * gbit).empty(), "another pass over the weights costs more than is hidden");
    EXPECT(ends(Codec::None, gbit) == Ends{256}, "all are there soon after the own rows are multiplied");
    EXPECT(ends(Codec::Fp16, gbit) == Ends{256});
    for (Codec codec : {Codec::None, Codec::Fp16, Codec::Int8}) {
      const Ends found = ends(codec, gbit / 20);
      EXPECT(found.size() > 2 && found.back() == 256 && found.front() % 16 == 0, "the last rows are few");
      for (size_t i = 0; i + 1 < found.size(); ++i) EXPECT(found[i] < found[i + 1] && found[i + 1] % 16 == 0);
    }
  });
}

CASE(ranks_that_disagree_about_chunks_all_hear_of_it_and_go_on) {
  std::vector<Asked> asked(3);
  std::atomic<int> refused{0};
  with_ranks(3, asked, [&](Communicator& comm) {
    const Wire& wire = wire_of(Codec::None);
    const size_t n = (comm.rank() == 1 ? 400 : 300) * kRow;
    const std::vector<float> mine(n, 1.0f);
    Made made(comm, wire, mine, 3);
    try {
      comm.all_reduce_chunks(spec_for(Op::GemmAllReduce, wire, n), wire, made.chunks, [] {});
    } catch (const RankMismatch&) {
      ++refused;
    }
    for (const std::vector<float>& chunk : made.made) EXPECT(chunk == std::vector<float>(chunk.size(), 1.0f));
    std::vector<float> x(5000, 1.0f);
    comm.all_reduce(spec_for(Op::AllReduce, wire, x.size()), wire, x.data(), x.data(), x.size());
    EXPECT(x == std::vector<float>(5000, 3.0f));
  });
  EXPECT(refused == 3);
}

// What a rank throws while it makes a chunk reaches its caller; the others learn that it is gone.
CASE(a_product_that_fails_ends_the_call_on_every_rank) {
  std::vector<Asked> asked(3);
  std::atomic<int> failed{0}, lost{0}, later{0};
  with_ranks(3, asked, [&](Communicator& comm) {
    const Wire& wire = wire_of(Codec::Fp16);
    const size_t n = 600 * kRow;
    const std::vector<float> mine(n, 1.0f);
    Made made(comm, wire, mine, 3);
    const auto make = made.chunks.make;
    made.chunks.make = [&](size_t c) {
      if (comm.rank() == 2 && c == 1) throw std::runtime_error("no memory for the product");
      return make(c);
    };
    try {
      comm.all_reduce_chunks(spec_for(Op::GemmAllReduce, wire, n), wire, made.chunks, [] {});
    } catch (const PeerLost&) {
      ++lost;
    } catch (const std::runtime_error& error) {
      EXPECT(comm.rank() == 2 && std::string(error.what()) == "no memory for the product", error.what());
      ++failed;
    }
    try {
      comm.exchange(Op::Barrier, 0);
    } catch (const PeerLost&) {
      ++later;
    }
  });
  EXPECT(failed == 1 && lost == 2 && later == 3);
  EXPECT(asked[2].left_at == 0, "it closes the group as of the call before");
}

CASE(a_rank_that_is_late_with_its_product_is_waited_for_until_the_deadline) {
  std::vector<Asked> asked(2);
  std::atomic<bool> over{false};
  with_ranks(
      2, asked,
      [&](Communicator& comm) {
        const Wire& wire = wire_of(Codec::None);
        const size_t n = 600 * kRow;
        const std::vector<float> mine(n, 1.0f);
        Made made(comm, wire, mine, 3);
        const auto make = made.chunks.make;
        made.chunks.make = [&](size_t c) {
          while (comm.rank() == 1 && c == 1 && !over) std::this_thread::yield();
          return make(c);
        };
        bool late = false;
        try {
          comm.all_reduce_chunks(spec_for(Op::GemmAllReduce, wire, n), wire, made.chunks, [] {});
        } catch (const TimeoutFailure&) {
          late = true;
        } catch (const PeerLost&) {  // at rank 1, of the rank that gave up
        }
        over = true;
        EXPECT(late == (comm.rank() == 0));
      },
      0.5);
  EXPECT(asked[0].late == 1);
}

CASE(a_thread_runs_one_job_after_the_other_and_hands_errors_over) {
  CommunicationThread thread;
  for (int i = 0; i < 100; ++i) {
    int ran = 0;
    thread.start([&] {
      ran = i;
      if (i % 10 == 3) throw std::runtime_error("planted");
    });
    bool threw = false;
    try {
      thread.finish();
    } catch (const std::runtime_error&) {
      threw = true;
    }
    EXPECT(ran == i && threw == (i % 10 == 3) && thread.has_ended());
    thread.finish();  // nothing is left of it
  }
}

}  // namespace
