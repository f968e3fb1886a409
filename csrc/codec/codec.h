// The codecs: how values are packed on the wire. This list is the only one; C++ and Python ask it.
//
// A codec is a struct with
//   kBlockValues, kBlockBytes   values and bytes of a full block; a message may end in a shorter block
//   bytes(n)                    bytes of n values
//   encode_block(values, block, n), decode_block(block, values, n), add_block(block, sums, n)     n <= kBlockValues
// and says in its header what it does to the values: wire layout, error bound, NaN. Values are float on both sides;
// sums are taken in float. To add one: write codec/<name>.h and add a line here.
#pragma once

#include <cstdint>
#include <string>

#include "bf16.h"
#include "fp16.h"

//        name    enumerator  implementation
#define TPK_CODECS(X)        \
  X("fp16", Fp16, Fp16Codec) \
  X("bf16", Bf16, Bf16Codec)

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
