#include "socket_transport.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "core/bytes.h"
#include "core/check.h"
#include "cpu/chunks.h"
#include "one_exchange.h"
#include "opening.h"

namespace tpk {
namespace {

constexpr size_t kTogether = size_t{16} << 10;  // bytes that are copied to leave with the opening, in one call

Source whole(const Input& in, void* out, size_t n) {
  return {{{0, n}}, [in, out](size_t, const std::function<void()>&) { return Source::Made{in, out}; }};
}

Opening opening_at(const char* record) {
  Opening opening;
  std::memcpy(&opening, record, sizeof opening);
  return opening;
}

}  // namespace

SocketCommunicator::SocketCommunicator(std::string name, std::string label, int rank, int world_size, double timeout_s,
                                       std::unique_ptr<SocketExchange> link)
    : GroupCommunicator(std::move(name), std::move(label), rank, world_size, timeout_s, std::move(link)),
      link_(static_cast<SocketExchange&>(exchange())),
      thread_(std::make_unique<CommunicationThread>()) {}

SocketCommunicator::~SocketCommunicator() {
  if (!is_of_this_process()) static_cast<void>(thread_.release());
}

void SocketCommunicator::do_close() {
  GroupCommunicator::do_close();
  thread_.reset();
}

bool SocketCommunicator::sums_in_one_exchange(const Wire& wire, size_t n, bool scatters) const {
  constexpr size_t kToAll = size_t{16} << 10, kLeast = 1024, kMost = 4096;
  if (scatters) return false;
  if (wire.bytes(n) <= std::clamp(kToAll / static_cast<size_t>(std::max(1, world_size() - 1)), kLeast, kMost))
    return true;
  const double bytes = static_cast<double>(wire.bytes(n)), summed = static_cast<double>(n * wire.value_bytes);
  const OneExchange one{static_cast<double>(world_size()), bytes, bytes, summed, false};
  return link_bytes_per_s > 0 && one.is_faster(link_bytes_per_s, link_hop_s);
}

void SocketCommunicator::gather_records(Op op, const char* mine, size_t record_bytes, char* all) {
  const size_t ranks = static_cast<size_t>(world_size()), me = static_cast<size_t>(rank());
  const size_t payload = opening_at(mine).payload_bytes;
  std::vector<char> openings(ranks * Opening::kBytes);
  std::vector<Room> from;
  for (size_t r = 0; r < ranks; ++r) from.push_back({all + r * record_bytes + Opening::kBytes, payload});
  std::memcpy(openings.data() + me * Opening::kBytes, mine, Opening::kBytes);
  exchange_openings(op, std::vector<size_t>(ranks, 1), openings.data(),
                    std::vector<Message>(ranks, {mine + Opening::kBytes, payload}), from);
  for (size_t r = 0; r < ranks; ++r) {
    std::memcpy(all + r * record_bytes, openings.data() + r * Opening::kBytes, Opening::kBytes);
  }
  std::memcpy(from[me].at, mine + Opening::kBytes, payload);
}

bool SocketCommunicator::exchange_openings(Op op, const std::vector<size_t>& counts, char* openings,
                                           const std::vector<Message>& to, const std::vector<Room>& from) {
  const size_t ranks = counts.size(), me = static_cast<size_t>(rank());
  std::vector<size_t> starts{0};
  for (size_t n : counts) starts.push_back(starts.back() + n * Opening::kBytes);
  const auto others = [&](const auto& body) {
    for (size_t r = 0; r < ranks; ++r) {
      if (r != me) body(r);
    }
  };
  std::vector<std::vector<char>> messages(ranks), dropped(ranks);
  others([&](size_t r) {
    const Message with = to.empty() ? Message{} : to[r];
    messages[r].assign(openings + starts[me], openings + starts[me + 1]);
    Opening first = opening_at(messages[r].data());
    first.payload_bytes = with.bytes;  // of the message
    std::memcpy(messages[r].data(), &first, sizeof first);
    const bool together = with.bytes <= kTogether;
    if (together && with.bytes > 0) messages[r].insert(messages[r].end(), with.at, with.at + with.bytes);
    link_.send(r, messages[r].data(), messages[r].size());
    if (!together) link_.send(r, with.at, with.bytes);
    link_.receive(r, openings + starts[r], counts[r] * Opening::kBytes);
    count(counts[me] * Opening::kBytes + with.bytes);
  });
  const SocketExchange::Mark mark = link_.everything_posted();
  std::vector<char> is_open(ranks);
  bool all_fit = true;
  const auto receive_what_follows = [&] {
    bool all_open = true;
    others([&](size_t r) {
      if (!is_open[r] && link_.is_received(mark, r)) {
        is_open[r] = true;
        const size_t bytes = opening_at(openings + starts[r]).payload_bytes;
        const bool fits = bytes == (from.empty() ? 0 : from[r].bytes);
        all_fit &= fits;
        if (!fits) dropped[r].resize(bytes);
        link_.receive(r, fits && bytes > 0 ? from[r].at : dropped[r].data(), bytes);
      }
      all_open &= is_open[r] != 0;
    });
    return all_open;
  };
  const uint64_t started = now_nanoseconds();
  described(op, [&] {
    link_.wait_for_ranks(call_, receive_what_follows);
    link_.wait(call_);
  });
  count_wait(now_nanoseconds() - started);
  return all_fit;
}

void SocketCommunicator::stream(Op op, const Wire& wire, const Move& move) {
  Stream stream{link_, wire, call_, rank(), world_size()};
  described(op, [&] { move(stream); });
  count(stream.sent_bytes);
}

void SocketCommunicator::send_all_reduce(const CallSpec& spec, const Wire& wire, const Input& in, void* out, size_t n,
                                         const std::function<void()>* meanwhile) {
  uint64_t started = now_nanoseconds();
  stream(spec.op, wire, [&](Stream& stream) {
    stream_all_reduce(stream, whole(in, out, n), [&] {
      if (meanwhile == nullptr) return;
      (*meanwhile)();
      started = now_nanoseconds();
    });
  });
  count_wait(now_nanoseconds() - started);
}

void SocketCommunicator::send_reduce_scatter(const CallSpec& spec, const Wire& wire, const Input& in, void* out,
                                             const Cut& cut) {
  const uint64_t started = now_nanoseconds();
  stream(spec.op, wire, [&](Stream& stream) { stream_reduce_scatter(stream, in, out, cut); });
  count_wait(now_nanoseconds() - started);
}

void SocketCommunicator::send_all_gather(const CallSpec& spec, const Wire& wire, const void* in, void* out,
                                         const Cut& cut) {
  const uint64_t started = now_nanoseconds();
  stream(spec.op, wire, [&](Stream& stream) { stream_all_gather(stream, in, out, cut, [](size_t) {}); });
  count_wait(now_nanoseconds() - started);
}

void SocketCommunicator::do_average_with_feedback(const CallSpec& spec, const Wire& wire, const FeedbackAverage& call) {
  open_call(spec);
  const uint64_t started = now_nanoseconds();
  stream(spec.op, wire, [&](Stream& stream) { stream_average_with_feedback(stream, call); });
  count_wait(now_nanoseconds() - started);
}

void SocketCommunicator::overlap(Op op, const std::function<void()>& call, const std::function<void()>& work) {
  link_.set_moving(true);
  try {
    thread_->start([&] {
      struct End {
        SocketExchange& link;
        ~End() { link.set_moving(false); }
      } end{link_};
      call();
    });
    work();
  } catch (const std::exception& error) {
    link_.abandon();
    try {
      thread_->finish();
    } catch (...) {  // the reason is `error`
    }
    link_.close(call_ - 1);
    break_off(concat(describe_call(op), ": ", error.what()));
    throw;
  }
  const uint64_t started = now_nanoseconds();
  thread_->finish();
  count_wait(now_nanoseconds() - started);
}

void SocketCommunicator::sum_chunks(const CallSpec& spec, const Wire& wire, const Chunks& chunks,
                                    const std::function<void(Stream&, const Source&)>& move,
                                    const std::function<void()>& meanwhile) {
  std::vector<void*> made(chunks.list.size());
  std::atomic<size_t> num_made{0};
  const auto wait_for = [&](size_t c, const std::function<void()>& idle) {
    link_.wait_for_thread(call_, [&] {
      idle();
      return num_made.load(std::memory_order_acquire) > c;
    });
    return Source::Made{Input(made[c]), made[c]};
  };
  const Source source{chunks.list, wait_for, chunks.use};
  const auto call = [&] {
    open_call(spec);
    stream(spec.op, wire, [&](Stream& stream) { move(stream, source); });
  };
  overlap(spec.op, call, [&] {
    for (size_t c = 0; c < made.size(); ++c) {
      if (thread_->has_ended()) return;
      made[c] = chunks.make(c);
      num_made.store(c + 1, std::memory_order_release);
      link_.hand_over();
    }
    meanwhile();
  });
}

void SocketCommunicator::do_all_reduce_beside(const CallSpec& spec, const Wire& wire, void* data, size_t n,
                                              const std::function<void()>& meanwhile) {
  if (wire.bytes(n) < kSmallestForThread)
    return GroupCommunicator::do_all_reduce_beside(spec, wire, data, n, meanwhile);
  do_all_reduce_chunks(spec, wire, {{{0, n}}, [&](size_t) { return data; }}, meanwhile);
}

void SocketCommunicator::do_all_reduce_chunks(const CallSpec& spec, const Wire& wire, const Chunks& chunks,
                                              const std::function<void()>& meanwhile) {
  const auto move = [&](Stream& stream, const Source& source) { stream_all_reduce(stream, source, [] {}); };
  sum_chunks(spec, wire, chunks, move, meanwhile);
}

void SocketCommunicator::do_reduce_scatter_chunks(const CallSpec& spec, const Wire& wire, const Chunks& chunks,
                                                  void* out, const Cut& cut, const std::function<void()>& meanwhile) {
  const auto move = [&](Stream& stream, const Source& source) { stream_reduce_scatter(stream, source, out, cut); };
  sum_chunks(spec, wire, chunks, move, meanwhile);
}

void SocketCommunicator::do_all_gather_chunks(const CallSpec& spec, const Wire& wire, const void* in, void* out,
                                              const Cut& cut, const std::vector<size_t>& ends,
                                              const std::function<void()>& meanwhile,
                                              const std::function<void(size_t)>& use) {
  const size_t mine = cut.size(rank());
  char* const own = at(out, cut.start(rank()) * wire.value_bytes);
  std::vector<char> packed(wire.is_plain() ? 0 : wire.bytes(mine));
  if (wire.is_plain()) {
    wire.encode(in, own, mine);
  } else if (mine > 0) {
    wire.encode(in, packed.data(), mine);
    wire.decode(packed.data(), own, mine);
  }
  Ready ready;
  const auto call = [&] {
    struct End {
      Ready& ready;
      ~End() { ready.end(); }
    } end{ready};
    check_parts(spec, open_call(spec), cut);
    stream(spec.op, wire, [&](Stream& stream) {
      const Input input = wire.is_plain() ? Input(own) : Input::packed(packed.data());
      stream_all_gather(stream, input, out, cut, [&](size_t values) { ready.set(values); });
    });
  };
  overlap(spec.op, call, [&] {
    meanwhile();
    for (size_t i = 0; i < ends.size(); ++i) {
      const uint64_t started = now_nanoseconds();
      if (!ready.wait_for(std::min(ends[i], cut.largest()))) return;
      count_wait(now_nanoseconds() - started);
      use(i);
    }
  });
}

}  // namespace tpk
