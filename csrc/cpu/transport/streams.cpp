#include "streams.h"

#include <algorithm>
#include <utility>

#include "core/cuts.h"
#include "core/moves.h"
#include "scratch.h"

namespace tpk {
namespace {

using Mark = SocketExchange::Mark;

// Rank r gets part r of each piece of everyone, sums it, and sends the sum to everyone.
class AllReduce {
 public:
  static constexpr size_t kNone = SIZE_MAX;

  AllReduce(Stream& stream, const std::function<void(size_t)>& use, size_t piece)
      : stream_(stream),
        wire_(stream.wire),
        sums_(stream.sums()),
        use_(use),
        bytes_((wire_.bytes(piece) + stream.ranks() * wire_.bytes(wire_.block_values) + 63) / 64 * 64),
        num_memories_(!wire_.is_plain()          ? 3
                      : stream.halves != nullptr ? 2
                                                 : 1),
        memory_(kSlots * num_memories_ * bytes_) {}

  // `in` and `out` begin where the piece does, of which `chunk` is the one that it ends, or kNone.
  void begin(const Input& in, void* out, const Piece& piece, size_t chunk) {
    if (begun_ - ended_ == kSlots) end();
    State& slot = states_[begun_ % kSlots];
    if (begun_ >= kSlots && !wire_.is_plain()) stream_.wait_until_sent(slot.mark);
    slot.piece = piece;
    slot.out = out;
    slot.chunk = chunk;
    slot.cut = cut_at_blocks(piece.values, stream_.world_size, wire_.block_values);
    slot.contribution = static_cast<const char*>(in.values());
    if (!wire_.is_plain() && !in.is_packed()) {
      char* const packed = memory(begun_, 1);
      wire_.encode(in.values(), packed, piece.values);
      slot.contribution = packed;
    }
    const size_t mine = wire_.bytes(slot.cut.size(stream_.rank));
    for (size_t r = 0; r < stream_.ranks(); ++r) {
      if (r == stream_.me()) continue;
      stream_.send(r, slot.contribution + wire_.offset(slot.cut.starts[r]), part_bytes(slot, r));
      stream_.link.receive(r, memory(begun_, 0) + r * mine, mine);
    }
    slot.mark = stream_.link.everything_posted();
    stream_.link.move();
    ++begun_;
  }

  void sum() {
    State& slot = states_[summed_ % kSlots];
    stream_.wait_until_received(slot.mark);
    const size_t me = stream_.me(), mine = part_bytes(slot, me);
    std::vector<const void*> inputs;
    for (size_t r = 0; r < stream_.ranks(); ++r) {
      inputs.push_back(r == me ? slot.contribution + wire_.offset(slot.cut.starts[me]) : memory(summed_, 0) + r * mine);
    }
    const bool rounds = stream_.halves != nullptr;
    void* const sent = sum_of(summed_, me);
    void* const total = rounds ? memory(summed_, 1) : sent;
    const size_t start = slot.cut.starts[me], n = slot.cut.size(stream_.rank);
    if (wire_.is_plain()) {
      wire_.reduce(inputs.data(), stream_.world_size, &total, 1, n);
      if (rounds) {
        moves().dtypes[static_cast<size_t>(sums_.dtype)].from_floats(static_cast<const float*>(total), sent, n);
      }
    } else {
      wire_.reduce_and_decode(inputs.data(), stream_.world_size, &total, 1, at(slot.out, start * wire_.value_bytes), n);
    }
    for (size_t r = 0; r < stream_.ranks(); ++r) {
      if (r == me) continue;
      stream_.send(r, sent, sums_.bytes(n));
      stream_.link.receive(r, sum_of(summed_, r), sums_.bytes(slot.cut.size(static_cast<int>(r))));
    }
    slot.mark = stream_.link.everything_posted();
    stream_.link.move();
    ++summed_;
  }

  size_t begun() const { return begun_; }
  size_t summed() const { return summed_; }
  void end_what_has_arrived() {
    while (ended_ < summed_ && stream_.link.is_received(states_[ended_ % kSlots].mark)) end();
  }
  void end_all() {
    while (ended_ < summed_) end();
  }

 private:
  struct State {
    Piece piece{};
    void* out = nullptr;
    size_t chunk = kNone;
    Cut cut;  // over the ranks
    const char* contribution = nullptr;
    Mark mark;  // of its last messages
  };

  void end() {
    State& slot = states_[ended_ % kSlots];
    stream_.wait_until_received(slot.mark);
    if (!wire_.is_plain()) {  // this rank's part is there
      const size_t mine = slot.cut.starts[stream_.me()], after = mine + slot.cut.size(stream_.rank);
      wire_.decode_around(mine, after, memory(ended_, 2), slot.out, slot.piece.values);
    }
    if (slot.chunk != kNone) use_(slot.chunk);
    ++ended_;
  }
  // Of piece i: 0 the contributions of others, 1 its own, or its sum before it is rounded, 2 the sums.
  char* memory(size_t i, size_t which) const { return memory_.at((i % kSlots * num_memories_ + which) * bytes_); }
  // Where the sum of part r of piece i is.
  char* sum_of(size_t i, size_t r) const {
    const State& slot = states_[i % kSlots];
    if (wire_.is_plain()) return at(slot.out, slot.cut.starts[r] * sums_.value_bytes);
    return memory(i, 2) + wire_.offset(slot.cut.starts[r]);
  }
  size_t part_bytes(const State& slot, size_t r) const { return wire_.bytes(slot.cut.size(static_cast<int>(r))); }

  Stream& stream_;
  const Wire& wire_;
  const Wire& sums_;
  const std::function<void(size_t)>& use_;
  const size_t bytes_;  // of each of a slot's memories
  const size_t num_memories_;
  Scratch memory_;
  State states_[kSlots];
  size_t begun_ = 0, summed_ = 0, ended_ = 0;  // pieces
};

}  // namespace

std::vector<Piece> pieces_of(size_t begin, size_t end, size_t piece) {
  std::vector<Piece> pieces;
  for (size_t start = begin; start < end; start += piece) pieces.push_back({start, std::min(piece, end - start)});
  return pieces;
}

size_t Stream::piece_of_all() const {
  const size_t even = wire.block_values * ranks();
  return std::max(wire.values_in(kPieceWireBytes) / even * even, even);
}

size_t Stream::piece_of_part() const {
  return std::max(wire.values_in(kPieceWireBytes / std::max<size_t>(ranks() - 1, 1)), wire.block_values);
}

void Stream::send(size_t to, const void* from, size_t bytes) {
  link.send(to, from, bytes);
  sent_bytes += bytes;
}

void Stream::wait_until_received(const Mark& mark) {
  if (!link.is_received(mark)) link.wait_for_ranks(call, [&] { return link.is_received(mark); });
}

void Stream::wait_until_sent(const Mark& mark) {
  if (!link.is_sent(mark)) link.wait_for_ranks(call, [&] { return link.is_sent(mark); });
}

void Stream::wait_until_done() { link.wait(call); }

void stream_all_reduce(Stream& stream, const Source& source, const std::function<void()>& begun) {
  const Wire& wire = stream.wire;
  const size_t n = source.list.back().end, piece = stream.piece_of_all();
  AllReduce run(stream, source.use, std::min(piece, std::max(n, wire.block_values)));
  bool first = true;
  for (size_t c = 0; c < source.list.size(); ++c) {
    const Chunks::Chunk& chunk = source.list[c];
    const Source::Made made = source.wait_for(c, [&] { run.end_what_has_arrived(); });
    const size_t before = run.begun();
    for (const Piece& each : pieces_of(chunk.begin, chunk.end, piece)) {
      const size_t start = each.start - chunk.begin;
      const bool is_last = each.start + each.values == chunk.end;
      run.begin(made.in.from(wire, start), at(made.out, start * stream.sums().value_bytes), each,
                is_last ? c : AllReduce::kNone);
      if (std::exchange(first, false)) begun();
      if (run.begun() - run.summed() > kAhead) run.sum();
    }
    // The sums of the chunk before go behind the contributions of this one, which are there: while a rank waits for
    // the last contributions of the others, the link is busy.
    while (run.summed() < before) run.sum();
    run.end_what_has_arrived();
  }
  while (run.summed() < run.begun()) run.sum();
  run.end_all();
  stream.wait_until_done();
}

void stream_reduce_scatter(Stream& stream, const Input& in, void* out, const Cut& cut) {
  const Wire& wire = stream.wire;
  const bool packs = !wire.is_plain() && !in.is_packed();
  const std::vector<Piece> pieces = pieces_of(0, cut.largest(), stream.piece_of_part());
  if (pieces.empty()) return;
  const size_t ranks = stream.ranks(), me = stream.me(), bytes = wire.bytes(pieces[0].values);
  const Scratch memory(kSlots * 2 * ranks * bytes);
  const auto slot = [&](size_t i, size_t which) { return memory.at((i % kSlots * 2 + which) * ranks * bytes); };
  const auto size = [&](size_t i, size_t r) {
    const size_t whole = cut.size(static_cast<int>(r)), start = pieces[i].start;
    return start < whole ? std::min(pieces[i].values, whole - start) : 0;
  };
  std::vector<Mark> marks(pieces.size());
  const auto contribution = [&](size_t i, size_t r) -> const void* {
    return packs ? slot(i, 1) + r * bytes : in.of_part(wire, cut.starts, r, pieces[i].start).values();
  };
  for (size_t i = 0; i < pieces.size() + kAhead; ++i) {
    if (i < pieces.size()) {
      if (i >= kSlots) stream.wait_until_sent(marks[i - kSlots]);
      for (size_t r = 0; r < ranks; ++r) {
        if (packs && size(i, r) > 0) {
          in.of_part(wire, cut.starts, r, pieces[i].start).encode(wire, slot(i, 1) + r * bytes, size(i, r));
        }
        if (r == me) continue;
        if (size(i, r) > 0) stream.send(r, contribution(i, r), wire.bytes(size(i, r)));
        stream.link.receive(r, slot(i, 0) + r * bytes, wire.bytes(size(i, me)));
      }
      marks[i] = stream.link.everything_posted();
      stream.link.move();
    }
    if (i < kAhead || size(i - kAhead, me) == 0) continue;
    const size_t j = i - kAhead;
    stream.wait_until_received(marks[j]);
    std::vector<const void*> inputs;
    for (size_t r = 0; r < ranks; ++r) inputs.push_back(r == me ? contribution(j, me) : slot(j, 0) + r * bytes);
    wire.reduce_to_values(inputs.data(), stream.world_size, at(out, pieces[j].start * wire.value_bytes), size(j, me));
  }
  stream.wait_until_done();
}

void stream_reduce_scatter(Stream& stream, const Source& source, void* out, const Cut& cut) {
  const Wire& wire = stream.wire;
  const size_t ranks = stream.ranks(), me = stream.me(), mine = cut.size(stream.rank), part = wire.bytes(mine);
  const Scratch received(ranks * part);
  struct Expected {
    Piece piece;
    size_t chunk;
    Mark mark;
  };
  std::vector<Expected> expected;  // of this rank's part
  for (size_t c = 0; c < source.list.size(); ++c) {
    const Chunks::Chunk& chunk = source.list[c];
    if (chunk.part != stream.rank) continue;
    for (const Piece& piece : pieces_of(chunk.begin, chunk.end, stream.piece_of_part())) {
      for (size_t r = 0; r < ranks; ++r) {
        char* const to = received.at(r * part + wire.offset(piece.start));
        if (r != me) stream.link.receive(r, to, wire.bytes(piece.values));
      }
      expected.push_back({piece, c, stream.link.everything_posted()});
    }
  }
  std::vector<const void*> made(source.list.size());  // on the wire
  std::vector<Scratch> packed;                        // one for each chunk
  packed.reserve(source.list.size());
  size_t next = 0;  // that is summed
  const auto can_sum = [&] { return next < expected.size() && made[expected[next].chunk] != nullptr; };
  const auto sum = [&] {
    const auto& [piece, c, mark] = expected[next];
    stream.wait_until_received(mark);
    std::vector<const void*> inputs;
    for (size_t r = 0; r < ranks; ++r) {
      inputs.push_back(r == me ? at(made[c], wire.offset(piece.start - source.list[c].begin))
                               : received.at(r * part + wire.offset(piece.start)));
    }
    wire.reduce_to_values(inputs.data(), stream.world_size, at(out, piece.start * wire.value_bytes), piece.values);
    if (piece.start + piece.values == source.list[c].end) source.use(c);
    ++next;
  };
  const auto sum_what_has_arrived = [&] {
    while (can_sum() && stream.link.is_received(expected[next].mark)) sum();
  };
  for (size_t c = 0; c < source.list.size(); ++c) {
    const Chunks::Chunk& chunk = source.list[c];
    const size_t to = static_cast<size_t>(chunk.part), n = chunk.end - chunk.begin;
    made[c] = source.wait_for(c, sum_what_has_arrived).in.values();
    if (!wire.is_plain()) {
      packed.emplace_back(wire.bytes(n));
      wire.encode(made[c], packed.back().at(0), n);
      made[c] = packed.back().at(0);
    }
    if (to == me) continue;
    stream.send(to, made[c], wire.bytes(n));
    stream.link.move();
  }
  while (can_sum()) sum();
  stream.wait_until_done();
}

void stream_all_gather(Stream& stream, const Input& in, void* out, const Cut& cut,
                       const std::function<void(size_t values)>& arrived) {
  const Wire& wire = stream.wire;
  const std::vector<Piece> pieces = pieces_of(0, cut.largest(), stream.piece_of_part());
  if (pieces.empty()) return;
  const size_t ranks = stream.ranks(), me = stream.me(), bytes = wire.is_plain() ? 0 : wire.bytes(pieces[0].values);
  const Scratch memory(kSlots * ranks * bytes);  // of this rank, what it sends
  const auto slot = [&](size_t i, size_t r) { return memory.at((i % kSlots * ranks + r) * bytes); };
  const auto size = [&](size_t i, size_t r) {
    const size_t whole = cut.size(static_cast<int>(r)), start = pieces[i].start;
    return start < whole ? std::min(pieces[i].values, whole - start) : 0;
  };
  const auto target = [&](size_t i, size_t r) { return at(out, (cut.starts[r] + pieces[i].start) * wire.value_bytes); };
  std::vector<Mark> marks(pieces.size());
  const auto begin = [&](size_t i) {
    if (i >= kSlots && !wire.is_plain()) stream.wait_until_sent(marks[i - kSlots]);
    const size_t mine = size(i, me);
    const void* from = mine > 0 ? in.from(wire, pieces[i].start).values() : nullptr;
    if (wire.is_plain()) {
      wire.encode(from, target(i, me), mine);
    } else if (!in.is_packed() && mine > 0) {
      wire.encode(from, slot(i, me), mine);
      wire.decode(slot(i, me), target(i, me), mine);
      from = slot(i, me);
    }
    for (size_t r = 0; r < ranks; ++r) {
      if (r == me) continue;
      stream.send(r, from, wire.bytes(mine));
      stream.link.receive(r, wire.is_plain() ? target(i, r) : slot(i, r), wire.bytes(size(i, r)));
    }
    marks[i] = stream.link.everything_posted();
    stream.link.move();
  };
  const auto end = [&](size_t i) {
    stream.wait_until_received(marks[i]);
    for (size_t r = 0; r < ranks && !wire.is_plain(); ++r) {
      if (r != me && size(i, r) > 0) wire.decode(slot(i, r), target(i, r), size(i, r));
    }
    arrived(pieces[i].start + pieces[i].values);
  };
  for (size_t i = 0; i < pieces.size() + kAhead; ++i) {
    if (i < pieces.size()) begin(i);
    if (i >= kAhead) end(i - kAhead);
  }
  stream.wait_until_done();
}

}  // namespace tpk
