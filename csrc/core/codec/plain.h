// Codec none in the shape of a codec, for code that is written once for all of them: every value rounded to T.
//
// Wire    the tensor's own layout. No error but that rounding; NaN and infinity stay.
#pragma once

#include "block.h"

namespace tpk {

template <class T>
struct PlainCodec : BlockLayout<T, NoScale, kCodecBlockValues, 0> {
  using Factors = NoScale;

  TPK_ALWAYS_INLINE static NoScale scale_of(uint32_t) { return {}; }
  TPK_ALWAYS_INLINE static NoScale packing(NoScale) { return {}; }
  TPK_ALWAYS_INLINE static NoScale unpacking(NoScale) { return {}; }

  TPK_ALWAYS_INLINE static T pack(float value, NoScale) { return from_float<T>(value); }
  TPK_ALWAYS_INLINE static float unpack(T payload, NoScale) { return to_float(payload); }
};

}  // namespace tpk
