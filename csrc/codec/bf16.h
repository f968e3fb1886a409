// bf16: every value rounded to 8 significant bits, the range of fp32.
//
// Wire    2 bytes a value, no header; processed 512 values at a time, any count is allowed.
// Error   |x - decoded| <= 2^-8 |x| for normal x that does not round to infinity.
// NaN     stays NaN, infinity stays infinity: each value is a block of its own.
#pragma once

#include <cstddef>

#include "half.h"

namespace tpk {

struct Bf16Codec {
  static constexpr size_t kBlockValues = 512;
  static constexpr size_t kBlockBytes = kBlockValues * sizeof(Bfloat16);

  static constexpr size_t bytes(size_t n) { return n * sizeof(Bfloat16); }

  static inline __attribute__((always_inline)) void encode_block(const float* values, char* block, size_t n) {
    Bfloat16* payload = reinterpret_cast<Bfloat16*>(block);
    for (size_t i = 0; i < n; ++i) payload[i] = to_bfloat16(values[i]);
  }

  static inline __attribute__((always_inline)) void decode_block(const char* block, float* values, size_t n) {
    const Bfloat16* payload = reinterpret_cast<const Bfloat16*>(block);
    for (size_t i = 0; i < n; ++i) values[i] = to_float(payload[i]);
  }

  static inline __attribute__((always_inline)) void add_block(const char* block, float* sums, size_t n) {
    const Bfloat16* payload = reinterpret_cast<const Bfloat16*>(block);
    for (size_t i = 0; i < n; ++i) sums[i] += to_float(payload[i]);
  }
};

}  // namespace tpk
