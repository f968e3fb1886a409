// fp16 and bf16 conversions with round-to-nearest-even, the same bits on every backend, written so that plain loops
// over them become vector code.
#pragma once

#include <cstdint>
#include <cstring>

// What a CPU and a CUDA device both run.
#if defined(__CUDACC__)
#define TPK_HOST_DEVICE __host__ __device__
#else
#define TPK_HOST_DEVICE
#endif

// Inlined into functions that are compiled for a newer instruction set than this header is.
#define TPK_ALWAYS_INLINE TPK_HOST_DEVICE inline __attribute__((always_inline))

namespace tpk {

// Scalar types, not structs: the compiler does not vectorise loops over structs.
enum class Half : uint16_t {};
enum class Bfloat16 : uint16_t {};

static_assert(sizeof(Half) == 2 && sizeof(Bfloat16) == 2, "wire types are two bytes");

TPK_ALWAYS_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

TPK_ALWAYS_INLINE float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

TPK_ALWAYS_INLINE float to_float(float value) { return value; }

TPK_ALWAYS_INLINE float to_float(Bfloat16 value) { return from_bits(static_cast<uint32_t>(value) << 16); }

TPK_ALWAYS_INLINE Bfloat16 to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  // Rounding could carry a NaN's payload into infinity: NaN is made quiet instead.
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return static_cast<Bfloat16>(is_nan ? (bits >> 16) | 0x40u : rounded);
}

#ifdef __CUDA_ARCH__
// By the instructions of a GPU, which round and keep subnormals as the arithmetic below does. A NaN becomes their own.
__device__ __forceinline__ float converted(Half value) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(static_cast<uint16_t>(value)));
  return wide;
}
__device__ __forceinline__ uint32_t converted(float value) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
#endif

// Integer arithmetic, eight or sixteen values at a time; the compiler's _Float16 would go one by one where the CPU has
// F16C but no AVX512-FP16, and call a library where it has neither. A NaN is made quiet and keeps the upper bits of its
// payload, as processors with an instruction for it do (vector.h); on a GPU by hand.
TPK_ALWAYS_INLINE float to_float(Half value) {
#ifdef __CUDA_ARCH__
  const uint32_t half = static_cast<uint32_t>(value), sign = (half & 0x8000u) << 16;
  const uint32_t nan = sign | 0x7fc00000u | (half & 0x7fffu) << 13;
  return (half & 0x7fffu) > 0x7c00u ? from_bits(nan) : converted(value);
#else
  const uint32_t sign = (static_cast<uint32_t>(value) & 0x8000u) << 16;
  const uint32_t magnitude = (static_cast<uint32_t>(value) & 0x7fffu) << 13;
  // A subnormal half is a multiple of 2^-24: put it behind the leading one of 2^-14 and take that one away again.
  const float subnormal = from_bits(magnitude + 0x38800000u) - 6.103515625e-05f;
  uint32_t bits = magnitude < 0x00800000u ? bits_of(subnormal) : magnitude + 0x38000000u;
  bits = magnitude >= 0x0f800000u ? (magnitude | 0x7f800000u) : bits;
  bits = magnitude > 0x0f800000u ? (bits | 0x00400000u) : bits;
  return from_bits(bits | sign);
#endif
}

TPK_ALWAYS_INLINE Half to_half(float value) {
  const uint32_t sign = (bits_of(value) >> 16) & 0x8000u;
  const uint32_t magnitude = bits_of(value) & 0x7fffffffu;
#ifdef __CUDA_ARCH__
  const uint32_t nan = sign | 0x7e00u | (magnitude >> 13 & 0x3ffu);
  return static_cast<Half>(magnitude > 0x7f800000u ? nan : converted(value));
#else
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t subnormal = bits_of(from_bits(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t bits = magnitude < 0x38800000u ? subnormal : normal;
  bits = magnitude >= 0x47800000u ? 0x7c00u : bits;
  bits = magnitude > 0x7f800000u ? (magnitude >> 13 & 0x3ffu) | 0x7e00u : bits;
  return static_cast<Half>(bits | sign);
#endif
}

// value rounded once to T.
template <class T>
TPK_ALWAYS_INLINE T from_float(float value);
template <>
TPK_ALWAYS_INLINE float from_float<float>(float value) {
  return value;
}
template <>
TPK_ALWAYS_INLINE Half from_float<Half>(float value) {
  return to_half(value);
}
template <>
TPK_ALWAYS_INLINE Bfloat16 from_float<Bfloat16>(float value) {
  return to_bfloat16(value);
}

}  // namespace tpk
