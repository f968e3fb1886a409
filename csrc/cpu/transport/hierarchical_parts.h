// What the files of transport `hierarchical` share. Torch-free.
#pragma once

#include <utility>

#include "core/errors.h"
#include "core/moves.h"
#include "hierarchical_transport.h"
#include "opening.h"

namespace tpk {

// The openings of the ranks of a host, in rank order.
struct HierarchicalCommunicator::HostOpening {
  std::vector<Opening> openings;
  bool agrees;     // whether they are of one call, so that the first call inside the host has brought its bytes
  bool is_packed;  // the input of any of them
  bool has_bytes() const { return agrees && !is_packed; }
};

// The openings of all ranks, in rank order.
struct HierarchicalCommunicator::Opened {
  std::vector<CallSpec> specs;
  bool is_packed = false;  // the input of any rank
  bool has_come = true;    // whether the messages of all hosts were as long as expected
};

// The forms that the values of a sum take.
struct HierarchicalCommunicator::Forms {
  const Wire* given;   // of the call
  const Wire* values;  // of the ranks
  const Wire* sums;    // inside a host
  const Wire* link;    // between hosts: as `sums`, or packed
  int divisor;         // of an average, which is a sum until the end

  Forms(const Wire& wire, int world_size) : given(&wire) {
    const bool is_avg = wire.op == ReduceOp::Avg, is_half = wire.dtype == DType::BF16 || wire.dtype == DType::F16;
    const ReduceOp op = is_avg ? ReduceOp::Sum : wire.op;
    const bool rounds = op == ReduceOp::Sum || op == ReduceOp::Product;
    values = find_wire(wire.dtype, Codec::None, op);
    sums = is_half && rounds ? find_wire(DType::F32, Codec::None, op) : values;
    link = find_wire(sums->dtype, wire.codec, op);
    divisor = is_avg ? world_size : 1;
  }
  bool widens() const { return sums->dtype != values->dtype; }
  void widen(const void* from, void* to, size_t n) const {
    if (!widens()) return sums->encode(from, to, n);
    moves().dtypes[static_cast<size_t>(values->dtype)].to_floats(from, static_cast<float*>(to), n);
  }
  void narrow(const void* from, void* to, size_t n) const {
    if (!widens()) return sums->encode(from, to, n);
    moves().dtypes[static_cast<size_t>(values->dtype)].from_floats(static_cast<const float*>(from), to, n);
  }
  // As the packed sum says it.
  void repack(void* of, size_t n) const {
    if (link->is_plain()) return;
    const Scratch packed(link->bytes(n));
    link->encode(of, packed.at(0), n);
    link->decode(packed.at(0), of, n);
  }
  void divide(void* of, size_t n) const {
    if (divisor == 1) return;
    if (sums->dtype == DType::F32) return moves().divide(static_cast<float*>(of), divisor, n);
    for (size_t i = 0; i < n; ++i) static_cast<double*>(of)[i] /= divisor;
  }
};

template <class Body>
void HierarchicalCommunicator::counted(Communicator& part, Body&& body) {
  const auto totals = [&] {
    uint64_t bytes = 0, waits = 0;
    for (const OpStats& stats : part.stats()) {
      bytes += stats.wire_bytes;
      waits += stats.wait_nanoseconds;
    }
    return std::pair(bytes, waits);
  };
  const auto before = totals();
  body();
  const auto after = totals();
  count(after.first - before.first);
  count_wait(after.second - before.second);
}

template <class Body>
void HierarchicalCommunicator::guarded(Op op, Body&& body) {
  found_ = nullptr;
  try {
    body();
  } catch (const TimeoutFailure&) {
    fail(op, true);
  } catch (const PeerLost&) {
    fail(op, false);
  }
}

}  // namespace tpk
