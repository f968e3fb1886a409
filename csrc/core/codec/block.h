// The wire of a codec: blocks of 512 values, and how the CPU walks over one.
//
//   block = [ scales | zeros up to kHeaderBytes | payloads ]          one scale for every kScaleValues values, in order
//
// A message may end in a shorter block: its header is whole, its payloads are as many as there are values. 512 values
// are 16 for each lane of a CUDA warp, which holds a block in registers; headers of a multiple of 16 bytes keep
// payloads aligned for 16-byte accesses.
#pragma once

#include <cstddef>

#include "half.h"

namespace tpk {

constexpr size_t kCodecBlockValues = 512;

template <class PayloadType, class ScaleType, size_t ScaleValues, size_t HeaderBytes>
struct BlockLayout {
  using Payload = PayloadType;
  using Scale = ScaleType;
  static constexpr size_t kBlockValues = kCodecBlockValues;
  static constexpr size_t kScaleValues = ScaleValues;
  static constexpr size_t kHeaderBytes = HeaderBytes;
  static constexpr size_t kBlockBytes = kHeaderBytes + kBlockValues * sizeof(Payload);
  static constexpr bool kScaled = kHeaderBytes > 0;
  static_assert(kBlockValues % kScaleValues == 0, "scales do not cross blocks");
  static_assert(kHeaderBytes % 16 == 0, "payloads stay aligned");
  static_assert(!kScaled || kBlockValues / kScaleValues * sizeof(Scale) <= kHeaderBytes,
                "the scales fit in the header");

  // Whether what shares this scale can be packed; if not, its payloads are zero.
  TPK_ALWAYS_INLINE static bool is_finite(Scale) { return true; }

  // Bytes of n values, the last block cut to what it holds.
  TPK_ALWAYS_INLINE static constexpr size_t bytes(size_t n) {
    return (n + kBlockValues - 1) / kBlockValues * kHeaderBytes + n * sizeof(Payload);
  }
};

// The Scale and the Factors of a codec that packs value by value.
struct NoScale {};

TPK_ALWAYS_INLINE uint32_t magnitude_bits(float value) { return bits_of(value) & 0x7fffffffu; }

// The exponent of 2^exponent <= magnitude < 2^(exponent + 1), subnormals included; the bits of a positive finite float.
TPK_ALWAYS_INLINE int exponent_of(uint32_t magnitude) {
  if (magnitude >= 0x00800000u) return static_cast<int>(magnitude >> 23) - 127;
  // A subnormal is its bits times 2^-149, and 23 bits are exact as a float.
  return static_cast<int>(bits_of(static_cast<float>(magnitude)) >> 23) - 127 - 149;
}

// 2^exponent for an exponent in [-126, 127].
TPK_ALWAYS_INLINE float power_of_two(int exponent) { return from_bits(static_cast<uint32_t>(exponent + 127) << 23); }

// In front of a loop over the scales of a block: unrolled whole, which the compiler likes to do, it is no vector code.
#if defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__)
#define TPK_ROLLED _Pragma("GCC unroll 1")
#else
#define TPK_ROLLED
#endif

// ---- the loops of the CPU over one block, n <= kBlockValues ---------------------------------------------------------

template <class C>
TPK_ALWAYS_INLINE typename C::Scale read_scale(const char* block, size_t which) {
  typename C::Scale scale{};
  if constexpr (C::kScaled) std::memcpy(&scale, block + which * sizeof scale, sizeof scale);
  return scale;
}

template <class C>
TPK_ALWAYS_INLINE uint32_t largest_of(const float* values, size_t n) {
  uint32_t largest = 0;
  for (size_t i = 0; i < n; ++i) {
    const uint32_t magnitude = magnitude_bits(values[i]);
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

// A whole block: every count is a constant, so that the loops become straight vector code, that over the scales, too.
template <class C>
TPK_ALWAYS_INLINE void encode_whole_block(const float* values, char* block) {
  constexpr size_t kEach = C::kScaleValues, kScales = C::kBlockValues / kEach;
  typename C::Payload* payload = reinterpret_cast<typename C::Payload*>(block + C::kHeaderBytes);
  typename C::Scale scales[kScales] = {};
  if constexpr (C::kScaled) {
    uint32_t largest[kScales];
    for (size_t g = 0; g < kScales; ++g) largest[g] = largest_of<C>(values + g * kEach, kEach);
    TPK_ROLLED
    for (size_t g = 0; g < kScales; ++g) scales[g] = C::scale_of(largest[g]);
    std::memset(block + sizeof scales, 0, C::kHeaderBytes - sizeof scales);
    std::memcpy(block, scales, sizeof scales);
  }
  typename C::Factors factors[kScales];
  TPK_ROLLED
  for (size_t g = 0; g < kScales; ++g) factors[g] = C::packing(scales[g]);
  TPK_ROLLED
  for (size_t g = 0; g < kScales; ++g) {
    for (size_t i = 0; i < kEach; ++i)
      payload[g * kEach + i] = static_cast<typename C::Payload>(C::pack(values[g * kEach + i], factors[g]));
  }
  if constexpr (!C::kScaled) return;
  size_t finite = 0;
  TPK_ROLLED
  for (size_t g = 0; g < kScales; ++g) finite += C::is_finite(scales[g]) ? 1 : 0;
  for (size_t g = 0; finite < kScales && g < kScales; ++g) {
    if (!C::is_finite(scales[g])) std::memset(payload + g * kEach, 0, kEach * sizeof *payload);
  }
}

template <class C>
TPK_ALWAYS_INLINE void encode_block(const float* values, char* block, size_t n) {
  if (n == C::kBlockValues) return encode_whole_block<C>(values, block);
  typename C::Payload* payload = reinterpret_cast<typename C::Payload*>(block + C::kHeaderBytes);
  if constexpr (C::kScaled) std::memset(block, 0, C::kHeaderBytes);
  for (size_t start = 0, which = 0; start < n; start += C::kScaleValues, ++which) {
    const size_t end = n - start < C::kScaleValues ? n : start + C::kScaleValues;
    typename C::Scale scale{};
    if constexpr (C::kScaled) {
      scale = C::scale_of(largest_of<C>(values + start, end - start));
      std::memcpy(block + which * sizeof scale, &scale, sizeof scale);
    }
    const typename C::Factors factors = C::packing(scale);
    for (size_t i = start; i < end; ++i) payload[i] = static_cast<typename C::Payload>(C::pack(values[i], factors));
    if (C::kScaled && !C::is_finite(scale)) std::memset(payload + start, 0, (end - start) * sizeof *payload);
  }
}

// take(i, value) for every value of a block.
template <class C, class Take>
TPK_ALWAYS_INLINE void for_each_of_block(const char* block, size_t n, Take take) {
  constexpr size_t kEach = C::kScaleValues, kScales = C::kBlockValues / kEach;
  const typename C::Payload* payload = reinterpret_cast<const typename C::Payload*>(block + C::kHeaderBytes);
  if (n == C::kBlockValues) {
    typename C::Scale scales[kScales] = {};
    if constexpr (C::kScaled) std::memcpy(scales, block, sizeof scales);
    typename C::Factors factors[kScales];
    TPK_ROLLED
    for (size_t g = 0; g < kScales; ++g) factors[g] = C::unpacking(scales[g]);
    TPK_ROLLED
    for (size_t g = 0; g < kScales; ++g) {
      for (size_t i = 0; i < kEach; ++i) take(g * kEach + i, C::unpack(payload[g * kEach + i], factors[g]));
    }
    return;
  }
  for (size_t start = 0, which = 0; start < n; start += kEach, ++which) {
    const size_t end = n - start < kEach ? n : start + kEach;
    const typename C::Factors factors = C::unpacking(read_scale<C>(block, which));
    for (size_t i = start; i < end; ++i) take(i, C::unpack(payload[i], factors));
  }
}

template <class C>
TPK_ALWAYS_INLINE void decode_block(const char* block, float* values, size_t n) {
  for_each_of_block<C>(block, n, [=](size_t i, float value) { values[i] = value; });
}

template <class C>
TPK_ALWAYS_INLINE void add_block(const char* block, float* sums, size_t n) {
  for_each_of_block<C>(block, n, [=](size_t i, float value) { sums[i] += value; });
}

}  // namespace tpk
