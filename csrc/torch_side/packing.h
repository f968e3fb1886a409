// What packing outside collectives checks and allocates, on any backend.
#pragma once

#include "collectives.h"

namespace tpk {

// How a tensor of this dtype is packed; codec none takes every dtype as it lies there.
inline const Wire& packing(const char* op, const Tensor& x, const std::string& name) {
  const Codec codec = codec_of(op, name);
  const DType dtype = raw_dtype_of(x);
  if (codec == Codec::None) return wire_of(dtype, codec, dtype < DType::Raw1 ? ReduceOp::Sum : ReduceOp::None);
  try {
    return wire_of(dtype, codec, ReduceOp::Sum);
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument(concat(op, ": ", error.what()));
  }
}

// Room for n packed values.
inline Tensor empty_wire(const Tensor& like, const Wire& wire, size_t n) {
  return fresh_output(empty_of(like, {0}, ScalarType::Byte), {static_cast<int64_t>(wire.bytes(n))});
}

// What decompress writes to, and how its bytes are to be read.
struct Unpacking {
  Tensor out;
  const Wire& wire;
};
inline Unpacking unpacking(const Tensor& wire_bytes, const Shape& shape, ScalarType dtype, const std::string& codec) {
  TPK_CHECK(wire_bytes.scalar_type() == ScalarType::Byte && wire_bytes.dim() == 1,
            "decompress: wire must be uint8 with one dim, got ", wire_bytes.dim(), " dims of ",
            wire_bytes.element_size(), " bytes a value");
  const Tensor out = fresh_output(empty_of(wire_bytes, {0}, dtype), shape);
  const Wire& wire = packing("decompress", out, codec);
  TPK_CHECK(numel_of(wire_bytes) == wire.bytes(numel_of(out)), "decompress: wire must have ", wire.bytes(numel_of(out)),
            " bytes for shape ", text_of(shape), ", got ", numel_of(wire_bytes));
  return {out, wire};
}

// A wire of bytes where kernels can read it: in words of 16.
inline Tensor readable(const Tensor& wire_bytes) {
  const Tensor packed = dense(wire_bytes);
  if (reinterpret_cast<uintptr_t>(packed.const_data_ptr()) % 16 == 0) return packed;
  const Tensor aligned = empty_of(packed, shape_of(packed));
  copy_into(aligned, packed);
  return aligned;
}

inline void check_residual(const char* op, const Tensor& x, const Tensor& residual) {
  TPK_CHECK(residual.scalar_type() == ScalarType::Float && residual.is_contiguous(), op,
            ": residual must be float32 and contiguous, got ", name_of(raw_dtype_of(residual)),
            residual.is_contiguous() ? "" : ", not contiguous");
  TPK_CHECK(shape_of(residual) == shape_of(x), op, ": residual must have the shape of x, ", text_of(shape_of(x)),
            ", got ", text_of(shape_of(residual)));
}

}  // namespace tpk
