// Compiled for each instruction set, with TPK_MOVES as the name of its table. Nothing here may be a function that the
// linker merges with one of another file: it would run where its instructions do not exist.
#include "moves.h"

#include <cstdint>
#include <cstring>

#include "core/codec/sum.h"
#include "core/codec/vector_codecs.h"

#ifndef TPK_MOVES
#define TPK_MOVES kPlainMoves
#endif

namespace tpk {
namespace {

// ---- values of 16 bits ----------------------------------------------------------------------------------------------

template <class T>
void from_floats(const float* values, void* to, size_t n) {
  T* const out = static_cast<T*>(to);
  size_t i = 0;
#if defined(TPK_VECTORS)
  if constexpr (sizeof(T) == 2) {
    for (; i + kFour <= n; i += kFour) {
      Floats four[4], sent[4];
      for (size_t v = 0; v < 4; ++v) four[v] = load(values + i + v * kWidth);
      store_payloads(four, out + i, sent);
    }
  }
#endif
  for (; i < n; ++i) out[i] = from_float<T>(values[i]);
}

template <class T>
void to_floats(const void* from, float* values, size_t n) {
  const T* const in = static_cast<const T*>(from);
  size_t i = 0;
#if defined(TPK_VECTORS)
  if constexpr (sizeof(T) == 2) {
    for (; i + kFour <= n; i += kFour) {
      Floats four[4];
      load_payloads(in + i, four);
      for (size_t v = 0; v < 4; ++v) store(values + i + v * kWidth, four[v]);
    }
  }
#endif
  for (; i < n; ++i) values[i] = to_float(in[i]);
}

// ---- plain wires ----------------------------------------------------------------------------------------------------

// What kernels of devices do not have (codec/sum.h) is here.
template <class T, ReduceOp op>
TPK_ALWAYS_INLINE auto step(typename Sum<T>::type left, typename Sum<T>::type right) -> typename Sum<T>::type {
  using S = typename Sum<T>::type;
  if constexpr (op <= ReduceOp::Min) {
    return combine<T>(op, left, right);
  } else if constexpr (op == ReduceOp::Product) {
    // Integers of 16 bits would be multiplied as int, which must not overflow.
    if constexpr (std::is_integral_v<S>) return static_cast<S>(uint64_t{left} * uint64_t{right});
    return static_cast<S>(left * right);
  } else {
    static_assert(std::is_integral_v<S>);
    return static_cast<S>(op == ReduceOp::BitAnd ? left & right : op == ReduceOp::BitOr ? left | right : left ^ right);
  }
}

template <class T, ReduceOp op>
void reduce_two(const T* const* inputs, T* const* outputs, int num_outputs, size_t n) {
  const T* first = inputs[0];
  const T* second = inputs[1];
  T* out = outputs[0];
  T* copy = outputs[num_outputs - 1];
#pragma GCC ivdep
  for (size_t i = 0; i < n; ++i) {
    const T value = finish<T>(op, step<T, op>(Sum<T>::in(first[i]), Sum<T>::in(second[i])), 2);
    out[i] = value;
    copy[i] = value;
  }
}

constexpr size_t kTile = 1024;

template <class T, ReduceOp op>
void reduce_tile(const T* const* inputs, int num_inputs, T* __restrict result, size_t start, size_t n) {
  typename Sum<T>::type sums[kTile];
  for (size_t i = 0; i < n; ++i) sums[i] = Sum<T>::in(inputs[0][start + i]);
  for (int r = 1; r < num_inputs; ++r) {
    const T* input = inputs[r] + start;
    for (size_t i = 0; i < n; ++i) sums[i] = step<T, op>(sums[i], Sum<T>::in(input[i]));
  }
  for (size_t i = 0; i < n; ++i) result[i] = finish<T>(op, sums[i], num_inputs);
}

// Of 16 bits: widened, so that the instructions for it are used and the sum is a loop over floats.
template <class T, ReduceOp op>
void reduce_widened(const void* const* inputs, int num_inputs, void* const* outputs, int num_outputs, size_t n) {
  float sums[kTile], next[kTile];
  T result[kTile];
  for (size_t start = 0; start < n; start += kTile) {
    const size_t count = n - start < kTile ? n - start : kTile;
    to_floats<T>(static_cast<const T*>(inputs[0]) + start, sums, count);
    for (int r = 1; r < num_inputs; ++r) {
      to_floats<T>(static_cast<const T*>(inputs[r]) + start, next, count);
      for (size_t i = 0; i < count; ++i) sums[i] = step<float, op>(sums[i], next[i]);
    }
    for (size_t i = 0; i < count; ++i) sums[i] = finish<float>(op, sums[i], num_inputs);
    from_floats<T>(sums, result, count);
    for (int k = 0; k < num_outputs; ++k) std::memcpy(static_cast<T*>(outputs[k]) + start, result, count * sizeof(T));
  }
}

template <class T, ReduceOp op>
void reduce(const void* const* in, int num_inputs, void* const* out, int num_outputs, size_t n) {
  const T* const* inputs = reinterpret_cast<const T* const*>(in);
  T* const* outputs = reinterpret_cast<T* const*>(out);
  if (num_inputs == 2 && num_outputs <= 2) return reduce_two<T, op>(inputs, outputs, num_outputs, n);
  T result[kTile];
  for (size_t start = 0; start < n; start += kTile) {
    const size_t count = n - start < kTile ? n - start : kTile;
    reduce_tile<T, op>(inputs, num_inputs, result, start, count);
    for (int k = 0; k < num_outputs; ++k) std::memcpy(outputs[k] + start, result, count * sizeof(T));
  }
}

// ---- wires of a codec -----------------------------------------------------------------------------------------------

template <class C>
__attribute__((noinline)) void encode_plain(const float* values, char* wire, size_t n) {
  for (; n > C::kBlockValues; n -= C::kBlockValues, values += C::kBlockValues, wire += C::kBlockBytes)
    encode_block<C>(values, wire, C::kBlockValues);
  if (n > 0) encode_block<C>(values, wire, n);
}

template <class C>
__attribute__((noinline)) void decode_plain(const char* wire, float* values, size_t n) {
  for (; n > C::kBlockValues; n -= C::kBlockValues, values += C::kBlockValues, wire += C::kBlockBytes)
    decode_block<C>(wire, values, C::kBlockValues);
  if (n > 0) decode_block<C>(wire, values, n);
}

template <class C>
__attribute__((noinline)) void add_plain(const char* wire, float* sums, size_t n) {
  for (; n > C::kBlockValues; n -= C::kBlockValues, sums += C::kBlockValues, wire += C::kBlockBytes)
    add_block<C>(wire, sums, C::kBlockValues);
  if (n > 0) add_block<C>(wire, sums, n);
}

// residual = sum - sent, where that is finite.
void keep_rest(const float* sum, const float* sent, float* __restrict residual, size_t n) {
  for (size_t i = 0; i < n; ++i) {
    const float rest = sum[i] - sent[i];
    residual[i] = magnitude_bits(rest) < 0x7f800000u ? rest : residual[i];
  }
}

template <class C>
__attribute__((noinline)) void keep_plain(const float* sum, const char* wire, float* residual, size_t n) {
  float sent[C::kBlockValues];
  for (size_t start = 0; start < n; start += C::kBlockValues, wire += C::kBlockBytes) {
    const size_t count = n - start < C::kBlockValues ? n - start : C::kBlockValues;
    decode_block<C>(wire, sent, count);
    keep_rest(sum + start, sent, residual + start, count);
  }
}

template <class C, Kept kind>
void encode_and_keep_plain(const float* values, char* wire, float* kept, size_t n) {
  encode_plain<C>(values, wire, n);
  if (kind == Kept::Sent) decode_plain<C>(wire, kept, n);
  if (kind == Kept::Rest) keep_plain<C>(values, wire, kept, n);
}

template <class C, Kept kind>
void encode_and_keep(const float* values, char* wire, float* kept, size_t n) {
  if constexpr (kHasVectors<C>) {
    // The scales of a block take their time: those of the next are computed while this one is packed.
    float factors[2][kFactors<C>], inverse[kScales<C>];
    bool is_fit = n >= C::kBlockValues && VectorCodec<C>::write_scales(values, wire, factors[0]);
    for (size_t b = 0; n >= C::kBlockValues; ++b, n -= C::kBlockValues) {
      bool is_next_fit = false;
      if (n >= 2 * C::kBlockValues)
        is_next_fit =
            VectorCodec<C>::write_scales(values + C::kBlockValues, wire + C::kBlockBytes, factors[(b + 1) % 2]);
      if (is_fit && (kind == Kept::Nothing || VectorCodec<C>::read_scales(wire, inverse))) {
        pack_whole<C, kind>(values, factors[b % 2], inverse, wire, kept);
      } else {
        encode_and_keep_plain<C, kind>(values, wire, kept, C::kBlockValues);
      }
      is_fit = is_next_fit;
      values += C::kBlockValues;
      wire += C::kBlockBytes;
      if (kind != Kept::Nothing) kept += C::kBlockValues;
    }
  }
  encode_and_keep_plain<C, kind>(values, wire, kept, n);
}

template <class C>
void encode(const float* values, char* wire, size_t n) {
  encode_and_keep<C, Kept::Nothing>(values, wire, nullptr, n);
}

template <class C>
void decode(const char* wire, float* values, size_t n) {
  if constexpr (kHasVectors<C>) {
    float factors[kScales<C>];
    for (; n >= C::kBlockValues; n -= C::kBlockValues, values += C::kBlockValues, wire += C::kBlockBytes) {
      if (VectorCodec<C>::read_scales(wire, factors)) {
        unpack_whole<C>(wire, factors, values);
      } else {
        decode_plain<C>(wire, values, C::kBlockValues);
      }
    }
  }
  decode_plain<C>(wire, values, n);
}

template <class C>
void add(const char* wire, float* sums, size_t n) {
  if constexpr (kHasVectors<C>) {
    float factors[kScales<C>];
    for (; n >= C::kBlockValues; n -= C::kBlockValues, sums += C::kBlockValues, wire += C::kBlockBytes) {
      if (VectorCodec<C>::read_scales(wire, factors)) {
        add_whole<C>(wire, factors, sums);
      } else {
        add_plain<C>(wire, sums, C::kBlockValues);
      }
    }
  }
  add_plain<C>(wire, sums, n);
}

// Both in one pass.
template <class C>
void sum_two(const char* wire, const char* other, float* sums, size_t n) {
  if constexpr (kHasVectors<C>) {
    float factors[2][kScales<C>];
    for (; n >= C::kBlockValues;
         n -= C::kBlockValues, sums += C::kBlockValues, wire += C::kBlockBytes, other += C::kBlockBytes) {
      const bool is_fit = VectorCodec<C>::read_scales(wire, factors[0]);
      if (VectorCodec<C>::read_scales(other, factors[1]) && is_fit) {
        add_two_whole<C>(wire, factors[0], other, factors[1], sums);
      } else {
        decode_plain<C>(wire, sums, C::kBlockValues);
        add_plain<C>(other, sums, C::kBlockValues);
      }
    }
  }
  decode_plain<C>(wire, sums, n);
  add_plain<C>(other, sums, n);
}

template <class C>
void sum(const char* const* wires, int num_wires, size_t offset, float* sums, size_t n) {
  if (num_wires == 1) return decode<C>(wires[0] + offset, sums, n);
  sum_two<C>(wires[0] + offset, wires[1] + offset, sums, n);
  for (int r = 2; r < num_wires; ++r) add<C>(wires[r] + offset, sums, n);
}

// Multiplying by the inverse of a power of two rounds as dividing by it does.
void divide(float* values, int by, size_t n) {
  const float divisor = static_cast<float>(by), inverse = 1.0f / divisor;
  if ((by & (by - 1)) == 0) {
    for (size_t i = 0; i < n; ++i) values[i] *= inverse;
  } else {
    for (size_t i = 0; i < n; ++i) values[i] /= divisor;
  }
}

void add_residual(const float* values, float scale, const float* residual, float* __restrict sum, size_t n) {
  for (size_t i = 0; i < n; ++i) sum[i] = scale * values[i] + residual[i];
}

template <class C>
constexpr CodecMoves kOfCodec = {encode<C>, encode_and_keep<C, Kept::Sent>, encode_and_keep<C, Kept::Rest>, decode<C>,
                                 sum<C>};
template <class T>
constexpr DTypeMoves kOfDType = {from_floats<T>, to_floats<T>};

}  // namespace

#define TPK_FLOATING(reduce, T)                                                                            \
  {reduce<T, ReduceOp::Sum>, reduce<T, ReduceOp::Avg>, reduce<T, ReduceOp::Max>, reduce<T, ReduceOp::Min>, \
   reduce<T, ReduceOp::Product>}
#define TPK_INTEGER(T)                                        \
  {reduce<T, ReduceOp::Sum>,     nullptr,                     \
   reduce<T, ReduceOp::Max>,     reduce<T, ReduceOp::Min>,    \
   reduce<T, ReduceOp::Product>, reduce<T, ReduceOp::BitAnd>, \
   reduce<T, ReduceOp::BitOr>,   reduce<T, ReduceOp::BitXor>}
#define TPK_OF_CODEC(name, id, C) kOfCodec<C>,

const Moves TPK_MOVES = {
    {{}, TPK_CODECS(TPK_OF_CODEC)},
    {kOfDType<float>, {}, kOfDType<Bfloat16>, kOfDType<Half>},
    {TPK_FLOATING(reduce, float), TPK_FLOATING(reduce, double), TPK_FLOATING(reduce, Bfloat16),
     TPK_FLOATING(reduce_widened, Half), TPK_INTEGER(int8_t), TPK_INTEGER(uint8_t), TPK_INTEGER(int16_t),
     TPK_INTEGER(int32_t), TPK_INTEGER(int64_t)},
    divide,
    add_residual,
    keep_rest,
};

#undef TPK_FLOATING
#undef TPK_INTEGER
#undef TPK_OF_CODEC

}  // namespace tpk
