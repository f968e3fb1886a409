// A wire format: how a tensor of one dtype is sent under one codec, and how R of them are summed. Torch-free.
//
// Three moves cover every collective:   encode: values -> wire,   reduce: R wires -> wires,   decode: wire -> values.
// Sums are taken in fp32 (fp64 for fp64, integers wrap around exactly), in the order of the inputs given, and rounded
// once. With codec none the wire is the tensor's own layout, so encode and decode are copies and may be skipped
// (is_plain).
#pragma once

#include <cstddef>
#include <vector>

#include "check.h"
#include "core/codec/codec.h"
#include "types.h"

namespace tpk {

struct Wire {
  DType dtype;
  Codec codec;
  ReduceOp op;
  size_t block_values;   // a message may be cut only at multiples of this
  size_t header_bytes;   // of a block
  size_t payload_bytes;  // of a value
  size_t value_bytes;    // of the tensor, not of the wire

  size_t bytes(size_t n) const { return (n + block_values - 1) / block_values * header_bytes + n * payload_bytes; }
  void encode(const void* values, void* wire, size_t n) const;
  void decode(const void* wire, void* values, size_t n) const;
  // All but values [begin, end), which are whole blocks or end the message.
  void decode_around(size_t begin, size_t end, const void* wire, void* values, size_t n) const;
  // Writes the same reduced wire to every output; an output may be one of the inputs.
  void reduce(const void* const* inputs, int num_inputs, void* const* outputs, int num_outputs, size_t n) const;
  // The same, and decodes that wire: what the owner of a part does, who keeps the sum as the others get it. With a
  // codec.
  void reduce_and_decode(const void* const* inputs, int num_inputs, void* const* outputs, int num_outputs, void* values,
                         size_t n) const;
  // Reduces and decodes without packing the sum again.
  void reduce_to_values(const void* const* inputs, int num_inputs, void* values, size_t n) const;
  // With v = scale * values + residual in fp32:  wire = encode(v),  residual = v - decode(wire).
  //
  // The difference is exact, so that residual + decode(wire) is v to the bit. Where v cannot be packed (a NaN or
  // infinity in its block) the residual stays what it was: the receiver sees the NaN, and the message after it is whole
  // again. Codec none rounds v to the dtype. Only where has_feedback().
  void encode_with_feedback(const void* values, float* residual, void* wire, float scale, size_t n) const;
  // wire = encode(s) of the sum s of the inputs in fp32,  residual += s - decode(wire) where that is finite,  values =
  // decode(wire): what the owner of a part does who keeps what the second packing loses. With a codec.
  void reduce_with_feedback(const void* const* inputs, int num_inputs, void* wire, float* residual, void* values,
                            size_t n) const;
  bool has_feedback() const;  // float32, bfloat16 and float16

  bool is_plain() const { return codec == Codec::None; }
  // Byte offset of value i (a multiple of block_values) in a wire.
  size_t offset(size_t i) const { return bytes(i); }
  // The largest number of values, a multiple of block_values, that fits into so many bytes.
  size_t values_in(size_t wire_bytes) const { return wire_bytes / bytes(block_values) * block_values; }
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

// The codec, and the floating dtype, of a name; throw std::invalid_argument, in the name of `op`, where there is none.
inline Codec codec_of(const char* op, const std::string& name) {
  const Codec codec = codec_of(name);
  if (codec != Codec::Count) return codec;
  std::string known = "none";
  for (uint8_t i = 1; i < static_cast<uint8_t>(Codec::Count); ++i)
    known += concat(", ", name_of(static_cast<Codec>(i)));
  throw std::invalid_argument(concat(op, ": codec must be one of ", known, ", got '", name, "'"));
}
DType float_dtype(const char* op, const std::string& name);

// The wire of a combination, or nullptr where it has no meaning (codec on integers, avg of integers, ...).
const Wire* find_wire(DType dtype, Codec codec, ReduceOp op);
// The same; throws std::invalid_argument, with the reason, where there is none.
const Wire& wire_of(DType dtype, Codec codec, ReduceOp op);

}  // namespace tpk
