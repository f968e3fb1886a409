#include "wire.h"

#include <array>
#include <cstring>

#include "bytes.h"
#include "check.h"
#include "moves.h"

namespace tpk {
namespace {

bool is_float(DType dtype) { return dtype <= DType::F16; }
bool is_packable(DType dtype) { return is_float(dtype) && dtype != DType::F64; }

// The only place that decides which wires exist.
bool exists(DType dtype, Codec codec, ReduceOp op) {
  if (dtype >= DType::Raw1) return dtype < DType::Count && codec == Codec::None && op == ReduceOp::None;
  if (codec != Codec::None) {
    return codec < Codec::Count && is_packable(dtype) && (op <= ReduceOp::Avg || op == ReduceOp::None);
  }
  return is_float(dtype) ? op <= ReduceOp::Product || op == ReduceOp::None : op != ReduceOp::Avg;
}

std::string why_not(DType dtype, Codec codec, ReduceOp op) {
  if (codec != Codec::None && is_packable(dtype)) {
    return concat("codec ", name_of(codec), " works with op sum or avg, got ", name_of(op));
  }
  if (codec != Codec::None) {
    return concat("codec ", name_of(codec), " packs float32, bfloat16 or float16, got ", name_of(dtype));
  }
  if (op == ReduceOp::Avg) {
    return concat("op avg needs a floating dtype (integers would be cut), got ", name_of(dtype));
  }
  return concat("op ", name_of(op), " has no meaning for ", name_of(dtype));
}

size_t index_of(DType dtype) { return static_cast<size_t>(dtype); }
size_t index_of(Codec codec) { return static_cast<size_t>(codec); }
size_t index_of(ReduceOp op) { return static_cast<size_t>(op); }

Wire make_wire(DType dtype, Codec codec, ReduceOp op) {
  if (op == ReduceOp::None && dtype < DType::Raw1) op = ReduceOp::Sum;  // where none is meant, none is called
  switch (codec) {
#define TPK_CODEC_CASE(name, id, C) \
  case Codec::id: return {dtype, codec, op, C::kBlockValues, C::kHeaderBytes, sizeof(C::Payload), size_of(dtype)};
    TPK_CODECS(TPK_CODEC_CASE)
#undef TPK_CODEC_CASE
    default: return {dtype, codec, op, 1, 0, size_of(dtype), size_of(dtype)};
  }
}

constexpr size_t kReductions = static_cast<size_t>(ReduceOp::None) + 1;
constexpr size_t kCodecs = static_cast<size_t>(Codec::Count);
using Wires = std::array<std::array<std::array<Wire, kReductions>, kCodecs>, static_cast<size_t>(DType::Count)>;

Wires all_wires() {
  Wires wires;
  for (size_t d = 0; d < wires.size(); ++d) {
    for (size_t c = 0; c < kCodecs; ++c) {
      for (size_t op = 0; op < kReductions; ++op)
        wires[d][c][op] = make_wire(static_cast<DType>(d), static_cast<Codec>(c), static_cast<ReduceOp>(op));
    }
  }
  return wires;
}

// Values that are packed or unpacked at a time, so that they stay in the first cache: a multiple of every block.
constexpr size_t kTile = 4 * kCodecBlockValues;

template <class Body>
void for_each_tile(size_t n, Body body) {
  for (size_t start = 0; start < n; start += kTile) body(start, n - start < kTile ? n - start : kTile);
}

void sum_tile(const Wire& wire, const void* const* inputs, int num_inputs, size_t start, float* sums, size_t n) {
  const Moves& m = moves();
  const char* const* wires = reinterpret_cast<const char* const*>(inputs);
  m.codecs[index_of(wire.codec)].sum(wires, num_inputs, wire.offset(start), sums, n);
  if (wire.op == ReduceOp::Avg) m.divide(sums, num_inputs, n);
}

}  // namespace

void Wire::encode(const void* values, void* wire, size_t n) const {
  if (is_plain()) {
    if (values != wire && n > 0) std::memcpy(wire, values, n * value_bytes);
    return;
  }
  const Moves& m = moves();
  const CodecMoves& packing = m.codecs[index_of(codec)];
  if (dtype == DType::F32) return packing.encode(static_cast<const float*>(values), static_cast<char*>(wire), n);
  float tile[kTile];
  for_each_tile(n, [&](size_t start, size_t count) {
    m.dtypes[index_of(dtype)].to_floats(at(values, start * value_bytes), tile, count);
    packing.encode(tile, static_cast<char*>(wire) + offset(start), count);
  });
}

void Wire::decode(const void* wire, void* values, size_t n) const {
  if (is_plain()) return encode(wire, values, n);
  const Moves& m = moves();
  const CodecMoves& packing = m.codecs[index_of(codec)];
  if (dtype == DType::F32) return packing.decode(static_cast<const char*>(wire), static_cast<float*>(values), n);
  float tile[kTile];
  for_each_tile(n, [&](size_t start, size_t count) {
    packing.decode(static_cast<const char*>(wire) + offset(start), tile, count);
    m.dtypes[index_of(dtype)].from_floats(tile, at(values, start * value_bytes), count);
  });
}

void Wire::decode_around(size_t begin, size_t end, const void* wire, void* values, size_t n) const {
  decode(wire, values, begin);
  if (end < n) decode(static_cast<const char*>(wire) + offset(end), at(values, end * value_bytes), n - end);
}

void Wire::reduce(const void* const* inputs, int num_inputs, void* const* outputs, int num_outputs, size_t n) const {
  if (!is_plain()) return reduce_and_decode(inputs, num_inputs, outputs, num_outputs, nullptr, n);
  moves().reduce[index_of(dtype)][index_of(op)](inputs, num_inputs, outputs, num_outputs, n);
}

void Wire::reduce_and_decode(const void* const* inputs, int num_inputs, void* const* outputs, int num_outputs,
                             void* values, size_t n) const {
  const Moves& m = moves();
  const CodecMoves& packing = m.codecs[index_of(codec)];
  float sums[kTile];
  for_each_tile(n, [&](size_t start, size_t count) {
    sum_tile(*this, inputs, num_inputs, start, sums, count);
    const size_t from = offset(start);
    char* const first = static_cast<char*>(outputs[0]) + from;
    if (values == nullptr) {
      packing.encode(sums, first, count);
    } else if (dtype == DType::F32) {
      packing.encode_sent(sums, first, static_cast<float*>(values) + start, count);
    } else {
      packing.encode_sent(sums, first, sums, count);
      m.dtypes[index_of(dtype)].from_floats(sums, at(values, start * value_bytes), count);
    }
    for (int k = 1; k < num_outputs; ++k) std::memcpy(static_cast<char*>(outputs[k]) + from, first, bytes(count));
  });
}

void Wire::reduce_to_values(const void* const* inputs, int num_inputs, void* values, size_t n) const {
  if (is_plain()) return reduce(inputs, num_inputs, &values, 1, n);
  float sums[kTile];
  for_each_tile(n, [&](size_t start, size_t count) {
    void* const to = at(values, start * value_bytes);
    if (dtype == DType::F32) return sum_tile(*this, inputs, num_inputs, start, static_cast<float*>(to), count);
    sum_tile(*this, inputs, num_inputs, start, sums, count);
    moves().dtypes[index_of(dtype)].from_floats(sums, to, count);
  });
}

bool Wire::has_feedback() const { return is_packable(dtype); }

void Wire::encode_with_feedback(const void* values, float* residual, void* wire, float scale, size_t n) const {
  const Moves& m = moves();
  const DTypeMoves& own = m.dtypes[index_of(dtype)];
  const CodecMoves& packing = m.codecs[index_of(codec)];
  float widened[kTile], put_in[kTile], sent[kTile];
  for_each_tile(n, [&](size_t start, size_t count) {
    const void* const from = at(values, start * value_bytes);
    char* const to = static_cast<char*>(wire) + offset(start);
    const bool is_wide = dtype == DType::F32;
    if (!is_wide) own.to_floats(from, widened, count);
    m.add_residual(is_wide ? static_cast<const float*>(from) : widened, scale, residual + start, put_in, count);
    if (is_plain()) {
      own.from_floats(put_in, to, count);
      own.to_floats(to, sent, count);
      m.keep_rest(put_in, sent, residual + start, count);
    } else {
      packing.encode_rest(put_in, to, residual + start, count);
    }
  });
}

void Wire::reduce_with_feedback(const void* const* inputs, int num_inputs, void* wire, float* residual, void* values,
                                size_t n) const {
  const Moves& m = moves();
  static constexpr float kZeros[kTile] = {};
  float sums[kTile], put_in[kTile], lost[kTile], kept[kTile];
  for_each_tile(n, [&](size_t start, size_t count) {
    char* const to = static_cast<char*>(wire) + offset(start);
    sum_tile(*this, inputs, num_inputs, start, sums, count);
    m.add_residual(sums, 1.0f, kZeros, put_in, count);  // -0 becomes 0, as in encode_with_feedback
    std::memset(lost, 0, count * sizeof(float));
    m.codecs[index_of(codec)].encode_rest(put_in, to, lost, count);
    m.add_residual(lost, 1.0f, residual + start, kept, count);
    std::memcpy(residual + start, kept, count * sizeof(float));
    decode(to, at(values, start * value_bytes), count);
  });
}

void Input::encode(const Wire& wire, void* to, size_t n) const {
  if (!is_packed_) return wire.encode(data_, to, n);
  if (n > 0) std::memcpy(to, data_, wire.bytes(n));
}

DType float_dtype(const char* op, const std::string& name) {
  const DType dtype = dtype_named(name);
  TPK_CHECK(is_float(dtype), op, ": dtype must be one of float32, float64, bfloat16, float16, got ", name);
  return dtype;
}

const Wire* find_wire(DType dtype, Codec codec, ReduceOp op) {
  static const Wires wires = all_wires();
  if (!exists(dtype, codec, op)) return nullptr;
  return &wires[index_of(dtype)][index_of(codec)][index_of(op)];
}

const Wire& wire_of(DType dtype, Codec codec, ReduceOp op) {
  const Wire* const wire = find_wire(dtype, codec, op);
  TPK_CHECK(wire != nullptr, why_not(dtype, codec, op));
  return *wire;
}

}  // namespace tpk
