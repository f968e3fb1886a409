// fp16 with one power-of-two exponent for every 512 values: the block is shifted so that its largest magnitude lies in
// [2^14, 2^15), and therefore 333,824 and 1e-6 both survive where plain fp16 overflows or flushes to zero.
//
// Wire    header (16 bytes, of which the first 2 are the shift), then up to 512 fp16 values: 2.03 bytes a value.
// Error   |x - decoded| <= 2^-11 |x|, and never more than 2^-39 of the largest magnitude of x's block below that.
//         What rounds to 2^128 is infinity afterwards.
// NaN     a NaN or infinity makes its whole block decode to NaN, never to a number; the payloads of such a block are 0,
//         because what arithmetic makes of a NaN's bits differs between processors and the wire must not.
#pragma once

#include "block.h"

namespace tpk {

struct Fp16Codec : BlockLayout<Half, int16_t, kCodecBlockValues, 16> {
  static constexpr int16_t kNotFinite = INT16_MIN;
  static constexpr uint32_t kSmallestNormal = 0x38800000u;  // 2^-14

  // 2^shift as two factors, each representable: the shift can be 163 for a block of subnormals.
  struct Factors {
    float first, second;
  };

  TPK_ALWAYS_INLINE static int16_t scale_of(uint32_t largest) {
    if (largest >= 0x7f800000u) return kNotFinite;
    return static_cast<int16_t>(largest == 0 ? 0 : 14 - exponent_of(largest));
  }

  TPK_ALWAYS_INLINE static bool is_finite(int16_t shift) { return shift != kNotFinite; }
  TPK_ALWAYS_INLINE static Factors powers(int shift) {
    return {power_of_two(shift / 2), power_of_two(shift - shift / 2)};
  }
  TPK_ALWAYS_INLINE static Factors packing(int16_t shift) { return powers(shift); }
  TPK_ALWAYS_INLINE static Factors unpacking(int16_t shift) {
    return shift == kNotFinite ? Factors{from_bits(0x7fc00000u), 1.0f} : powers(-shift);
  }

  TPK_ALWAYS_INLINE static uint32_t pack(float value, const Factors& by) {
    // Adding the right power of two rounds to the last place and leaves the significand in the low bits, behind what
    // that power's own low bits hold: sign and exponent. to_half gives the same, and also takes values that cannot
    // occur here: no NaN, no overflow.
#ifdef __CUDA_ARCH__
    return converted(value * by.first * by.second);
#else
    const uint32_t bits = bits_of(value * by.first * by.second), magnitude = bits & 0x7fffffffu;
    const uint32_t own = magnitude & 0x7f800000u, exponent = own > kSmallestNormal ? own : kSmallestNormal;
    const uint32_t rest = (exponent >> 13) + (bits >> 16 & 0x8000u);
    return bits_of(from_bits(magnitude) + from_bits(exponent + rest + ((13u << 23) - (kSmallestNormal >> 13))));
#endif
  }
  TPK_ALWAYS_INLINE static float unpack(Half payload, const Factors& by) {
#ifdef __CUDA_ARCH__
    return converted(payload) * by.first * by.second;
#else
    const uint32_t sign = (static_cast<uint32_t>(payload) & 0x8000u) << 16;
    const uint32_t magnitude = (static_cast<uint32_t>(payload) & 0x7fffu) << 13;
    const float subnormal = from_bits(magnitude + kSmallestNormal) - 0x1p-14f;
    const uint32_t bits = magnitude < 0x00800000u ? bits_of(subnormal) : magnitude + (kSmallestNormal - 0x00800000u);
    return from_bits(bits | sign) * by.first * by.second;
#endif
  }
};

}  // namespace tpk
