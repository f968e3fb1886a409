// fp8 e4m3 (4 bits of exponent, 3 of mantissa, no infinity) with one power of two for every 32 values.
//
// Wire    header (16 bytes: the exponents of 16 groups of 32 values, a byte each), then up to 512 values, e4m3: 1.03
//         bytes a value. A value is its e4m3 times 2^(exponent - 134); the largest magnitude of a group lies in
//         (224, 448] before that, so that nothing saturates.
// Error   |x - decoded| <= 2^-4 |x|, and never more than 2^-17 of the largest magnitude of x's group below that; 2^-144
//         where that is more, in groups of subnormal numbers. Rounded to nearest, even in the middle; zeros keep signs.
//         What rounds to 2^128 is infinity afterwards.
// NaN     a NaN or infinity makes its whole group decode to NaN, never to a number; the payloads of such a group are 0.
#pragma once

#include "block.h"

namespace tpk {

enum class Fp8 : uint8_t {};

struct Fp8Codec : BlockLayout<Fp8, uint8_t, 32, 16> {
  static constexpr uint8_t kNotFinite = 255;

  struct Factors {
    float by;
  };

  // Values are e4m3 times 2^-7 between the two multiplications, which leaves both factors representable.
  static constexpr uint32_t kSmallestNormal = 0x39000000u;  // 2^-13
  static constexpr uint32_t kStepBelowIt = 20u << 23;       // mantissa bits that do not fit

  TPK_ALWAYS_INLINE static uint8_t scale_of(uint32_t largest) {
    // One more where the mantissa is above 1.75; the exponents of subnormal numbers count as the smallest.
    const uint32_t exponent = (largest + 0x1fffffu) >> 23;
    return static_cast<uint8_t>(largest >= 0x7f800000u ? kNotFinite : exponent < 1 ? 0 : exponent - 1);
  }

  TPK_ALWAYS_INLINE static bool is_finite(uint8_t scale) { return scale != kNotFinite; }

  // 2^(exponent - 127) for an exponent in [0, 254].
  TPK_ALWAYS_INLINE static float power(uint32_t exponent) {
    return from_bits(exponent == 0 ? 0x00400000u : exponent << 23);
  }
  TPK_ALWAYS_INLINE static Factors packing(uint8_t scale) { return {power(254u - scale)}; }
  TPK_ALWAYS_INLINE static Factors unpacking(uint8_t scale) {
    return {scale == kNotFinite ? from_bits(0x7fc00000u) : power(scale)};
  }

  // Adding the right power of two rounds to the last place and leaves the significand in the low bits, behind what that
  // power's own low bits hold: sign and exponent.
  TPK_ALWAYS_INLINE static uint32_t pack(float value, const Factors& factors) {
    const uint32_t bits = bits_of(value * factors.by), magnitude = bits & 0x7fffffffu;
    const uint32_t own = magnitude & 0x7f800000u, exponent = own > kSmallestNormal ? own : kSmallestNormal;
    const uint32_t rest = (exponent >> 20) + (bits >> 24 & 0x80u);
    return bits_of(from_bits(magnitude) + from_bits(exponent + rest + (kStepBelowIt - (kSmallestNormal >> 20))));
  }
  TPK_ALWAYS_INLINE static float unpack(Fp8 payload, const Factors& factors) {
    const uint32_t sign = (static_cast<uint32_t>(payload) & 0x80u) << 24;
    const uint32_t magnitude = (static_cast<uint32_t>(payload) & 0x7fu) << 20;
    const float subnormal = from_bits(magnitude + kSmallestNormal) - 0x1p-13f;
    const uint32_t bits = magnitude < 0x00800000u ? bits_of(subnormal) : magnitude + (kSmallestNormal - 0x00800000u);
    return from_bits(bits | sign) * factors.by;
  }
};

}  // namespace tpk
