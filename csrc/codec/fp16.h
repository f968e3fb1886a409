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

  // 2^shift as two factors, each representable: the shift can be 163 for a block of subnormals.
  struct Factors {
    float first, second;
    uint16_t keep;
  };

  TPK_ALWAYS_INLINE static int16_t scale_of(uint32_t largest) {
    if (largest >= 0x7f800000u) return kNotFinite;
    return static_cast<int16_t>(largest == 0 ? 0 : 14 - exponent_of(largest));
  }

  TPK_ALWAYS_INLINE static Factors powers(int shift) {
    return {power_of_two(shift / 2), power_of_two(shift - shift / 2), 0xffffu};
  }
  TPK_ALWAYS_INLINE static Factors packing(int16_t shift) {
    return shift == kNotFinite ? Factors{0.0f, 0.0f, 0} : powers(shift);
  }
  TPK_ALWAYS_INLINE static Factors unpacking(int16_t shift) {
    return shift == kNotFinite ? Factors{from_bits(0x7fc00000u), 1.0f, 0} : powers(-shift);
  }

  TPK_ALWAYS_INLINE static Half pack(float value, const Factors& by) {
    return static_cast<Half>(static_cast<uint16_t>(to_half(value * by.first * by.second)) & by.keep);
  }
  TPK_ALWAYS_INLINE static float unpack(Half payload, const Factors& by) {
    return to_float(payload) * by.first * by.second;
  }
};

}  // namespace tpk
