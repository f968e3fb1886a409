// What a rank sends at the beginning of a call over connections: its fingerprint. Torch-free.
#pragma once

#include "core/communicator.h"

namespace tpk {

struct Opening {
  static constexpr size_t kBytes = 64;  // on the wire, where the small message follows that goes with it

  uint64_t call, numel;
  int64_t mine;
  uint32_t shape_hash;
  uint8_t op, dtype, reduce_op, codec;
  // Of transport `hierarchical`: whether the input is packed, and the bytes of the small message.
  uint8_t is_packed;
  uint64_t payload_bytes;

  Opening() = default;
  Opening(uint64_t call, const CallSpec& spec, bool is_packed = false, size_t payload_bytes = 0)
      : call(call),
        numel(spec.numel),
        mine(spec.mine),
        shape_hash(spec.shape_hash),
        op(static_cast<uint8_t>(spec.op)),
        dtype(static_cast<uint8_t>(spec.dtype)),
        reduce_op(static_cast<uint8_t>(spec.reduce_op)),
        codec(static_cast<uint8_t>(spec.codec)),
        is_packed(is_packed),
        payload_bytes(payload_bytes) {}
  // Whether both are of one call.
  bool is_like(const Opening& other) const {
    return op == other.op && dtype == other.dtype && reduce_op == other.reduce_op && codec == other.codec &&
           numel == other.numel && shape_hash == other.shape_hash;
  }
  CallSpec spec() const {
    return {static_cast<Op>(op),
            static_cast<DType>(dtype),
            static_cast<ReduceOp>(reduce_op),
            static_cast<Codec>(codec),
            numel,
            shape_hash,
            mine};
  }
};
static_assert(sizeof(Opening) <= Opening::kBytes, "the fingerprint fits in front of the message");

}  // namespace tpk
