// bf16: every value rounded to 8 significant bits, the range of fp32.
//
// Wire    2 bytes a value, no header; processed 512 values at a time, any count is allowed.
// Error   |x - decoded| <= 2^-8 |x| for normal x that does not round to infinity.
// NaN     stays NaN, infinity stays infinity: each value is a block of its own.
#pragma once

#include "block.h"

namespace tpk {

struct Bf16Codec : BlockLayout<Bfloat16, NoScale, kCodecBlockValues, 0> {
  using Factors = NoScale;

  TPK_ALWAYS_INLINE static NoScale scale_of(uint32_t) { return {}; }
  TPK_ALWAYS_INLINE static NoScale packing(NoScale) { return {}; }
  TPK_ALWAYS_INLINE static NoScale unpacking(NoScale) { return {}; }

  TPK_ALWAYS_INLINE static Bfloat16 pack(float value, NoScale) { return to_bfloat16(value); }
  TPK_ALWAYS_INLINE static float unpack(Bfloat16 payload, NoScale) { return to_float(payload); }
};

}  // namespace tpk
