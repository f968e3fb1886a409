// A wire format: how a tensor of one dtype is sent under one codec, and how R of them are summed. Torch-free.
//
// Three moves cover every collective:   encode: values -> wire,   reduce: R wires -> wires,   decode: wire -> values.
// Sums are taken in fp32 (fp64 for fp64, integers wrap around exactly), in the order of the inputs given, and rounded
// once. With codec none the wire is the tensor's own layout, so encode and decode are copies and may be skipped
// (is_plain).
#pragma once

#include <cstddef>
#include <vector>

#include "core/codec/codec.h"
#include "types.h"

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

// The input of one rank to a reduction: values, or values that are packed already, as `encode` packs them. The bytes
// that are sent are the same, so that the ranks need not agree about it.
class Input {
 public:
  Input(const void* values) : data_(values) {}
  // As a whole; for a reduce_scatter the parts of all ranks one behind the other, each beginning with a block.
  static Input packed(const void* wire) { return {wire, true}; }

  // values() and is_packed() are of what begins here.
  bool is_packed() const { return is_packed_; }
  const void* values() const { return data_; }
  // What begins `start` values (a multiple of block_values when packed) further on.
  Input from(const Wire& wire, size_t start) const {
    const size_t bytes = is_packed_ ? wire.offset(start) : start * wire.value_bytes;
    return {static_cast<const char*>(data_) + bytes, is_packed_};
  }
  // The same, where the first of `starts` parts begins at 0, the next at starts[1], ...: part r from its value `start`.
  Input of_part(const Wire& wire, const std::vector<size_t>& starts, size_t r, size_t start) const {
    if (!is_packed_) return from(wire, starts[r] + start);
    size_t bytes = wire.offset(start);
    for (size_t part = 0; part < r; ++part) bytes += wire.bytes(starts[part + 1] - starts[part]);
    return {static_cast<const char*>(data_) + bytes, true};
  }
  void encode(const Wire& wire, void* to, size_t n) const;

 private:
  Input(const void* data, bool is_packed) : data_(data), is_packed_(is_packed) {}
  const void* data_;
  bool is_packed_ = false;
};

// The wire of a combination, or nullptr where it has no meaning (codec on integers, avg of integers, ...).
const Wire* find_wire(DType dtype, Codec codec, ReduceOp op);
// The same; throws std::invalid_argument, with the reason, where there is none.
const Wire& wire_of(DType dtype, Codec codec, ReduceOp op);

}  // namespace tpk
