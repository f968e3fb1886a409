#include "reduce.h"

#include <cstdint>
#include <cstring>

#include "core/codec/codec.h"
#include "core/codec/sum.h"
#include "simd.h"

namespace tpk {
namespace {

// Outputs may be inputs (a sum written back over what was read): each value is read before it is written.
template <class T, ReduceOp op>
TPK_INLINE void reduce_two(const T* const* inputs, T* const* outputs, int num_outputs, size_t n) {
  const T* first = inputs[0];
  const T* second = inputs[1];
  T* out = outputs[0];
  T* copy = outputs[num_outputs - 1];
#pragma GCC ivdep
  for (size_t i = 0; i < n; ++i) {
    const T value = finish<T>(op, combine<T>(op, Sum<T>::in(first[i]), Sum<T>::in(second[i])), 2);
    out[i] = value;
    copy[i] = value;
  }
}

constexpr size_t kTile = 1024;

template <class T, ReduceOp op>
TPK_INLINE void reduce_tile(const T* const* inputs, int num_inputs, T* __restrict result, size_t start, size_t n) {
  typename Sum<T>::type sums[kTile];
  for (size_t i = 0; i < n; ++i) sums[i] = Sum<T>::in(inputs[0][start + i]);
  for (int r = 1; r < num_inputs; ++r) {
    const T* input = inputs[r] + start;
    for (size_t i = 0; i < n; ++i) sums[i] = combine<T>(op, sums[i], Sum<T>::in(input[i]));
  }
  for (size_t i = 0; i < n; ++i) result[i] = finish<T>(op, sums[i], num_inputs);
}

template <class T, ReduceOp op>
TPK_INLINE void reduce_loop(const T* const* inputs, int num_inputs, T* const* outputs, int num_outputs, size_t n) {
  if (num_inputs == 2 && num_outputs <= 2) return reduce_two<T, op>(inputs, outputs, num_outputs, n);
  T result[kTile];
  for (size_t start = 0; start < n; start += kTile) {
    const size_t count = n - start < kTile ? n - start : kTile;
    reduce_tile<T, op>(inputs, num_inputs, result, start, count);
    for (int k = 0; k < num_outputs; ++k) std::memcpy(outputs[k] + start, result, count * sizeof(T));
  }
}

template <class C, class T>
TPK_INLINE void encode_loop(const T* values, char* wire, size_t n) {
  float block[C::kBlockValues];
  for (size_t start = 0; start < n; start += C::kBlockValues, wire += C::kBlockBytes) {
    const size_t count = n - start < C::kBlockValues ? n - start : C::kBlockValues;
    if constexpr (std::is_same_v<T, float>) {
      encode_block<C>(values + start, wire, count);
    } else {
      for (size_t i = 0; i < count; ++i) block[i] = to_float(values[start + i]);
      encode_block<C>(block, wire, count);
    }
  }
}

template <class C, class T>
TPK_INLINE void decode_loop(const char* wire, T* values, size_t n) {
  float block[C::kBlockValues];
  for (size_t start = 0; start < n; start += C::kBlockValues, wire += C::kBlockBytes) {
    const size_t count = n - start < C::kBlockValues ? n - start : C::kBlockValues;
    if constexpr (std::is_same_v<T, float>) {
      decode_block<C>(wire, values + start, count);
    } else {
      decode_block<C>(wire, block, count);
      for (size_t i = 0; i < count; ++i) values[start + i] = from_float<T>(block[i]);
    }
  }
}

template <class C, ReduceOp op>
TPK_INLINE void sum_block(const char* const* inputs, int num_inputs, size_t offset, float* sums, size_t n) {
  decode_block<C>(inputs[0] + offset, sums, n);
  for (int r = 1; r < num_inputs; ++r) add_block<C>(inputs[r] + offset, sums, n);
  if constexpr (op == ReduceOp::Avg) {
    for (size_t i = 0; i < n; ++i) sums[i] /= static_cast<float>(num_inputs);
  }
}

template <class C, ReduceOp op>
TPK_INLINE void reduce_coded_loop(const char* const* inputs, int num_inputs, char* const* outputs, int num_outputs,
                                  size_t n) {
  float sums[C::kBlockValues];
  size_t offset = 0;
  for (size_t start = 0; start < n; start += C::kBlockValues, offset += C::kBlockBytes) {
    const size_t count = n - start < C::kBlockValues ? n - start : C::kBlockValues;
    sum_block<C, op>(inputs, num_inputs, offset, sums, count);
    encode_block<C>(sums, outputs[0] + offset, count);
    for (int k = 1; k < num_outputs; ++k) std::memcpy(outputs[k] + offset, outputs[0] + offset, C::bytes(count));
  }
}

template <class C, class T, ReduceOp op>
TPK_INLINE void reduce_coded_to_values_loop(const char* const* inputs, int num_inputs, T* values, size_t n) {
  float sums[C::kBlockValues];
  size_t offset = 0;
  for (size_t start = 0; start < n; start += C::kBlockValues, offset += C::kBlockBytes) {
    const size_t count = n - start < C::kBlockValues ? n - start : C::kBlockValues;
    sum_block<C, op>(inputs, num_inputs, offset, sums, count);
    for (size_t i = 0; i < count; ++i) values[start + i] = from_float<T>(sums[i]);
  }
}

}  // namespace

// Explicit specialisations, because the compiler makes instruction-set clones of functions and not of templates.

#define TPK_PLAIN(T, op)                                                                                        \
  template <>                                                                                                   \
  TPK_SIMD void reduce_plain<T, op>(const T* const* inputs, int num_inputs, T* const* outputs, int num_outputs, \
                                    size_t n) {                                                                 \
    reduce_loop<T, op>(inputs, num_inputs, outputs, num_outputs, n);                                            \
  }
#define TPK_PLAIN_OPS(T)      \
  TPK_PLAIN(T, ReduceOp::Sum) \
  TPK_PLAIN(T, ReduceOp::Avg) \
  TPK_PLAIN(T, ReduceOp::Max) \
  TPK_PLAIN(T, ReduceOp::Min)

TPK_PLAIN_OPS(float)
TPK_PLAIN_OPS(double)
TPK_PLAIN_OPS(Half)
TPK_PLAIN_OPS(Bfloat16)
TPK_PLAIN_OPS(int8_t)
TPK_PLAIN_OPS(uint8_t)
TPK_PLAIN_OPS(int16_t)
TPK_PLAIN_OPS(int32_t)
TPK_PLAIN_OPS(int64_t)

#define TPK_CODED_DTYPE(C, T)                                                                                     \
  template <>                                                                                                     \
  TPK_SIMD void encode<C, T>(const T* values, char* wire, size_t n) {                                             \
    encode_loop<C, T>(values, wire, n);                                                                           \
  }                                                                                                               \
  template <>                                                                                                     \
  TPK_SIMD void decode<C, T>(const char* wire, T* values, size_t n) {                                             \
    decode_loop<C, T>(wire, values, n);                                                                           \
  }                                                                                                               \
  template <>                                                                                                     \
  TPK_SIMD void reduce_coded_to_values<C, T, ReduceOp::Sum>(const char* const* inputs, int num_inputs, T* values, \
                                                            size_t n) {                                           \
    reduce_coded_to_values_loop<C, T, ReduceOp::Sum>(inputs, num_inputs, values, n);                              \
  }                                                                                                               \
  template <>                                                                                                     \
  TPK_SIMD void reduce_coded_to_values<C, T, ReduceOp::Avg>(const char* const* inputs, int num_inputs, T* values, \
                                                            size_t n) {                                           \
    reduce_coded_to_values_loop<C, T, ReduceOp::Avg>(inputs, num_inputs, values, n);                              \
  }

#define TPK_CODED_REDUCE(C, op)                                                                                       \
  template <>                                                                                                         \
  TPK_SIMD void reduce_coded<C, op>(const char* const* inputs, int num_inputs, char* const* outputs, int num_outputs, \
                                    size_t n) {                                                                       \
    reduce_coded_loop<C, op>(inputs, num_inputs, outputs, num_outputs, n);                                            \
  }

#define TPK_CODED(name, id, C)       \
  TPK_CODED_DTYPE(C, float)          \
  TPK_CODED_DTYPE(C, Half)           \
  TPK_CODED_DTYPE(C, Bfloat16)       \
  TPK_CODED_REDUCE(C, ReduceOp::Sum) \
  TPK_CODED_REDUCE(C, ReduceOp::Avg)

TPK_CODECS(TPK_CODED)

}  // namespace tpk
