#include "wire.h"

#include <cstring>

#include "check.h"
#include "reduce.h"

namespace tpk {
namespace {

template <size_t Size>
size_t plain_bytes(size_t n) {
  return n * Size;
}

template <size_t Size>
void plain_copy(const void* from, void* to, size_t n) {
  if (from != to && n > 0) std::memcpy(to, from, n * Size);
}

template <class T, ReduceOp op>
void plain_reduce(const void* const* inputs, int num_inputs, void* const* outputs, int num_outputs, size_t n) {
  reduce_plain<T, op>(reinterpret_cast<const T* const*>(inputs), num_inputs, reinterpret_cast<T* const*>(outputs),
                      num_outputs, n);
}

template <class T, ReduceOp op>
void plain_reduce_to_values(const void* const* inputs, int num_inputs, void* values, size_t n) {
  plain_reduce<T, op>(inputs, num_inputs, &values, 1, n);
}

template <class T, ReduceOp op>
Wire plain_wire(DType dtype) {
  return {dtype,
          Codec::None,
          op,
          1,
          sizeof(T),
          plain_bytes<sizeof(T)>,
          plain_copy<sizeof(T)>,
          plain_copy<sizeof(T)>,
          plain_reduce<T, op>,
          plain_reduce_to_values<T, op>};
}

template <size_t Size>
Wire raw_wire(DType dtype) {
  return {dtype,   Codec::None, ReduceOp::None, 1, Size, plain_bytes<Size>, plain_copy<Size>, plain_copy<Size>,
          nullptr, nullptr};
}

template <class C, class T, ReduceOp op>
Wire coded_wire(DType dtype, Codec codec) {
  return {dtype,
          codec,
          op,
          C::kBlockValues,
          sizeof(T),
          C::bytes,
          [](const void* values, void* wire, size_t n) {
            encode<C, T>(static_cast<const T*>(values), static_cast<char*>(wire), n);
          },
          [](const void* wire, void* values, size_t n) {
            decode<C, T>(static_cast<const char*>(wire), static_cast<T*>(values), n);
          },
          [](const void* const* inputs, int num_inputs, void* const* outputs, int num_outputs, size_t n) {
            reduce_coded<C, op>(reinterpret_cast<const char* const*>(inputs), num_inputs,
                                reinterpret_cast<char* const*>(outputs), num_outputs, n);
          },
          [](const void* const* inputs, int num_inputs, void* values, size_t n) {
            reduce_coded_to_values<C, T, op>(reinterpret_cast<const char* const*>(inputs), num_inputs,
                                             static_cast<T*>(values), n);
          }};
}

template <class T>
const Wire& plain_wire_of(DType dtype, ReduceOp op) {
  static const Wire sum = plain_wire<T, ReduceOp::Sum>(dtype), avg = plain_wire<T, ReduceOp::Avg>(dtype),
                    max = plain_wire<T, ReduceOp::Max>(dtype), min = plain_wire<T, ReduceOp::Min>(dtype);
  switch (op) {
    case ReduceOp::Avg: return avg;
    case ReduceOp::Max: return max;
    case ReduceOp::Min: return min;
    default: return sum;
  }
}

template <class C, class T>
const Wire& coded_wire_of(DType dtype, Codec codec, ReduceOp op) {
  static const Wire sum = coded_wire<C, T, ReduceOp::Sum>(dtype, codec);
  static const Wire avg = coded_wire<C, T, ReduceOp::Avg>(dtype, codec);
  return op == ReduceOp::Avg ? avg : sum;
}

template <class T>
const Wire& coded_wire_of_dtype(DType dtype, Codec codec, ReduceOp op) {
  switch (codec) {
#define TPK_CODEC_CASE(name, id, type) \
  case Codec::id: return coded_wire_of<type, T>(dtype, codec, op);
    TPK_CODECS(TPK_CODEC_CASE)
#undef TPK_CODEC_CASE
    default: break;
  }
  throw std::invalid_argument("unknown codec");
}

bool is_float(DType dtype) { return dtype <= DType::F16; }
bool is_packable(DType dtype) { return is_float(dtype) && dtype != DType::F64; }

// The only place that decides which wires exist.
bool exists(DType dtype, Codec codec, ReduceOp op) {
  if (dtype >= DType::Raw1) return dtype < DType::Count && codec == Codec::None && op == ReduceOp::None;
  if (codec != Codec::None) {
    return codec < Codec::Count && is_packable(dtype) && op != ReduceOp::Max && op != ReduceOp::Min;
  }
  return is_float(dtype) || op != ReduceOp::Avg;
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

const Wire& coded(DType dtype, Codec codec, ReduceOp op) {
  switch (dtype) {
    case DType::BF16: return coded_wire_of_dtype<Bfloat16>(dtype, codec, op);
    case DType::F16: return coded_wire_of_dtype<Half>(dtype, codec, op);
    default: return coded_wire_of_dtype<float>(dtype, codec, op);
  }
}

const Wire& plain(DType dtype, ReduceOp op) {
  switch (dtype) {
    case DType::F64: return plain_wire_of<double>(dtype, op);
    case DType::BF16: return plain_wire_of<Bfloat16>(dtype, op);
    case DType::F16: return plain_wire_of<Half>(dtype, op);
    case DType::I8: return plain_wire_of<int8_t>(dtype, op);
    case DType::U8: return plain_wire_of<uint8_t>(dtype, op);
    case DType::I16: return plain_wire_of<int16_t>(dtype, op);
    case DType::I32: return plain_wire_of<int32_t>(dtype, op);
    case DType::I64: return plain_wire_of<int64_t>(dtype, op);
    default: return plain_wire_of<float>(dtype, op);
  }
}

const Wire& raw(DType dtype) {
  static const Wire wires[] = {raw_wire<1>(DType::Raw1), raw_wire<2>(DType::Raw2), raw_wire<4>(DType::Raw4),
                               raw_wire<8>(DType::Raw8), raw_wire<16>(DType::Raw16)};
  return wires[static_cast<size_t>(dtype) - static_cast<size_t>(DType::Raw1)];
}

}  // namespace

void Input::encode(const Wire& wire, void* to, size_t n) const {
  if (!is_packed_) return wire.encode(data_, to, n);
  if (n > 0) std::memcpy(to, data_, wire.bytes(n));
}

size_t Wire::values_in(size_t wire_bytes) const { return wire_bytes / bytes(block_values) * block_values; }

const Wire* find_wire(DType dtype, Codec codec, ReduceOp op) {
  if (!exists(dtype, codec, op)) return nullptr;
  if (dtype >= DType::Raw1) return &raw(dtype);
  return codec == Codec::None ? &plain(dtype, op) : &coded(dtype, codec, op);
}

const Wire& wire_of(DType dtype, Codec codec, ReduceOp op) {
  const Wire* const wire = find_wire(dtype, codec, op);
  TPK_CHECK(wire != nullptr, why_not(dtype, codec, op));
  return *wire;
}

}  // namespace tpk
