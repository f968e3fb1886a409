// A wire format: how a tensor of one dtype travels under one codec, and how R of them are summed. Torch-free.
//
// Three moves cover every collective:   encode: values -> wire,   reduce: R wires -> wires,   decode: wire -> values.
// Sums are taken in fp32 (fp64 for fp64, integers wrap around exactly), in the order of the inputs given, and rounded
// once. With codec none the wire is the tensor's own layout, so encode and decode are copies and may be skipped
// (is_plain).
#pragma once

#include <cstddef>

#include "../codec/codec.h"
#include "../types.h"

namespace tpk {

struct Wire {
  DType dtype;
  Codec codec;
  ReduceOp op;
  size_t block_values;  // a message may be cut only at multiples of this
  size_t value_bytes;   // of the tensor, not of the wire

  size_t (*bytes)(size_t n);
  void (*encode)(const void* values, void* wire, size_t n);
  void (*decode)(const void* wire, void* values, size_t n);
  // Writes the same reduced wire to every output; an output may be one of the inputs.
  void (*reduce)(const void* const* inputs, int num_inputs, void* const* outputs, int num_outputs, size_t n);
  // Reduces and decodes without packing the sum again.
  void (*reduce_to_values)(const void* const* inputs, int num_inputs, void* values, size_t n);

  bool is_plain() const { return codec == Codec::None; }
  // Byte offset of value i (a multiple of block_values) in a wire.
  size_t offset(size_t i) const { return bytes(i); }
  // The largest number of values, a multiple of block_values, that fits into so many bytes.
  size_t values_in(size_t wire_bytes) const;
};

// Throws std::invalid_argument for a combination that has no meaning (codec on integers, avg of integers, ...).
const Wire& wire_of(DType dtype, Codec codec, ReduceOp op);

}  // namespace tpk
