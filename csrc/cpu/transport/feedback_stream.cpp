#include <algorithm>

#include "core/bytes.h"
#include "scratch.h"
#include "streams.h"

namespace tpk {

// Of piece i each rank packs its values in all parts, sums those of its own part, and sends the sum to everyone. Sums
// are sent kAhead pieces behind the contributions, and unpacked as many behind the sums.
void stream_average_with_feedback(Stream& stream, const FeedbackAverage& call) {
  const Wire& wire = stream.wire;
  const Cut& cut = call.cut;
  const size_t ranks = stream.ranks(), me = stream.me();
  const size_t piece = std::max(wire.values_in(kPieceWireBytes / ranks), wire.block_values);
  const std::vector<Piece> pieces = pieces_of(0, cut.largest(), piece);
  if (pieces.empty()) return;
  const size_t bytes = wire.bytes(pieces[0].values);
  const Scratch memory(kSlots * 3 * ranks * bytes);
  enum Which : size_t { kMine, kReceived, kSums };
  const auto slot = [&](size_t i, Which which, size_t r) {
    return memory.at(((i % kSlots * 3 + which) * ranks + r) * bytes);
  };
  const auto size = [&](size_t i, size_t r) {
    const size_t whole = cut.size(static_cast<int>(r)), start = pieces[i].start;
    return start < whole ? std::min(pieces[i].values, whole - start) : 0;
  };
  // Of part r, where piece i begins.
  const auto values = [&](auto* of, size_t i, size_t r) {
    return at(of, (cut.starts[r] + pieces[i].start) * wire.value_bytes);
  };
  const auto residual = [&](size_t i, size_t r) { return call.residual + cut.starts[r] + pieces[i].start; };
  const auto others = [&](const auto& body) {
    for (size_t r = 0; r < ranks; ++r) {
      if (r != me) body(r);
    }
  };
  std::vector<SocketExchange::Mark> marks(pieces.size());  // of the last messages of each
  const auto post = [&](size_t i, size_t r, const void* from, size_t sent, void* to, size_t received) {
    if (size(i, sent) > 0) stream.send(r, from, wire.bytes(size(i, sent)));
    if (size(i, received) > 0) stream.link.receive(r, to, wire.bytes(size(i, received)));
  };
  const auto moved = [&](size_t i) {
    marks[i] = stream.link.everything_posted();
    stream.link.move();
  };
  const auto begin = [&](size_t i) {
    if (i >= kSlots) stream.wait_until_sent(marks[i - kSlots]);
    for (size_t r = 0; r < ranks; ++r) {
      if (size(i, r) == 0) continue;
      wire.encode_with_feedback(values(call.in, i, r), residual(i, r), slot(i, kMine, r), call.scale, size(i, r));
    }
    others([&](size_t r) { post(i, r, slot(i, kMine, r), r, slot(i, kReceived, r), me); });
    moved(i);
  };
  const auto sum = [&](size_t i) {
    stream.wait_until_received(marks[i]);
    std::vector<const void*> inputs;
    for (size_t r = 0; r < ranks; ++r) inputs.push_back(slot(i, r == me ? kMine : kReceived, r));
    if (size(i, me) > 0) {
      wire.reduce_with_feedback(inputs.data(), stream.world_size, slot(i, kSums, me), residual(i, me),
                                values(call.out, i, me), size(i, me));
    }
    others([&](size_t r) { post(i, r, slot(i, kSums, me), me, slot(i, kSums, r), r); });
    moved(i);
  };
  const auto end = [&](size_t i) {
    stream.wait_until_received(marks[i]);
    others([&](size_t r) {
      if (size(i, r) > 0) wire.decode(slot(i, kSums, r), values(call.out, i, r), size(i, r));
    });
  };
  const size_t n = pieces.size();
  for (size_t i = 0; i < n + kSlots; ++i) {
    if (i >= kSlots) end(i - kSlots);
    if (i < n) begin(i);
    if (i >= kAhead && i - kAhead < n) sum(i - kAhead);
  }
  stream.wait_until_done();
}

}  // namespace tpk
