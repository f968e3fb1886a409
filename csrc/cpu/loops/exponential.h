// exp for values up to zero, as code that becomes vectors. Torch-free.
#pragma once

#include <cmath>

#include "core/codec/half.h"
#include "core/simd.h"

namespace tpk {

TPK_INLINE double exponential(double x) { return std::exp(x); }

// exp(x) for x <= 0 within 2 ulp: x = k ln 2 + r, a polynomial in r, the exponent set by adding k to it. NaN stays NaN.
TPK_INLINE float exponential(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float clamped = x < -87.0f ? -87.0f : x;
  const float shifted = clamped * 1.44269504088896341f + kRound;
  const float k = shifted - kRound;
  const float r = (clamped - k * 0.693359375f) + k * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const float result = from_bits(bits_of(p) + (bits_of(shifted) << 23));
  return x < -87.0f ? 0.0f : (x == x ? result : x);
}

}  // namespace tpk
