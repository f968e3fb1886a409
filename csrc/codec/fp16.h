// fp16 with one power-of-two exponent for every 512 values: the block is shifted so that its largest magnitude lies in
// [2^14, 2^15), and therefore 333,824 and 1e-6 both survive where plain fp16 overflows or flushes to zero.
//
// Wire    header (16 bytes, of which the first 2 are the shift), then up to 512 fp16 values: 2.03 bytes a value.
// Error   |x - decoded| <= 2^-11 |x|, and never more than 2^-39 of the largest magnitude of x's block below that.
// NaN     a NaN or infinity makes its whole block decode to NaN, never to a number.
#pragma once

#include <cmath>
#include <cstddef>
#include <limits>

#include "half.h"

namespace tpk {

struct Fp16Codec {
  static constexpr size_t kBlockValues = 512;
  static constexpr size_t kHeaderBytes = 16;
  static constexpr size_t kBlockBytes = kHeaderBytes + kBlockValues * sizeof(Half);
  static constexpr int16_t kNotFinite = std::numeric_limits<int16_t>::min();

  // Bytes of n values, the last block cut to what it holds.
  static constexpr size_t bytes(size_t n) {
    const size_t tail = n % kBlockValues;
    return n / kBlockValues * kBlockBytes + (tail ? kHeaderBytes + tail * sizeof(Half) : 0);
  }

  // 2^shift as two factors, each representable: the shift can be 163 for a block of subnormals.
  static float half_power(int shift) { return std::ldexp(1.0f, shift / 2); }
  static float other_half_power(int shift) { return std::ldexp(1.0f, shift - shift / 2); }

  // n <= kBlockValues.
  static inline __attribute__((always_inline)) void encode_block(const float* values, char* block, size_t n) {
    uint32_t largest = 0;
    for (size_t i = 0; i < n; ++i) {
      const uint32_t magnitude = bits_of(values[i]) & 0x7fffffffu;
      largest = magnitude > largest ? magnitude : largest;
    }
    int16_t shift = kNotFinite;
    float first = 0.0f, second = 0.0f;
    if (largest < 0x7f800000u) {
      shift = static_cast<int16_t>(largest == 0 ? 0 : 14 - std::ilogb(from_bits(largest)));
      first = half_power(shift), second = other_half_power(shift);
    }
    char header[kHeaderBytes] = {};
    std::memcpy(header, &shift, sizeof shift);
    std::memcpy(block, header, kHeaderBytes);
    Half* payload = reinterpret_cast<Half*>(block + kHeaderBytes);
    for (size_t i = 0; i < n; ++i) payload[i] = to_half(values[i] * first * second);
  }

  // The factors that undo a block's shift; NaN where the block was not finite.
  static void factors(const char* block, float& first, float& second) {
    int16_t shift;
    std::memcpy(&shift, block, sizeof shift);
    first = shift == kNotFinite ? std::numeric_limits<float>::quiet_NaN() : half_power(-shift);
    second = shift == kNotFinite ? 1.0f : other_half_power(-shift);
  }

  static inline __attribute__((always_inline)) void decode_block(const char* block, float* values, size_t n) {
    float first, second;
    factors(block, first, second);
    const Half* payload = reinterpret_cast<const Half*>(block + kHeaderBytes);
    for (size_t i = 0; i < n; ++i) values[i] = to_float(payload[i]) * first * second;
  }

  static inline __attribute__((always_inline)) void add_block(const char* block, float* sums, size_t n) {
    float first, second;
    factors(block, first, second);
    const Half* payload = reinterpret_cast<const Half*>(block + kHeaderBytes);
    for (size_t i = 0; i < n; ++i) sums[i] += to_float(payload[i]) * first * second;
  }
};

}  // namespace tpk
