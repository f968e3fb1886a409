#include "feedback.h"

#include <cmath>
#include <limits>

#include "check.h"
#include "core/codec/plain.h"
#include "simd.h"

namespace tpk {
namespace {

template <class C, class T>
TPK_INLINE void feedback_loop(const T* values, float* residual, char* wire, float scale, size_t n) {
  float block[C::kBlockValues], decoded[C::kBlockValues];
  for (size_t start = 0; start < n; start += C::kBlockValues, wire += C::kBlockBytes) {
    const size_t count = n - start < C::kBlockValues ? n - start : C::kBlockValues;
    const T* from = values + start;
    float* left = residual + start;
    for (size_t i = 0; i < count; ++i) block[i] = scale * to_float(from[i]) + left[i];
    encode_block<C>(block, wire, count);
    decode_block<C>(wire, decoded, count);
    for (size_t i = 0; i < count; ++i) {
      const float lost = block[i] - decoded[i];
      left[i] = std::fabs(lost) <= std::numeric_limits<float>::max() ? lost : left[i];
    }
  }
}

template <class C, class T>
void encode_with_feedback(const void* values, float* residual, void* wire, float scale, size_t n);

// Explicit specialisations, because the compiler makes instruction-set clones of functions and not of templates.
#define TPK_FEEDBACK(C, T)                                                                                           \
  template <>                                                                                                        \
  TPK_SIMD void encode_with_feedback<C, T>(const void* values, float* residual, void* wire, float scale, size_t n) { \
    feedback_loop<C, T>(static_cast<const T*>(values), residual, static_cast<char*>(wire), scale, n);                \
  }
#define TPK_FEEDBACK_CODEC(name, id, C) \
  TPK_FEEDBACK(C, float)                \
  TPK_FEEDBACK(C, Half)                 \
  TPK_FEEDBACK(C, Bfloat16)

TPK_CODECS(TPK_FEEDBACK_CODEC)
TPK_FEEDBACK(PlainCodec<float>, float)
TPK_FEEDBACK(PlainCodec<Half>, Half)
TPK_FEEDBACK(PlainCodec<Bfloat16>, Bfloat16)

template <class T>
EncodeWithFeedback of_dtype(Codec codec) {
  switch (codec) {
    case Codec::None: return encode_with_feedback<PlainCodec<T>, T>;
#define TPK_FEEDBACK_CASE(name, id, C) \
  case Codec::id: return encode_with_feedback<C, T>;
      TPK_CODECS(TPK_FEEDBACK_CASE)
#undef TPK_FEEDBACK_CASE
    default: throw std::invalid_argument("unknown codec");
  }
}

}  // namespace

EncodeWithFeedback feedback_of(DType dtype, Codec codec) {
  switch (dtype) {
    case DType::F32: return of_dtype<float>(codec);
    case DType::BF16: return of_dtype<Bfloat16>(codec);
    case DType::F16: return of_dtype<Half>(codec);
    default:
      throw std::invalid_argument(concat("error feedback is for float32, bfloat16 or float16, got ", name_of(dtype)));
  }
}

}  // namespace tpk
