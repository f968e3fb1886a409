// int8 with a scale for every 32 values: a quarter of fp32, and at one byte a value closer to gradients than fp8.
//
// Wire    header (32 bytes: the scales of 16 groups of 32 values, 2 bytes each), then up to 512 values, int8: 1.0625
//         bytes a value. A scale is a float of 9 bits of exponent (bias 191) and 7 of mantissa, without a sign, so that
//         it reaches down to subnormal values: (1 + m / 128) 2^(e - 191). It is the largest magnitude of the group over
//         127, rounded up, so that every value is a whole number of scales between -127 and 127.
// Error   |x - decoded| <= 1/252 of the largest magnitude of x's group of 32, whatever its amplitude, and half the
//         smallest subnormal number on top where the result is subnormal itself. Signed zeros lose their sign.
// NaN     a NaN or infinity makes its whole group decode to NaN, never to a number; the payloads of such a group are 0.
#pragma once

#include "block.h"

namespace tpk {

struct Int8Codec : BlockLayout<int8_t, uint16_t, 32, 32> {
  static constexpr uint16_t kNotFinite = 0xffff;
  static constexpr int kBias = 191;

  // The scale or its inverse as two factors, each representable: its exponent lies between
  // -156 and 121, and is -191 in a group of zeros.
  struct Factors {
    float first, second;
  };

  TPK_ALWAYS_INLINE static uint16_t scale_of(uint32_t largest) {
    // Scales of small values are computed 2^64 times as large: they would be subnormal, and lose digits.
    const bool is_small = largest < 0x10000000u;
    const float lifted = from_bits(largest) * (is_small ? 0x1p64f : 1.0f) * (1.0f / 127.0f);
    const uint32_t rounded_up = ((bits_of(lifted) + 0xffffu) >> 16) + (is_small ? 0u : 64u << 7);
    return static_cast<uint16_t>(largest >= 0x7f800000u ? kNotFinite : rounded_up);
  }

  TPK_ALWAYS_INLINE static bool is_finite(uint16_t scale) { return scale != kNotFinite; }
  TPK_ALWAYS_INLINE static int exponent(uint16_t scale) { return (scale >> 7) - kBias; }
  TPK_ALWAYS_INLINE static float mantissa(uint16_t scale) {
    return from_bits(0x3f800000u | static_cast<uint32_t>(scale & 127) << 16);
  }
  TPK_ALWAYS_INLINE static Factors packing(uint16_t scale) {
    const int shift = -exponent(scale), half = shift >> 1;
    return {power_of_two(half), 1.0f / mantissa(scale) * power_of_two(shift - half)};
  }
  TPK_ALWAYS_INLINE static Factors unpacking(uint16_t scale) {
    const int shift = scale == kNotFinite ? 0 : exponent(scale), half = shift >> 1;
    return {scale == kNotFinite ? from_bits(0x7fc00000u) : mantissa(scale) * power_of_two(half),
            power_of_two(shift - half)};
  }

  // Adding 1.5 * 2^23 rounds to the nearest whole number, even in the middle, and leaves it in the low bits.
  TPK_ALWAYS_INLINE static uint32_t pack(float value, const Factors& by) {
    return bits_of(value * by.first * by.second + 0x1.8p23f);
  }
  TPK_ALWAYS_INLINE static float unpack(int8_t payload, const Factors& by) {
    return static_cast<float>(payload) * by.first * by.second;
  }
};

}  // namespace tpk
