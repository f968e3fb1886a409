// The codecs: how values are packed on the wire. This list is the only one, for C++ and Python.
//
// A codec is a BlockLayout (block.h: types of payload and scale, values that share a scale, bytes of the header) with
//
//   scale_of(largest)               what the header holds of values whose largest magnitude has these float bits
//   packing(scale)                  Factors: what pack needs of the scale, computed once for all its values;
//   unpacking(scale)                the same for unpack
//   is_finite(scale)                (where that can be) whether its values can be packed; if not, payloads become 0
//   pack(value, factors)            one value's payload, or 32 bits that end in it; values are float
//   unpack(payload, factors)        sums are taken in float
//
// all TPK_ALWAYS_INLINE, and but for scale_of without branches: the CPU makes vector loops of them, and a CUDA warp
// works on a block in registers. Its header documents the wire layout, the error bound, and NaN. To add one: write
// codec/<name>.h and add a line here.
#pragma once

#include <cstdint>
#include <string>

#include "bf16.h"
#include "fp16.h"
#include "fp8.h"
#include "int8.h"

//        name    enumerator  implementation
#define TPK_CODECS(X)        \
  X("fp16", Fp16, Fp16Codec) \
  X("bf16", Bf16, Bf16Codec) \
  X("int8", Int8, Int8Codec) \
  X("fp8", Fp8, Fp8Codec)

namespace tpk {

enum class Codec : uint8_t {
  None,
#define TPK_CODEC_ENUMERATOR(name, id, type) id,
  TPK_CODECS(TPK_CODEC_ENUMERATOR)
#undef TPK_CODEC_ENUMERATOR
      Count
};

inline const char* name_of(Codec codec) {
  constexpr const char* names[] = {"none",
#define TPK_CODEC_NAME(name, id, type) name,
                                   TPK_CODECS(TPK_CODEC_NAME)
#undef TPK_CODEC_NAME
  };
  return codec < Codec::Count ? names[static_cast<size_t>(codec)] : "unknown codec";
}

// Codec::Count when there is no codec of that name.
inline Codec codec_of(const std::string& name) {
  for (uint8_t i = 0; i < static_cast<uint8_t>(Codec::Count); ++i) {
    if (name == name_of(static_cast<Codec>(i))) return static_cast<Codec>(i);
  }
  return Codec::Count;
}

}  // namespace tpk
