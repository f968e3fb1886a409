// Collectives as streams of pieces over connections. Torch-free.
//
// Order    every rank posts the messages of a call in one order, a function of its sizes and chunks alone, so that
// bytes
//          need no headers. A rank waits for messages that were posted before, never for later ones, so no circle of
//          ranks waits.
// Pieces   contributions are sent kAhead pieces ahead of the sums, so that a link is busy in both directions while a
//          rank sums. Pieces end at blocks of the codec: the bits do not depend on them.
#pragma once

#include <functional>
#include <vector>

#include "core/communicator.h"
#include "sockets.h"

namespace tpk {

constexpr size_t kPieceWireBytes = size_t{256} << 10;  // some round trips of a link of 10 Gbit
constexpr size_t kAhead = 4;                           // pieces
constexpr size_t kSlots = 2 * kAhead;

// Piece i of n values in pieces: [start, start + values).
struct Piece {
  size_t start, values;
};
std::vector<Piece> pieces_of(size_t begin, size_t end, size_t piece);

// One call of one rank.
struct Stream {
  SocketExchange& link;
  const Wire& wire;
  uint64_t call;
  int rank, world_size;
  // Of a plain sum in fp32 whose values are halves, which are what the owners of parts send back; else none.
  const Wire* halves = nullptr;
  uint64_t sent_bytes = 0;  // so far

  size_t ranks() const { return static_cast<size_t>(world_size); }
  size_t me() const { return static_cast<size_t>(rank); }
  const Wire& sums() const { return halves == nullptr ? wire : *halves; }
  // Values of a piece of a tensor that the ranks sum in equal parts (so that the bytes of a call do not depend on its
  // pieces), and of a piece of each rank's part.
  size_t piece_of_all() const;
  size_t piece_of_part() const;
  void send(size_t to, const void* from, size_t bytes);
  void wait_until_received(const SocketExchange::Mark& mark);
  void wait_until_sent(const SocketExchange::Mark& mark);
  void wait_until_done();
};

// The chunks of a sum, in the order of Chunks.
struct Source {
  std::vector<Chunks::Chunk> list;
  // Of a chunk, from its first value on: the values, and of an all_reduce where the sums are written.
  struct Made {
    Input in;
    void* out;
  };
  // Waits for a chunk; `idle` does what arriving bytes allow meanwhile.
  std::function<Made(size_t chunk, const std::function<void()>& idle)> wait_for;
  std::function<void(size_t chunk)> use = [](size_t) {};  // as in Chunks
};

// The sum over the ranks. `begun` runs once, when the first bytes are under way.
void stream_all_reduce(Stream& stream, const Source& source, const std::function<void()>& begun);

// out = this rank's part of the sum; the full input is there.
void stream_reduce_scatter(Stream& stream, const Input& in, void* out, const Cut& cut);
// The same of chunks: what arrives is kept until this rank's chunks, the last ones, are made.
void stream_reduce_scatter(Stream& stream, const Source& source, void* out, const Cut& cut);

// out = the parts of all ranks. A packed input is in `out` already. arrived(n): of every part the first n values, or
// all of fewer, are in out.
void stream_all_gather(Stream& stream, const Input& in, void* out, const Cut& cut,
                       const std::function<void(size_t values)>& arrived);

// The average over the ranks with error feedback: piece by piece of every part, contributions and sums.
void stream_average_with_feedback(Stream& stream, const FeedbackAverage& call);

}  // namespace tpk
