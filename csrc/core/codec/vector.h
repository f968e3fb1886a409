// Vectors of floats and the only home of intrinsics: AVX-512, or AVX2 with F16C, whichever the file that includes this
// is compiled for (core/moves.cpp). Elsewhere there is none of it, and the plain loops of block.h remain, which
// compilers vectorise, too (NEON). MXCSR has to be at its default (core/choose_moves.cpp).
#pragma once

#include "block.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define TPK_AVX512
#define TPK_VECTORS
#elif defined(__AVX2__) && defined(__F16C__) && defined(__FMA__)
#define TPK_AVX2
#define TPK_VECTORS
#endif

#if defined(TPK_VECTORS)
#if defined(__clang__)
#include <immintrin.h>
#else
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // g++ 12: of the intrinsics' own undefined registers
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif
#endif

// A lambda that is inlined wherever it is called, as TPK_ALWAYS_INLINE functions are.
#define TPK_LAMBDA __attribute__((always_inline))

namespace tpk {
namespace {

#if defined(TPK_VECTORS)
TPK_ALWAYS_INLINE void prefetch(const float* from) { _mm_prefetch(reinterpret_cast<const char*>(from), _MM_HINT_T0); }
#endif

#if defined(TPK_AVX512)
using Floats = __m512;
using Ints = __m512i;
TPK_ALWAYS_INLINE Floats load(const float* from) { return _mm512_loadu_ps(from); }
TPK_ALWAYS_INLINE void store(float* to, Floats values) { _mm512_storeu_ps(to, values); }
TPK_ALWAYS_INLINE Floats all(float value) { return _mm512_set1_ps(value); }
TPK_ALWAYS_INLINE Ints all(uint32_t value) { return _mm512_set1_epi32(static_cast<int>(value)); }
#elif defined(TPK_AVX2)
using Floats = __m256;
using Ints = __m256i;
TPK_ALWAYS_INLINE Floats load(const float* from) { return _mm256_loadu_ps(from); }
TPK_ALWAYS_INLINE void store(float* to, Floats values) { _mm256_storeu_ps(to, values); }
TPK_ALWAYS_INLINE Floats all(float value) { return _mm256_set1_ps(value); }
TPK_ALWAYS_INLINE Ints all(uint32_t value) { return _mm256_set1_epi32(static_cast<int>(value)); }
#endif

#if defined(TPK_VECTORS)
// One load for several uses, which compilers make an operand of each.
TPK_ALWAYS_INLINE Floats load_once(const float* from) {
  Floats values = load(from);
  asm("" : "+v"(values));
  return values;
}

// What compilers have operators for, of any width.
using Words = uint32_t __attribute__((vector_size(sizeof(Ints))));

TPK_ALWAYS_INLINE Floats add(Floats a, Floats b) { return a + b; }
TPK_ALWAYS_INLINE Floats subtract(Floats a, Floats b) { return a - b; }
TPK_ALWAYS_INLINE Floats multiply(Floats a, Floats b) { return a * b; }
TPK_ALWAYS_INLINE Floats divide(Floats a, Floats b) { return a / b; }
TPK_ALWAYS_INLINE Ints bits_of(Floats values) { return Ints(values); }
TPK_ALWAYS_INLINE Floats floats_of(Ints bits) { return Floats(bits); }
TPK_ALWAYS_INLINE Ints add(Ints a, Ints b) { return Ints(Words(a) + Words(b)); }
TPK_ALWAYS_INLINE Ints subtract(Ints a, Ints b) { return Ints(Words(a) - Words(b)); }
TPK_ALWAYS_INLINE Ints left(Ints a, unsigned by) { return Ints(Words(a) << by); }
TPK_ALWAYS_INLINE Ints right(Ints a, unsigned by) { return Ints(Words(a) >> by); }
TPK_ALWAYS_INLINE Ints both(Ints a, Ints b) { return a & b; }
#endif

#if defined(TPK_AVX512)

TPK_ALWAYS_INLINE Ints where_nonzero(Ints key, Ints values) {
  return _mm512_maskz_mov_epi32(_mm512_test_epi32_mask(key, key), values);
}
// Whether every value is 0 or in [low, high].
TPK_ALWAYS_INLINE bool all_zero_or_within(Ints values, uint32_t low, uint32_t high) {
  const auto is_within = _mm512_cmple_epu32_mask(_mm512_sub_epi32(values, all(low)), all(high - low));
  return _mm512_mask_test_epi32_mask(static_cast<__mmask16>(~is_within), values, values) == 0;
}
// values where they are finite, else the others.
TPK_ALWAYS_INLINE Floats where_finite(Floats values, Floats others) {
  return _mm512_mask_mov_ps(values, _mm512_fpclass_ps_mask(values, 0x99), others);
}
TPK_ALWAYS_INLINE Ints larger(Ints a, Ints b) { return _mm512_max_epu32(a, b); }

TPK_ALWAYS_INLINE Floats load_halves(const void* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(from)));
}
using Halves = __m256i;
TPK_ALWAYS_INLINE Halves halves_of(Floats values) {
  return _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
TPK_ALWAYS_INLINE Floats floats_of(Halves halves) { return _mm512_cvtph_ps(halves); }
TPK_ALWAYS_INLINE void store_halves(void* to, Halves halves) { _mm256_storeu_si256(static_cast<__m256i*>(to), halves); }

TPK_ALWAYS_INLINE Floats load_bfloats(const void* from) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(from))), 16));
}
TPK_ALWAYS_INLINE bool has_nan(Floats a, Floats b, Floats c, Floats d) {
  return (_mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q) | _mm512_cmp_ps_mask(c, d, _CMP_UNORD_Q)) != 0;
}
TPK_ALWAYS_INLINE Ints where_nan(Floats values, Ints if_nan, Ints otherwise) {
  return _mm512_mask_mov_epi32(otherwise, _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q), if_nan);
}
// The upper halves of both.
TPK_ALWAYS_INLINE void store_upper_words(void* to, Ints a, Ints b) {
  alignas(64) static constexpr uint16_t kUpper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                      33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, _mm512_load_si512(kUpper), b));
}

TPK_ALWAYS_INLINE Ints load_scales(const uint16_t* from) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
TPK_ALWAYS_INLINE Ints load_scales(const uint8_t* from) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
TPK_ALWAYS_INLINE void store_scales(Ints scales, uint16_t* to) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(scales));
}
TPK_ALWAYS_INLINE void store_scales(Ints scales, uint8_t* to) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(scales));
}

TPK_ALWAYS_INLINE Floats load_bytes(const int8_t* from) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
TPK_ALWAYS_INLINE Ints rounded_to_int(Floats values) { return _mm512_cvtps_epi32(values); }
TPK_ALWAYS_INLINE Floats from_int(Ints values) { return _mm512_cvtepi32_ps(values); }
TPK_ALWAYS_INLINE Ints words_of(Ints a, Ints b) { return _mm512_packs_epi32(a, b); }
// Words as words_of leaves them, four vectors of values in two, become bytes in the order of the values.
TPK_ALWAYS_INLINE void store_in_order(void* to, Ints bytes) {
  const Ints order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi32(order, bytes));
}
TPK_ALWAYS_INLINE Ints signed_bytes(Ints a, Ints b) { return _mm512_packs_epi16(a, b); }
TPK_ALWAYS_INLINE Ints unsigned_bytes(Ints a, Ints b) { return _mm512_packus_epi16(a, b); }

// The larger of |values|, cut to the exponent, and limit, powers of two; with the sign of the value.
TPK_ALWAYS_INLINE Floats signed_exponent(Floats values, Floats limit) {
  const Floats own = _mm512_castsi512_ps(both(bits_of(values), all(0xff800000u)));
  return _mm512_range_ps(own, limit, 3);
}
TPK_ALWAYS_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
TPK_ALWAYS_INLINE Ints multiply_words(Ints a, uint32_t by) { return _mm512_madd_epi16(a, all(by)); }
TPK_ALWAYS_INLINE Ints right_words(Ints a, int by) { return _mm512_srli_epi16(a, static_cast<unsigned>(by)); }
// The bits of a under mask, those of b elsewhere.
TPK_ALWAYS_INLINE Ints merged(Ints a, Ints b, Ints mask) { return _mm512_ternarylogic_epi32(mask, a, b, 0xca); }

// 2^-8 of each e4m3 of four vectors: a half whose exponent is one bit wider.
TPK_ALWAYS_INLINE void load_e4m3(const void* from, Floats* four) {
  const Ints in_lanes = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), _mm512_loadu_si512(from));
  const Ints zero = _mm512_setzero_si512();
  const auto halves = [](Ints upper_bytes)
                          TPK_LAMBDA { return both(_mm512_srai_epi16(upper_bytes, 1), all(0xbfffbfffu)); };
  const Ints first = halves(_mm512_unpacklo_epi8(zero, in_lanes)), last = halves(_mm512_unpackhi_epi8(zero, in_lanes));
  four[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(first));
  four[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(first, 1));
  four[2] = _mm512_cvtph_ps(_mm512_castsi512_si256(last));
  four[3] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(last, 1));
}

// The largest magnitude of each of kWidth groups of 32 values. Pairs of vectors are folded into one; the groups are
// taken in the order that leaves the results sorted.
TPK_ALWAYS_INLINE Ints largest_of_groups(const float* values) {
  const auto group = [=](int g) {
    const float* from = values + g * 32;
    return larger(both(bits_of(load(from)), all(0x7fffffffu)), both(bits_of(load(from + 16)), all(0x7fffffffu)));
  };
  const auto two = [=](int g) {
    const Ints a = group(g), b = group(g + 1);
    return larger(_mm512_shuffle_i64x2(a, b, 0x44), _mm512_shuffle_i64x2(a, b, 0xee));
  };
  const auto four = [=](int g) {
    const Ints a = two(g), b = two(g + 2);
    return larger(_mm512_shuffle_i64x2(a, b, 0x88), _mm512_shuffle_i64x2(a, b, 0xdd));
  };
  const auto eight = [=](int g) {
    const Ints a = four(g), b = four(g + 4);
    return _mm512_castsi512_ps(larger(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b)));
  };
  const Floats a = eight(0), b = eight(8);
  const Ints found = larger(bits_of(_mm512_shuffle_ps(a, b, 0x88)), bits_of(_mm512_shuffle_ps(a, b, 0xdd)));
  return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), found);
}
TPK_ALWAYS_INLINE uint32_t largest_lane(Ints values) { return _mm512_reduce_max_epu32(values); }

#elif defined(TPK_AVX2)

TPK_ALWAYS_INLINE Ints where_nonzero(Ints key, Ints values) {
  return _mm256_andnot_si256(_mm256_cmpeq_epi32(key, _mm256_setzero_si256()), values);
}
TPK_ALWAYS_INLINE bool all_zero_or_within(Ints values, uint32_t low, uint32_t high) {
  const Ints from_low = _mm256_sub_epi32(values, all(low));
  const Ints is_within = _mm256_cmpeq_epi32(_mm256_min_epu32(from_low, all(high - low)), from_low);
  const Ints is_zero = _mm256_cmpeq_epi32(values, _mm256_setzero_si256());
  return _mm256_movemask_epi8(_mm256_or_si256(is_within, is_zero)) == -1;
}
TPK_ALWAYS_INLINE Floats where_finite(Floats values, Floats others) {
  const Floats magnitude = _mm256_andnot_ps(all(-0.0f), values);
  return _mm256_blendv_ps(others, values, _mm256_cmp_ps(magnitude, all(3.402823466e38f), _CMP_LE_OQ));
}
TPK_ALWAYS_INLINE Ints larger(Ints a, Ints b) { return _mm256_max_epu32(a, b); }

TPK_ALWAYS_INLINE Floats load_halves(const void* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(from)));
}
using Halves = __m128i;
TPK_ALWAYS_INLINE Halves halves_of(Floats values) { return _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT); }
TPK_ALWAYS_INLINE Floats floats_of(Halves halves) { return _mm256_cvtph_ps(halves); }
TPK_ALWAYS_INLINE void store_halves(void* to, Halves halves) { _mm_storeu_si128(static_cast<__m128i*>(to), halves); }

TPK_ALWAYS_INLINE Floats load_bfloats(const void* from) {
  const Ints words = _mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
}
TPK_ALWAYS_INLINE bool has_nan(Floats a, Floats b, Floats c, Floats d) {
  return _mm256_movemask_ps(_mm256_or_ps(_mm256_cmp_ps(a, b, _CMP_UNORD_Q), _mm256_cmp_ps(c, d, _CMP_UNORD_Q))) != 0;
}
TPK_ALWAYS_INLINE Ints where_nan(Floats values, Ints if_nan, Ints otherwise) {
  return _mm256_blendv_epi8(otherwise, if_nan, bits_of(_mm256_cmp_ps(values, values, _CMP_UNORD_Q)));
}
TPK_ALWAYS_INLINE void store_upper_words(void* to, Ints a, Ints b) {
  const Ints words = _mm256_packus_epi32(_mm256_srli_epi32(a, 16), _mm256_srli_epi32(b, 16));
  _mm256_storeu_si256(static_cast<__m256i*>(to), _mm256_permute4x64_epi64(words, 0xd8));
}

TPK_ALWAYS_INLINE Ints load_scales(const uint16_t* from) {
  return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
TPK_ALWAYS_INLINE Ints load_scales(const uint8_t* from) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
}
TPK_ALWAYS_INLINE __m128i words_of(Ints scales) {
  return _mm_packus_epi32(_mm256_castsi256_si128(scales), _mm256_extracti128_si256(scales, 1));
}
TPK_ALWAYS_INLINE void store_scales(Ints scales, uint16_t* to) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), words_of(scales));
}
TPK_ALWAYS_INLINE void store_scales(Ints scales, uint8_t* to) {
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(words_of(scales), words_of(scales)));
}

TPK_ALWAYS_INLINE Floats load_bytes(const int8_t* from) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}
TPK_ALWAYS_INLINE Ints rounded_to_int(Floats values) { return _mm256_cvtps_epi32(values); }
TPK_ALWAYS_INLINE Floats from_int(Ints values) { return _mm256_cvtepi32_ps(values); }
TPK_ALWAYS_INLINE Ints words_of(Ints a, Ints b) { return _mm256_packs_epi32(a, b); }
TPK_ALWAYS_INLINE void store_in_order(void* to, Ints bytes) {
  const Ints order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256(static_cast<__m256i*>(to), _mm256_permutevar8x32_epi32(bytes, order));
}
TPK_ALWAYS_INLINE Ints signed_bytes(Ints a, Ints b) { return _mm256_packs_epi16(a, b); }
TPK_ALWAYS_INLINE Ints unsigned_bytes(Ints a, Ints b) { return _mm256_packus_epi16(a, b); }

TPK_ALWAYS_INLINE Floats signed_exponent(Floats values, Floats limit) {
  const Ints own = both(bits_of(values), all(0x7f800000u)), sign = both(bits_of(values), all(0x80000000u));
  return _mm256_castsi256_ps(_mm256_or_si256(larger(own, bits_of(limit)), sign));
}
TPK_ALWAYS_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
TPK_ALWAYS_INLINE Ints multiply_words(Ints a, uint32_t by) { return _mm256_madd_epi16(a, all(by)); }
TPK_ALWAYS_INLINE Ints right_words(Ints a, int by) { return _mm256_srli_epi16(a, by); }
TPK_ALWAYS_INLINE Ints merged(Ints a, Ints b, Ints mask) {
  return _mm256_or_si256(both(a, mask), _mm256_andnot_si256(mask, b));
}

TPK_ALWAYS_INLINE void load_e4m3(const void* from, Floats* four) {
  const Ints in_lanes = _mm256_permute4x64_epi64(_mm256_loadu_si256(static_cast<const __m256i*>(from)), 0xd8);
  const Ints zero = _mm256_setzero_si256();
  const auto halves = [](Ints upper_bytes)
                          TPK_LAMBDA { return both(_mm256_srai_epi16(upper_bytes, 1), all(0xbfffbfffu)); };
  const Ints first = halves(_mm256_unpacklo_epi8(zero, in_lanes)), last = halves(_mm256_unpackhi_epi8(zero, in_lanes));
  four[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(first));
  four[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(first, 1));
  four[2] = _mm256_cvtph_ps(_mm256_castsi256_si128(last));
  four[3] = _mm256_cvtph_ps(_mm256_extracti128_si256(last, 1));
}

TPK_ALWAYS_INLINE Ints largest_of_groups(const float* values) {
  const auto group = [=](int g) {
    const float* from = values + g * 32;
    const auto magnitude = [=](int i) { return both(bits_of(load(from + i)), all(0x7fffffffu)); };
    return larger(larger(magnitude(0), magnitude(8)), larger(magnitude(16), magnitude(24)));
  };
  const auto two = [=](int g) {
    const Ints a = group(g), b = group(g + 1);
    return larger(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
  };
  const auto four = [=](int g) {
    const Ints a = two(g), b = two(g + 2);
    return _mm256_castsi256_ps(larger(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b)));
  };
  const Floats a = four(0), b = four(4);
  const Ints found = larger(bits_of(_mm256_shuffle_ps(a, b, 0x88)), bits_of(_mm256_shuffle_ps(a, b, 0xdd)));
  return _mm256_permutevar8x32_epi32(found, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
TPK_ALWAYS_INLINE uint32_t largest_lane(Ints values) {
  __m128i four = _mm_max_epu32(_mm256_castsi256_si128(values), _mm256_extracti128_si256(values, 1));
  four = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0x4e));
  four = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0xb1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(four));
}

#endif

#if defined(TPK_VECTORS)
constexpr size_t kWidth = sizeof(Floats) / sizeof(float);
#endif

}  // namespace
}  // namespace tpk
