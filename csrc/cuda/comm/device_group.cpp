#include "device_group.h"

#include <algorithm>

#include "core/bytes.h"
#include "core/check.h"
#include "core/errors.h"

namespace tpk::cuda {
namespace {

constexpr size_t kAlign = 16;             // of every rank's stretch of a buffer, for the kernels' widest access
constexpr size_t kMostAgreed = 1u << 14;  // signatures that are remembered

size_t aligned(size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

// The fewest values that end at a whole block and at a multiple of kAlign bytes of the wire.
size_t granule(const Wire& wire) {
  size_t values = wire.block_values;
  while (wire.bytes(values) % kAlign != 0) values += wire.block_values;
  return values;
}

void copy(const void* from, void* to, size_t bytes) {
  if (from == to || bytes == 0) return;
  TPK_CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, current_stream()));
}

void encode(const Wire& wire, const Input& in, void* to, size_t n) {
  if (in.is_packed() || wire.is_plain()) return copy(in.values(), to, wire.bytes(n));
  if (n > 0) TPK_CUDA_CHECK(launch_encode(wire.dtype, wire.codec, in.values(), to, n, current_stream()));
}

void decode(const Wire& wire, const void* from, void* values, size_t n) {
  if (wire.is_plain()) return copy(from, values, n * wire.value_bytes);
  if (n > 0) TPK_CUDA_CHECK(launch_decode(wire.dtype, wire.codec, from, values, n, current_stream()));
}

// The wires of all ranks, one behind the other.
WireList wires(const char* base, size_t stride, int world_size) {
  WireList list{};
  for (int r = 0; r < world_size; ++r) list.wire[r] = base + static_cast<size_t>(r) * stride;
  return list;
}

}  // namespace

DeviceGroupCommunicator::DeviceGroupCommunicator(std::string name, std::string label, int rank, int world_size,
                                                 double timeout_s, int device, std::unique_ptr<DeviceExchange> exchange)
    : DeviceCommunicator(std::move(name), std::move(label), rank, world_size, timeout_s, device),
      exchange_(std::move(exchange)) {
  TPK_CHECK(world_size <= kMaxWires, "Group.open: transport 'group' on a device takes at most ", kMaxWires,
            " ranks, got ", world_size);
  TPK_CHECK(exchange_->capacity() >= static_cast<size_t>(world_size) * 65536,
            "Group.open: the exchange buffers must hold 65536 bytes for each of ", world_size, " ranks, got ",
            exchange_->capacity());
  marks_ = static_cast<ExchangeMarks*>(exchange_->marks());
  if (marks_ == nullptr) return;
  const DeviceScope scope(device);
  void* on_device = nullptr;
  TPK_CUDA_CHECK(cudaHostGetDevicePointer(&on_device, marks_, 0));
  marks_on_device_ = static_cast<ExchangeMarks*>(on_device);
}

template <class Body>
auto DeviceGroupCommunicator::named(Op op, Body&& body) {
  try {
    return body();
  } catch (const TimeoutFailure& error) {
    throw TimeoutFailure(concat(describe_call(op), ": ", error.what()));
  } catch (const PeerLost& error) {
    throw PeerLost(concat(describe_call(op), ": ", error.what()));
  }
}

std::vector<CallSpec> DeviceGroupCommunicator::all_gather_specs(const CallSpec& spec) {
  const std::vector<int64_t> mine{static_cast<int64_t>(spec.op),
                                  static_cast<int64_t>(spec.dtype),
                                  static_cast<int64_t>(spec.reduce_op),
                                  static_cast<int64_t>(spec.codec),
                                  static_cast<int64_t>(spec.numel),
                                  static_cast<int64_t>(spec.shape_hash),
                                  spec.mine};
  std::vector<CallSpec> all;
  for (const std::vector<int64_t>& theirs : named(spec.op, [&] { return exchange_->agree(mine); })) {
    all.push_back({static_cast<Op>(theirs.at(0)), static_cast<DType>(theirs.at(1)), static_cast<ReduceOp>(theirs.at(2)),
                   static_cast<Codec>(theirs.at(3)), static_cast<uint64_t>(theirs.at(4)),
                   static_cast<uint32_t>(theirs.at(5)), theirs.at(6)});
  }
  check_agreement(spec, all);
  return all;
}

void DeviceGroupCommunicator::agree(const CallSpec& spec, const Cut* cut) {
  const std::vector<int64_t> signature{static_cast<int64_t>(kind_of(spec.op, spec.dtype, spec.reduce_op, spec.codec)),
                                       static_cast<int64_t>(spec.numel), static_cast<int64_t>(spec.shape_hash),
                                       spec.mine};
  if (agreed_.count(signature) > 0) return;
  const std::vector<CallSpec> all = all_gather_specs(spec);
  if (cut != nullptr) check_parts(spec, all, *cut);
  if (agreed_.size() >= kMostAgreed) agreed_.clear();  // on all ranks alike
  agreed_.insert(signature);
}

void DeviceGroupCommunicator::transfer(Op op, const Sizes& send, const Sizes& receive) {
  if (marks_ != nullptr) {
    TPK_CUDA_CHECK(launch_mark_begin(marks_on_device_, op, static_cast<uint32_t>(call_), current_stream()));
  }
  named(op, [&] {
    exchange_->start(send, receive);
    exchange_->wait(call_);
  });
  if (marks_ != nullptr) TPK_CUDA_CHECK(launch_mark_end(marks_on_device_, current_stream()));
}

void DeviceGroupCommunicator::raise_given_up() {
  if (marks_ != nullptr && __atomic_load_n(&marks_->given_up, __ATOMIC_ACQUIRE) != 0) exchange_->raise_given_up();
}

size_t DeviceGroupCommunicator::piece_values(const Wire& wire, size_t parts) const {
  // Room for one granule more a rank, because chunks end at granules.
  const size_t unit = granule(wire), spare = static_cast<size_t>(world_size()) * wire.bytes(unit);
  const size_t usable = exchange_->capacity() - std::min(spare, exchange_->capacity() / 2);
  return std::max(wire.values_in(usable / parts) / unit * unit, unit);
}

void DeviceGroupCommunicator::send_all_reduce(const CallSpec& spec, const Wire& wire, Input in, void* out, size_t n) {
  agree(spec);
  const size_t piece = piece_values(wire, 1);
  for (size_t start = 0; start < n; start += piece) {
    all_reduce_piece(spec, wire, in.from(wire, start), at(out, start * wire.value_bytes), std::min(piece, n - start));
  }
}

// Rank r gets chunk r of everyone, sums it, and sends the sum to everyone. Chunks begin where the piece's own wire has
// them, so that one encode and one decode are enough.
void DeviceGroupCommunicator::all_reduce_piece(const CallSpec& spec, const Wire& wire, const Input& in, void* out,
                                               size_t n) {
  const size_t ranks = static_cast<size_t>(world_size()), unit = granule(wire);
  Cut chunks = Cut::even((n + unit - 1) / unit, world_size(), unit);
  for (size_t& start : chunks.starts) start = std::min(start, n);
  Sizes sizes;
  for (int r = 0; r < world_size(); ++r) sizes.push_back(aligned(wire.bytes(chunks.size(r))));
  const size_t mine = sizes[static_cast<size_t>(rank())], my_values = chunks.size(rank());
  char* const send = exchange_->send_buffer();

  encode(wire, in, send, n);
  transfer(spec.op, sizes, Sizes(ranks, mine));
  if (my_values > 0) {
    TPK_CUDA_CHECK(launch_reduce_wires(wire.dtype, wire.codec, wire.op,
                                       wires(exchange_->receive_buffer(), mine, world_size()), world_size(), send,
                                       my_values, current_stream()));
  }
  for (size_t r = 1; r < ranks; ++r) copy(send, send + r * mine, mine);
  transfer(spec.op, Sizes(ranks, mine), sizes);
  decode(wire, exchange_->receive_buffer(), out, n);
  count(wire.bytes(n) - wire.bytes(my_values) + (ranks - 1) * wire.bytes(my_values));
}

void DeviceGroupCommunicator::send_reduce_scatter(const CallSpec& spec, const Wire& wire, Input in, void* out,
                                                  const Cut& cut, const Stretch& stretch) {
  agree(spec);
  const size_t ranks = static_cast<size_t>(world_size()), piece = piece_values(wire, ranks);
  for (size_t start = 0; start < stretch.largest(); start += piece) {
    Sizes send;
    char* to = exchange_->send_buffer();
    for (int r = 0; r < world_size(); ++r) {
      const size_t values = stretch.piece_size(r, start, piece);
      if (values > 0) {
        encode(wire, in.of_part(wire, cut.starts, static_cast<size_t>(r), stretch.piece_begin(r, start)), to, values);
      }
      send.push_back(aligned(wire.bytes(values)));
      to += send.back();
      if (r != rank()) count(wire.bytes(values));
    }
    const size_t mine = send[static_cast<size_t>(rank())], my_values = stretch.piece_size(rank(), start, piece);
    transfer(spec.op, send, Sizes(ranks, mine));
    if (my_values == 0) continue;
    TPK_CUDA_CHECK(launch_reduce_wires_to_values(
        wire.dtype, wire.codec, wire.op, wires(exchange_->receive_buffer(), mine, world_size()), world_size(),
        at(out, stretch.piece_begin(rank(), start) * wire.value_bytes), my_values, current_stream()));
  }
}

void DeviceGroupCommunicator::send_all_gather(const CallSpec& spec, const Wire& wire, const void* in, void* out,
                                              const Cut& cut, const Stretch& stretch) {
  agree(spec, &cut);
  const size_t ranks = static_cast<size_t>(world_size()), piece = piece_values(wire, ranks);
  for (size_t start = 0; start < stretch.largest(); start += piece) {
    char* const send = exchange_->send_buffer();
    const size_t my_values = stretch.piece_size(rank(), start, piece), mine = aligned(wire.bytes(my_values));
    encode(wire, at(in, stretch.piece_begin(rank(), start) * wire.value_bytes), send, my_values);
    for (size_t r = 1; r < ranks; ++r) copy(send, send + r * mine, mine);
    Sizes receive;
    for (int r = 0; r < world_size(); ++r) {
      receive.push_back(aligned(wire.bytes(stretch.piece_size(r, start, piece))));
    }
    transfer(spec.op, Sizes(ranks, mine), receive);
    count((ranks - 1) * wire.bytes(my_values));
    const char* from = exchange_->receive_buffer();
    for (int r = 0; r < world_size(); ++r) {
      decode(wire, from, at(out, (cut.start(r) + stretch.piece_begin(r, start)) * wire.value_bytes),
             stretch.piece_size(r, start, piece));
      from += receive[static_cast<size_t>(r)];
    }
  }
}

std::vector<int64_t> DeviceGroupCommunicator::send_exchange(const CallSpec& spec) {
  if (spec.op == Op::Barrier) synchronize();
  std::vector<int64_t> all;
  for (const CallSpec& theirs : all_gather_specs(spec)) all.push_back(theirs.mine);
  return all;
}

void DeviceGroupCommunicator::synchronize() {
  const StreamScope scope(last_stream());
  exchange_->synchronise(call_);
}

}  // namespace tpk::cuda
