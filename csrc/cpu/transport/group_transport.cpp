#include "group_transport.h"

#include <algorithm>
#include <cstring>

#include "core/arena.h"
#include "core/bytes.h"
#include "core/check.h"
#include "core/cuts.h"
#include "core/errors.h"
#include "opening.h"

namespace tpk {
namespace {

std::vector<size_t> starts_of(const std::vector<size_t>& sizes) {
  std::vector<size_t> starts{0};
  for (size_t size : sizes) starts.push_back(starts.back() + size);
  return starts;
}

}  // namespace

GroupCommunicator::GroupCommunicator(std::string name, std::string label, int rank, int world_size, double timeout_s,
                                     std::unique_ptr<Exchange> exchange)
    : Communicator(std::move(name), std::move(label), rank, world_size, timeout_s), exchange_(std::move(exchange)) {
  TPK_CHECK(exchange_->capacity() >= static_cast<size_t>(world_size) * 8192,
            "Group.open: the exchange buffers must hold 8192 bytes for each of ", world_size, " ranks, got ",
            exchange_->capacity());
}

// A multiple of what gives every rank as much, so that the bytes of a call do not depend on its pieces.
size_t GroupCommunicator::piece_values(const Wire& wire, size_t parts) const {
  // Room for one more block a rank, because chunks end at block boundaries.
  const size_t usable = exchange_->capacity() - static_cast<size_t>(world_size()) * wire.bytes(wire.block_values);
  const size_t even = wire.block_values * (parts == 1 ? static_cast<size_t>(world_size()) : 1);
  return std::max(wire.values_in(usable / parts) / even * even, even);
}

void GroupCommunicator::described(Op op, const std::function<void()>& body) {
  try {
    body();
  } catch (const TimeoutFailure& error) {
    throw TimeoutFailure(concat(describe_call(op), ": ", error.what()));
  } catch (const PeerLost& error) {
    throw PeerLost(concat(describe_call(op), ": ", error.what()));
  }
}

void GroupCommunicator::run(Op op, const Sizes& send, const Sizes& receive, const std::function<void()>* meanwhile) {
  described(op, [&] {
    exchange_->start(send, receive);
    if (meanwhile != nullptr) (*meanwhile)();
    const uint64_t started = now_nanoseconds();
    exchange_->wait(call_);
    count_wait(now_nanoseconds() - started);
  });
  for (int r = 0; r < world_size(); ++r) {
    if (r != rank()) count(send[static_cast<size_t>(r)]);
  }
}

std::vector<CallSpec> GroupCommunicator::open_call(const CallSpec& spec, const Wire* wire, const Input* payload,
                                                   size_t n) {
  const size_t payload_bytes = wire == nullptr ? 0 : wire->bytes(n), ranks = static_cast<size_t>(world_size());
  const size_t record = Opening::kBytes + room_of(payload_bytes);
  std::vector<char> mine(record);
  const Opening opening(call_, spec, false, payload_bytes);
  std::memcpy(mine.data(), &opening, sizeof opening);
  if (wire != nullptr) payload->encode(*wire, mine.data() + Opening::kBytes, n);
  records_.emplace(ranks * record);
  gather_records(spec.op, mine.data(), record, records_->at(0));
  std::vector<CallSpec> all;
  for (size_t r = 0; r < ranks; ++r) {
    Opening theirs;
    std::memcpy(&theirs, records_->at(r * record), sizeof theirs);
    all.push_back(theirs.spec());
  }
  check_agreement(spec, all);
  return all;
}

void GroupCommunicator::gather_records(Op op, const char* mine, size_t record_bytes, char* all) {
  const size_t ranks = static_cast<size_t>(world_size());
  for (size_t r = 0; r < ranks; ++r) std::memcpy(exchange_->send_buffer() + r * record_bytes, mine, record_bytes);
  const Sizes sizes(ranks, record_bytes);
  run(op, sizes, sizes);
  std::memcpy(all, exchange_->receive_buffer(), ranks * record_bytes);
}

void GroupCommunicator::do_all_reduce(const CallSpec& spec, const Wire& wire, Input in, void* out, size_t n) {
  if (is_inline(wire, n)) return all_reduce_inline(spec, wire, in, out, n);
  open_call(spec);
  send_all_reduce(spec, wire, in, out, n, nullptr);
}

void GroupCommunicator::do_all_reduce_beside(const CallSpec& spec, const Wire& wire, void* data, size_t n,
                                             const std::function<void()>& meanwhile) {
  if (is_inline(wire, n)) return all_reduce_inline(spec, wire, data, data, n);
  open_call(spec);
  send_all_reduce(spec, wire, data, data, n, &meanwhile);
}

void GroupCommunicator::all_reduce_inline(const CallSpec& spec, const Wire& wire, const Input& in, void* out,
                                          size_t n) {
  open_call(spec, &wire, &in, n);
  std::vector<const void*> inputs;
  const size_t record = Opening::kBytes + room_of(wire.bytes(n));
  for (size_t r = 0; r < static_cast<size_t>(world_size()); ++r) {
    inputs.push_back(records_->at(r * record + Opening::kBytes));
  }
  if (wire.is_plain()) return wire.reduce_to_values(inputs.data(), world_size(), out, n);
  std::vector<char> packed(wire.bytes(n) + 1);
  void* const result = packed.data();
  wire.reduce_and_decode(inputs.data(), world_size(), &result, 1, out, n);
}

void GroupCommunicator::send_all_reduce(const CallSpec& spec, const Wire& wire, const Input& in, void* out, size_t n,
                                        const std::function<void()>* meanwhile) {
  const size_t piece = piece_values(wire, 1);
  for (size_t start = 0; start < n; start += piece) {
    all_reduce_piece(spec, wire, in.from(wire, start), at(out, start * wire.value_bytes), std::min(piece, n - start),
                     start == 0 ? meanwhile : nullptr);
  }
}

// Rank r gets chunk r of everyone, sums it, and sends the sum to everyone.
void GroupCommunicator::all_reduce_piece(const CallSpec& spec, const Wire& wire, const Input& in, void* out, size_t n,
                                         const std::function<void()>* meanwhile) {
  const size_t ranks = static_cast<size_t>(world_size());
  const Cut chunks = cut_at_blocks(n, world_size(), wire.block_values);
  Sizes chunk_bytes;
  for (int r = 0; r < world_size(); ++r) chunk_bytes.push_back(wire.bytes(chunks.size(r)));
  const size_t mine = chunk_bytes[static_cast<size_t>(rank())];
  const Sizes same(ranks, mine), wire_starts = starts_of(chunk_bytes);

  in.encode(wire, exchange_->send_buffer(), n);
  run(spec.op, chunk_bytes, same, meanwhile);

  std::vector<const void*> inputs;
  std::vector<void*> outputs;
  for (size_t r = 0; r < ranks; ++r) inputs.push_back(exchange_->receive_buffer() + r * mine);
  for (size_t r = 0; r < ranks; ++r) outputs.push_back(exchange_->send_buffer() + r * mine);
  wire.reduce(inputs.data(), world_size(), outputs.data(), world_size(), chunks.size(rank()));
  run(spec.op, same, chunk_bytes);
  for (int r = 0; r < world_size(); ++r) {
    wire.decode(exchange_->receive_buffer() + wire_starts[static_cast<size_t>(r)],
                at(out, chunks.start(r) * wire.value_bytes), chunks.size(r));
  }
}

void GroupCommunicator::do_reduce_scatter(const CallSpec& spec, const Wire& wire, Input in, void* out, const Cut& cut) {
  open_call(spec);
  send_reduce_scatter(spec, wire, in, out, cut);
}

void GroupCommunicator::send_reduce_scatter(const CallSpec& spec, const Wire& wire, const Input& in, void* out,
                                            const Cut& cut) {
  const size_t ranks = static_cast<size_t>(world_size());
  const size_t piece = piece_values(wire, ranks);
  for (size_t start = 0; start < cut.largest(); start += piece) {
    const auto part = [&](int r) { return start < cut.size(r) ? std::min(piece, cut.size(r) - start) : 0; };
    Sizes send;
    char* to = exchange_->send_buffer();
    for (int r = 0; r < world_size(); ++r) {
      if (part(r) > 0) in.of_part(wire, cut.starts, static_cast<size_t>(r), start).encode(wire, to, part(r));
      send.push_back(wire.bytes(part(r)));
      to += send.back();
    }
    const size_t mine = send[static_cast<size_t>(rank())];
    run(spec.op, send, Sizes(ranks, mine));
    std::vector<const void*> inputs;
    for (size_t r = 0; r < ranks; ++r) inputs.push_back(exchange_->receive_buffer() + r * mine);
    wire.reduce_to_values(inputs.data(), world_size(), at(out, start * wire.value_bytes), part(rank()));
  }
}

void GroupCommunicator::do_all_gather(const CallSpec& spec, const Wire& wire, const void* in, void* out,
                                      const Cut& cut) {
  check_parts(spec, open_call(spec), cut);
  send_all_gather(spec, wire, in, out, cut);
}

void GroupCommunicator::send_all_gather(const CallSpec& spec, const Wire& wire, const void* in, void* out,
                                        const Cut& cut) {
  const size_t ranks = static_cast<size_t>(world_size());
  const size_t piece = piece_values(wire, ranks);
  for (size_t start = 0; start < cut.largest(); start += piece) {
    const auto part = [&](int r) { return start < cut.size(r) ? std::min(piece, cut.size(r) - start) : 0; };
    const size_t mine = wire.bytes(part(rank()));
    wire.encode(at(in, start * wire.value_bytes), exchange_->send_buffer(), part(rank()));
    for (size_t r = 1; r < ranks; ++r) std::memcpy(exchange_->send_buffer() + r * mine, exchange_->send_buffer(), mine);
    Sizes receive;
    for (int r = 0; r < world_size(); ++r) receive.push_back(wire.bytes(part(r)));
    run(spec.op, Sizes(ranks, mine), receive);
    const Sizes starts = starts_of(receive);
    for (int r = 0; r < world_size(); ++r) {
      wire.decode(exchange_->receive_buffer() + starts[static_cast<size_t>(r)],
                  at(out, (cut.start(r) + start) * wire.value_bytes), part(r));
    }
  }
}

void GroupCommunicator::do_all_to_all(const CallSpec& spec, const Wire& wire, const void* in, void* out,
                                      const Cut& send, const Cut& receive) {
  open_call(spec);
  const size_t ranks = static_cast<size_t>(world_size());
  const size_t table = 2 * ranks * sizeof(uint64_t);
  std::vector<uint64_t> sizes;
  for (const Cut* cut : {&send, &receive}) {
    for (int r = 0; r < world_size(); ++r) sizes.push_back(cut->size(r));
  }
  for (size_t r = 0; r < ranks; ++r) std::memcpy(exchange_->send_buffer() + r * table, sizes.data(), table);
  run(spec.op, Sizes(ranks, table), Sizes(ranks, table));
  std::vector<uint64_t> all(2 * ranks * ranks);
  std::memcpy(all.data(), exchange_->receive_buffer(), ranks * table);
  std::vector<const uint64_t*> sends, receives;
  for (size_t r = 0; r < ranks; ++r) {
    sends.push_back(all.data() + 2 * ranks * r);
    receives.push_back(sends.back() + ranks);
  }
  const uint64_t largest = check_pairs(spec, sends, receives);
  const size_t piece = piece_values(wire, ranks);
  for (size_t start = 0; start < largest; start += piece) {
    const auto part = [&](const Cut& cut, int r) {
      return start < cut.size(r) ? std::min(piece, cut.size(r) - start) : 0;
    };
    Sizes out_bytes, in_bytes;
    char* to = exchange_->send_buffer();
    for (int r = 0; r < world_size(); ++r) {
      wire.encode(at(in, (send.start(r) + start) * wire.value_bytes), to, part(send, r));
      out_bytes.push_back(wire.bytes(part(send, r)));
      in_bytes.push_back(wire.bytes(part(receive, r)));
      to += out_bytes.back();
    }
    run(spec.op, out_bytes, in_bytes);
    const Sizes starts = starts_of(in_bytes);
    for (int r = 0; r < world_size(); ++r) {
      wire.decode(exchange_->receive_buffer() + starts[static_cast<size_t>(r)],
                  at(out, (receive.start(r) + start) * wire.value_bytes), part(receive, r));
    }
  }
}

std::vector<int64_t> GroupCommunicator::do_exchange(const CallSpec& spec) {
  std::vector<int64_t> all;
  for (const CallSpec& theirs : open_call(spec)) all.push_back(theirs.mine);
  return all;
}

}  // namespace tpk
