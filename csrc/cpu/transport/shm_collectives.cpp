// The collectives over shared memory. In short, for R ranks and a message of n values:
//
//   one_shot           small n: everyone copies in, everyone sums all.
//   two_shot           copy in; rank r sums chunk r of all ranks and writes the sum back over what it read, into every
//                      rank's slot; everyone copies out of its own slot. Writing back where one has read keeps the
//                      cache lines moving between two writers, which is 5-10 times faster than rewriting lines that a
//                      peer has only read.
//   two_shot_read      all inputs lie in heaps: summed where they are, sums go through the slots.
//   two_shot_in_place  the same, sums written back over the inputs: nothing is copied at all.
//
// Order    a rank signals piece g only after it has read all it needs of piece g - 1, and writes piece g + 1 only
//          after all have signalled piece g. So two slots are enough, across calls too: pieces are numbered through
//          (turn_).
// Sums     in rank order, whatever the way, so every way gives the same bits.
#include <algorithm>
#include <array>
#include <cstring>

#include "core/bytes.h"
#include "core/check.h"
#include "core/cuts.h"
#include "shm.h"

namespace tpk {
namespace {

// An all_gather moves a quarter of a piece at a time, so that what a rank copies twice is still in its cache.
constexpr size_t kGatherParts = 4;

// The values of a piece cut over the ranks at block boundaries.
Cut chunks_of(const Wire& wire, size_t count, int world_size) {
  return cut_at_blocks(count, world_size, wire.block_values);
}

// Of the part of rank r, what goes in piece p of `piece` values.
size_t values_in_piece(const Cut& cut, int r, size_t p, size_t piece) {
  return p * piece < cut.size(r) ? std::min(piece, cut.size(r) - p * piece) : 0;
}

}  // namespace

// Where some inputs lie in heaps and others do not, all of them go through the slots: those in heaps are copied in now.
template <class CopyIn>
void ShmCommunicator::copy_in_late(const CallSpec& spec, bool in_heap, CopyIn copy_in) {
  if (!anybody_in_heap()) return;
  if (in_heap) copy_in();
  signal(1);
  wait_all(spec.op, 1);
}

size_t ShmCommunicator::piece_values(const Wire& wire, size_t parts) const {
  const size_t block = wire.bytes(wire.block_values);
  // The same on all ranks, before any of them has announced anything.
  TPK_CHECK(parts * block <= layout_.slot_bytes, "group '", label(), "' of ", world_size(), " ranks: ", parts,
            " blocks of ", block, " bytes (", name_of(wire.dtype), ", codec ", name_of(wire.codec),
            ") must fit into a slot, which has ", layout_.slot_bytes, " bytes (an eighth of arena_bytes, ",
            ArenaLayout::kMaxSlotBytes, " at most); open the group with a larger arena_bytes or transport='group'");
  return std::max(wire.values_in(std::min(layout_.slot_bytes, kPieceBytes) / parts), wire.block_values);
}

void ShmCommunicator::do_all_reduce(const CallSpec& spec, const Wire& wire, Input in, void* out, size_t n) {
  all_reduce_with(spec, wire, in, out, n, nullptr);
}

void ShmCommunicator::do_all_reduce_beside(const CallSpec& spec, const Wire& wire, void* data, size_t n,
                                           const std::function<void()>& meanwhile) {
  all_reduce_with(spec, wire, data, data, n, &meanwhile);
}

// Between announcing the input and waiting for the others lies the time that `meanwhile` can have for nothing.
void ShmCommunicator::all_reduce_with(const CallSpec& spec, const Wire& wire, const Input& in, void* out, size_t n,
                                      const std::function<void()>* meanwhile) {
  if (is_one_shot(wire, n)) return one_shot(spec, wire, in, out, n, meanwhile);
  const bool in_heap = wire.is_plain() && heap_.contains(in.values());
  if (!in_heap) copy_in_first(wire, in, n);
  announce(spec, in_heap ? in.values() : nullptr);
  if (meanwhile != nullptr) (*meanwhile)();
  hear_all(spec);
  if (in_heap && everybody_in_heap()) {
    count_heap_input();
    return in.values() == out ? two_shot_in_place(spec, wire, out, n) : two_shot_read(spec, wire, out, n);
  }
  copy_in_late(spec, in_heap, [&] { copy_in_first(wire, in, n); });
  two_shot(spec, wire, in, out, n);
}

void ShmCommunicator::one_shot(const CallSpec& spec, const Wire& wire, const Input& in, void* out, size_t n,
                               const std::function<void()>* meanwhile) {
  in.encode(wire, slot(rank(), 0), n);
  announce(spec, nullptr);
  if (meanwhile != nullptr) (*meanwhile)();
  hear_all(spec);
  for (int r = 0; r < world_size(); ++r) inputs_[static_cast<size_t>(r)] = slot(r, 0);
  if (wire.is_plain()) {
    wire.reduce_to_values(inputs_.data(), world_size(), out, n);
  } else {
    // Packed again as a two-shot's owner would, so that the size of a message does not change its bits.
    std::array<char, kMostOneShotBytes> packed;
    void* const result = packed.data();
    wire.reduce_and_decode(inputs_.data(), world_size(), &result, 1, out, n);
  }
  count(static_cast<uint64_t>(world_size() - 1) * wire.bytes(n));
  turn_ += 1;
}

void ShmCommunicator::copy_in_first(const Wire& wire, const Input& in, size_t n) {
  const size_t count = std::min(n, piece_values(wire, 1));
  copy_in(wire, in, 0, chunks_of(wire, count, world_size()), 0);
}

// This rank's own chunk of a plain message is not copied: only this rank reads it.
void ShmCommunicator::copy_in(const Wire& wire, const Input& in, size_t start, const Cut& chunks, size_t piece) {
  char* to = slot(rank(), piece);
  const Input from = in.from(wire, start);
  if (!wire.is_plain()) return from.encode(wire, to, chunks.total());
  const size_t mine = chunks.start(rank()) * wire.value_bytes, after = mine + chunks.size(rank()) * wire.value_bytes;
  wire.encode(from.values(), to, chunks.start(rank()));
  wire.encode(at(from.values(), after), to + after, chunks.total() - after / wire.value_bytes);
}

// All but this rank's own chunk, which it has written already.
void ShmCommunicator::copy_out(const Wire& wire, void* out, size_t start, const Cut& chunks, size_t piece) {
  const size_t mine = chunks.start(rank()), after = mine + chunks.size(rank());
  wire.decode_around(mine, after, slot(rank(), piece), at(out, start * wire.value_bytes), chunks.total());
}

void ShmCommunicator::reduce_chunk(const Wire& wire, const Input& in, void* out, size_t start, const Cut& chunks,
                                   size_t piece) {
  const size_t offset = wire.offset(chunks.start(rank())), n = chunks.size(rank());
  const size_t value_offset = (start + chunks.start(rank())) * wire.value_bytes;
  void* const own = at(out, value_offset);
  int num_outputs = 0;
  for (int r = 0; r < world_size(); ++r) {
    const bool direct = wire.is_plain() && r == rank();
    inputs_[static_cast<size_t>(r)] = direct ? at(in.values(), value_offset) : slot(r, piece) + offset;
    const bool is_output = r != rank() || (world_size() == 1 && !direct);  // a wire has to go somewhere
    if (is_output) outputs_[static_cast<size_t>(num_outputs++)] = slot(r, piece) + offset;
  }
  if (wire.is_plain()) {
    outputs_[static_cast<size_t>(num_outputs++)] = own;
    wire.reduce(inputs_.data(), world_size(), outputs_.data(), num_outputs, n);
  } else {
    wire.reduce_and_decode(inputs_.data(), world_size(), outputs_.data(), num_outputs, own, n);
  }
  const size_t others = static_cast<size_t>(world_size() - 1), chunk_bytes = wire.bytes(n);
  count(wire.bytes(chunks.total()) - chunk_bytes + others * chunk_bytes);
}

void ShmCommunicator::two_shot(const CallSpec& spec, const Wire& wire, const Input& in, void* out, size_t n) {
  const size_t piece = piece_values(wire, 1);
  const size_t pieces = (n + piece - 1) / piece;
  for (size_t p = 0; p < pieces; ++p) {
    const Cut chunks = chunks_of(wire, std::min(piece, n - p * piece), world_size());
    if (p > 0) wait_all(spec.op, 1 + 2 * p);
    reduce_chunk(wire, in, out, p * piece, chunks, p);
    signal(2 + 2 * p);
    if (p + 1 < pieces) {  // the next piece on its way while the others finish this one
      const size_t next = (p + 1) * piece;
      copy_in(wire, in, next, chunks_of(wire, std::min(piece, n - next), world_size()), p + 1);
      signal(3 + 2 * p);
    }
    wait_all(spec.op, 2 + 2 * p);
    copy_out(wire, out, p * piece, chunks, p);
  }
  turn_ += pieces;
}

void ShmCommunicator::two_shot_read(const CallSpec& spec, const Wire& wire, void* out, size_t n) {
  const size_t piece = piece_values(wire, 1);
  const size_t pieces = (n + piece - 1) / piece;
  for (size_t p = 0; p < pieces; ++p) {
    const Cut chunks = chunks_of(wire, std::min(piece, n - p * piece), world_size());
    const size_t mine = chunks.start(rank()) * wire.value_bytes, base = p * piece * wire.value_bytes;
    for (int r = 0; r < world_size(); ++r) inputs_[static_cast<size_t>(r)] = heap_input(r) + base + mine;
    void* const outputs[2] = {at(out, base + mine), slot(rank(), p) + mine};
    wire.reduce(inputs_.data(), world_size(), outputs, 2, chunks.size(rank()));
    signal(2 + p);
    wait_all(spec.op, 2 + p);
    for (int r = 0; r < world_size(); ++r) {
      const size_t offset = chunks.start(r) * wire.value_bytes;
      if (r != rank()) wire.decode(slot(r, p) + offset, at(out, base + offset), chunks.size(r));
    }
    count(wire.bytes(chunks.total() - chunks.size(rank())) +
          static_cast<size_t>(world_size() - 1) * wire.bytes(chunks.size(rank())));
  }
  turn_ += pieces;
}

void ShmCommunicator::two_shot_in_place(const CallSpec& spec, const Wire& wire, void* data, size_t n) {
  const Cut chunks = chunks_of(wire, n, world_size());
  const size_t mine = chunks.start(rank()) * wire.value_bytes;
  for (int r = 0; r < world_size(); ++r) {
    char* theirs = (r == rank() ? static_cast<char*>(data) : heap_input(r)) + mine;
    inputs_[static_cast<size_t>(r)] = theirs;
    outputs_[static_cast<size_t>(r)] = theirs;
  }
  wire.reduce(inputs_.data(), world_size(), outputs_.data(), world_size(), chunks.size(rank()));
  signal(2);
  wait_all(spec.op, 2);
  count(wire.bytes(n - chunks.size(rank())) + static_cast<size_t>(world_size() - 1) * wire.bytes(chunks.size(rank())));
}

void ShmCommunicator::do_reduce_scatter(const CallSpec& spec, const Wire& wire, Input in, void* out, const Cut& cut) {
  const size_t ranks = static_cast<size_t>(world_size());
  const size_t piece = piece_values(wire, ranks), stride = wire.bytes(piece);
  const size_t pieces = std::max<size_t>(1, (cut.largest() + piece - 1) / piece);
  const bool in_heap = wire.is_plain() && heap_.contains(in.values());
  const auto part = [&](int r, size_t p) { return values_in_piece(cut, r, p, piece); };
  const auto fill = [&](size_t p) {
    for (int r = 0; r < world_size(); ++r) {
      if (r == rank() && wire.is_plain()) continue;
      if (part(r, p) == 0) continue;
      in.of_part(wire, cut.starts, static_cast<size_t>(r), p * piece)
          .encode(wire, slot(rank(), p) + static_cast<size_t>(r) * stride, part(r, p));
      if (r != rank()) count(wire.bytes(part(r, p)));
    }
  };
  if (!in_heap) fill(0);
  announce(spec, in_heap ? in.values() : nullptr);
  hear_all(spec);
  if (in_heap && everybody_in_heap()) {
    count_heap_input();
    return reduce_scatter_read(spec, wire, out, cut);
  }
  copy_in_late(spec, in_heap, [&] { fill(0); });
  for (size_t p = 0; p < pieces; ++p) {
    if (p > 0) {
      fill(p);
      signal(1 + p);
      wait_all(spec.op, 1 + p);
    }
    int num_outputs = 0;  // out first, then back over what was read
    outputs_[static_cast<size_t>(num_outputs++)] = at(out, p * piece * wire.value_bytes);
    for (int r = 0; r < world_size(); ++r) {
      char* theirs = slot(r, p) + static_cast<size_t>(rank()) * stride;
      const bool direct = r == rank() && wire.is_plain();
      inputs_[static_cast<size_t>(r)] =
          direct ? at(in.values(), (cut.start(r) + p * piece) * wire.value_bytes) : theirs;
      if (!direct) outputs_[static_cast<size_t>(num_outputs++)] = theirs;
    }
    if (wire.is_plain()) {
      wire.reduce(inputs_.data(), world_size(), outputs_.data(), num_outputs, part(rank(), p));
    } else {
      wire.reduce_to_values(inputs_.data(), world_size(), outputs_[0], part(rank(), p));
    }
  }
  turn_ += pieces;
}

void ShmCommunicator::reduce_scatter_read(const CallSpec& spec, const Wire& wire, void* out, const Cut& cut) {
  for (int r = 0; r < world_size(); ++r) {
    inputs_[static_cast<size_t>(r)] = heap_input(r) + cut.start(rank()) * wire.value_bytes;
  }
  wire.reduce_to_values(inputs_.data(), world_size(), out, cut.size(rank()));
  count(wire.bytes(cut.total() - cut.size(rank())));
  signal(2);
  wait_all(spec.op, 2);  // no rank may change its input while another reads it
}

void ShmCommunicator::do_all_gather(const CallSpec& spec, const Wire& wire, const void* in, void* out, const Cut& cut) {
  const size_t piece = piece_values(wire, kGatherParts);
  const size_t pieces = std::max<size_t>(1, (cut.largest() + piece - 1) / piece);
  const bool in_heap = wire.is_plain() && heap_.contains(in);
  const auto part = [&](int r, size_t p) { return values_in_piece(cut, r, p, piece); };
  const auto place = [&](int r, size_t p) { return at(out, (cut.start(r) + p * piece) * wire.value_bytes); };
  const auto fill = [&](size_t p) {
    wire.encode(at(in, p * piece * wire.value_bytes), slot(rank(), p), part(rank(), p));
  };
  if (!in_heap) fill(0);
  announce(spec, in_heap ? in : nullptr);
  hear_all(spec);
  refuse_as_one_piece([&] { check_parts(spec, announced(), cut); });
  count(static_cast<size_t>(world_size() - 1) * wire.bytes(cut.size(rank())));
  if (in_heap && everybody_in_heap()) {
    count_heap_input();
    return all_gather_read(spec, wire, in, out, cut);
  }
  copy_in_late(spec, in_heap, [&] { fill(0); });
  for (size_t p = 0; p < pieces; ++p) {
    if (p > 0) {
      fill(p);
      signal(1 + p);
    }
    // This rank's own part, while the others come: its values are in the cache.
    if (wire.is_plain()) wire.encode(at(in, p * piece * wire.value_bytes), place(rank(), p), part(rank(), p));
    if (p > 0) wait_all(spec.op, 1 + p);
    for (int r = 0; r < world_size(); ++r) {
      if (r == rank() && wire.is_plain()) continue;
      wire.decode(slot(r, p), place(r, p), part(r, p));
      touch_back(wire, r, place(r, p), slot(r, p), part(r, p));
    }
  }
  turn_ += pieces;
}

void ShmCommunicator::all_gather_read(const CallSpec& spec, const Wire& wire, const void* in, void* out,
                                      const Cut& cut) {
  for (int r = 0; r < world_size(); ++r) {
    char* const to = at(out, cut.start(r) * wire.value_bytes);
    const void* const from = r == rank() ? in : heap_input(r);
    wire.decode(from, to, cut.size(r));
    if (r != rank()) touch_back(wire, r, to, heap_input(r), cut.size(r));
  }
  signal(2);
  wait_all(spec.op, 2);  // no rank may change its input while another reads it
}

// Writes the values that this rank has read from rank r over the lines it read them from. That changes nothing but who
// wrote the lines last, and an owner rewrites lines that a peer has written several times faster than lines that a peer
// has only read. One reader of each rank does it; beyond a piece the lines have left the caches anyway.
void ShmCommunicator::touch_back(const Wire& wire, int r, const char* values, char* lines, size_t n) const {
  const bool mine_to_do = wire.is_plain() && rank() == (r + 1) % world_size();
  if (n == 0 || !mine_to_do || n * wire.value_bytes > kPieceBytes) return;
  std::memcpy(lines, values, n * wire.value_bytes);
}

// A slot has the sizes that this rank sends and expects, then a stripe for each rank. So every rank compares the sizes
// of all before any data is read.
void ShmCommunicator::do_all_to_all(const CallSpec& spec, const Wire& wire, const void* in, void* out, const Cut& send,
                                    const Cut& receive) {
  const size_t ranks = static_cast<size_t>(world_size());
  const size_t header = (2 * ranks * sizeof(uint64_t) + 63) / 64 * 64;
  const size_t room = std::min(layout_.slot_bytes, kPieceBytes);
  TPK_CHECK(room >= header + ranks * wire.value_bytes, "group '", label(), "' of ", ranks,
            " ranks: the sizes of an all_to_all do not fit into a slot of ", layout_.slot_bytes, " bytes");
  const size_t piece = wire.values_in((room - header) / ranks), stride = wire.bytes(piece);
  const auto part = [&](const Cut& cut, int r, size_t p) { return values_in_piece(cut, r, p, piece); };
  const auto stripe = [&](int of, int to, size_t p) { return slot(of, p) + header + static_cast<size_t>(to) * stride; };
  const auto fill = [&](size_t p) {
    for (int r = 0; r < world_size(); ++r) {
      const size_t n = r == rank() ? 0 : part(send, r, p);
      wire.encode(at(in, (send.start(r) + p * piece) * wire.value_bytes), stripe(rank(), r, p), n);
      count(wire.bytes(n));
    }
  };
  uint64_t* const sizes = reinterpret_cast<uint64_t*>(slot(rank(), 0));
  for (int r = 0; r < world_size(); ++r) {
    sizes[r] = send.size(r);
    sizes[ranks + static_cast<size_t>(r)] = receive.size(r);
  }
  fill(0);
  announce(spec, nullptr);
  hear_all(spec);
  uint64_t largest = 0;
  refuse_as_one_piece([&] {
    std::vector<const uint64_t*> sends, receives;
    for (int r = 0; r < world_size(); ++r) {
      sends.push_back(reinterpret_cast<const uint64_t*>(slot(r, 0)));
      receives.push_back(sends.back() + ranks);
    }
    largest = check_pairs(spec, sends, receives);
  });
  const size_t pieces = std::max<size_t>(1, (largest + piece - 1) / piece);
  for (size_t p = 0; p < pieces; ++p) {
    if (p > 0) {
      fill(p);
      signal(1 + p);
    }
    const auto place = [&](int r) { return at(out, (receive.start(r) + p * piece) * wire.value_bytes); };
    const size_t own = (send.start(rank()) + p * piece) * wire.value_bytes;
    wire.encode(at(in, own), place(rank()), part(send, rank(), p));
    if (p > 0) wait_all(spec.op, 1 + p);
    for (int r = 0; r < world_size(); ++r) {
      const size_t n = part(receive, r, p);
      if (r == rank() || n == 0) continue;
      wire.decode(stripe(r, rank(), p), place(r), n);
      std::memcpy(stripe(r, rank(), p), place(r), n * wire.value_bytes);  // as touch_back
    }
  }
  turn_ += pieces;
}

std::vector<int64_t> ShmCommunicator::do_exchange(const CallSpec& spec) {
  announce(spec, nullptr);
  hear_all(spec);
  std::vector<int64_t> all;
  for (int r = 0; r < world_size(); ++r) all.push_back(record(r).mine);
  return all;
}

}  // namespace tpk
