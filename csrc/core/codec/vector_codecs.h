// The codecs in vector code (vector.h): the bytes of block.h's plain loops, for whole blocks.
//
// Such a block has one factor for every scale, in place of a codec's two, wherever it is a normal number: both ways of
// multiplying then round once, to the same bits. fp8 packs without multiplying. VectorCodec returns false for other
// blocks (NaN, infinity, magnitudes near the ends of float), which are left to the plain loops, as are codecs without a
// VectorCodec.
#pragma once

#include <type_traits>

#include "bf16.h"
#include "fp16.h"
#include "fp8.h"
#include "int8.h"
#include "vector.h"

namespace tpk {
namespace {

// The scales of a whole block: written from its values, or read, and the factor of each.
template <class C>
struct VectorCodec;

template <class C, class = void>
constexpr bool kHasVectors = false;
template <class C>
constexpr size_t kScales = C::kBlockValues / C::kScaleValues;
template <class C>
constexpr size_t kFactors = kScales<C>;  // for packing
template <>
constexpr size_t kFactors<Fp8Codec> = 2 * kScales<Fp8Codec>;  // `by`, then `limit` of each

// What packing gives beside the wire: nothing, the values as the wire has them, or what of them it has not.
enum class Kept { Nothing, Sent, Rest };

// kept[i] = value i of the block, or values[i] - that, where it is finite. It may be values.
template <class C, Kept kind>
void pack_whole(const float* values, const float* factors, const float* inverse_factors, char* block, float* kept);

// to[i] = value i of the block.
template <class C>
void unpack_whole(const char* block, const float* factors, float* to);
// to[i] += value i of the block.
template <class C>
void add_whole(const char* block, const float* factors, float* to);
// to[i] = value i of one block + value i of the other.
template <class C>
void add_two_whole(const char* block, const float* factors, const char* other, const float* other_factors, float* to);

#if defined(TPK_VECTORS)

constexpr size_t kFour = 4 * kWidth;
constexpr uint32_t kMostFit = 0x7f000000u;  // 2^127: no smaller value is rounded to infinity

// Payloads of four vectors of values, which are scaled already; `sent` are the values that load_payloads gives for
// them. Where it is not used, compilers leave it out.
TPK_ALWAYS_INLINE void load_payloads(const Half* from, Floats* values) {
  for (size_t v = 0; v < 4; ++v) values[v] = load_halves(from + v * kWidth);
}
TPK_ALWAYS_INLINE void store_payloads(const Floats* values, Half* to, Floats* sent) {
  for (size_t v = 0; v < 4; ++v) {
    const Halves halves = halves_of(values[v]);
    store_halves(to + v * kWidth, halves);
    sent[v] = floats_of(halves);
  }
}

TPK_ALWAYS_INLINE void load_payloads(const Bfloat16* from, Floats* values) {
  for (size_t v = 0; v < 4; ++v) values[v] = load_bfloats(from + v * kWidth);
}
TPK_ALWAYS_INLINE void store_payloads(const Floats* values, Bfloat16* to, Floats* sent) {
  Ints rounded[4];  // to_bfloat16 in the upper halves
  for (size_t v = 0; v < 4; ++v) {
    const Ints bits = bits_of(values[v]);
    rounded[v] = add(add(bits, all(0x7fffu)), both(right(bits, 16), all(1u)));
  }
  if (__builtin_expect(has_nan(values[0], values[1], values[2], values[3]), 0)) {
    const Ints quiet = all(0x400000u);
    for (size_t v = 0; v < 4; ++v)
      rounded[v] = where_nan(values[v], merged(quiet, bits_of(values[v]), quiet), rounded[v]);
  }
  store_upper_words(to, rounded[0], rounded[1]);
  store_upper_words(to + 2 * kWidth, rounded[2], rounded[3]);
  for (size_t v = 0; v < 4; ++v) sent[v] = floats_of(both(rounded[v], all(0xffff0000u)));
}

TPK_ALWAYS_INLINE void load_payloads(const int8_t* from, Floats* values) {
  for (size_t v = 0; v < 4; ++v) values[v] = load_bytes(from + v * kWidth);
}
TPK_ALWAYS_INLINE void store_payloads(const Floats* values, int8_t* to, Floats* sent) {
  Ints rounded[4];
  for (size_t v = 0; v < 4; ++v) {
    rounded[v] = rounded_to_int(values[v]);
    sent[v] = from_int(rounded[v]);
  }
  store_in_order(to, signed_bytes(words_of(rounded[0], rounded[1]), words_of(rounded[2], rounded[3])));
}

TPK_ALWAYS_INLINE void load_payloads(const Fp8* from, Floats* values) { load_e4m3(from, values); }
// Values as they are, not scaled. A power of two that is 2^20 times the exponent of a value rounds it to four bits,
// which are the lowest of the sum; `by`, 2^20 and in its own lowest bits what is missing to the eighths of the
// exponent, makes the one of the other. Without it the sum is the rounded value, but for the sign of a zero. `by` and
// `limit`, the smallest exponent of a normal e4m3, are those of the groups of the values.
TPK_ALWAYS_INLINE void store_payloads(const Floats* values, const float* by, const float* limit, Fp8* to,
                                      Floats* sent) {
  Ints eighths[4];
  for (size_t v = 0; v < 4; ++v) {
    const size_t group = v * kWidth / Fp8Codec::kScaleValues;
    const Floats own_by = all(by[group]), exponent = signed_exponent(values[v], all(limit[group]));
    const Floats sum = multiply_add(exponent, own_by, values[v]);
    eighths[v] = multiply_words(bits_of(sum), 1u << 16 | 16u);  // upper half, and 16 times the lower
    const Floats rounded = subtract(sum, multiply(exponent, own_by));
    sent[v] = floats_of(merged(bits_of(values[v]), bits_of(rounded), all(0x80000000u)));
  }
  const auto bytes = [](Ints a, Ints b) TPK_LAMBDA {
    const Ints words = words_of(a, b);  // sign, 4 bits that are no part of it, 7 bits of e4m3, zeros
    return merged(right_words(words, 8), right_words(words, 4), all(0xff80ff80u));
  };
  store_in_order(to, unsigned_bytes(bytes(eighths[0], eighths[1]), bytes(eighths[2], eighths[3])));
}

template <>
struct VectorCodec<Bf16Codec> {
  TPK_ALWAYS_INLINE static bool write_scales(const float*, char*, float*) { return true; }
  TPK_ALWAYS_INLINE static bool read_scales(const char*, float*) { return true; }
};

template <>
struct VectorCodec<Fp16Codec> {
  TPK_ALWAYS_INLINE static bool write_scales(const float* values, char* block, float* factor) {
    Ints largest[4] = {};
    TPK_ROLLED
    for (size_t i = 0; i < kCodecBlockValues; i += kFour) {
      for (size_t v = 0; v < 4; ++v) {
        largest[v] = larger(largest[v], both(bits_of(load(values + i + v * kWidth)), all(0x7fffffffu)));
      }
    }
    const uint32_t found = largest_lane(larger(larger(largest[0], largest[1]), larger(largest[2], largest[3])));
    const int16_t shift = static_cast<int16_t>(found == 0 ? 0 : 14 + 127 - static_cast<int>(found >> 23));
    std::memset(block, 0, Fp16Codec::kHeaderBytes);
    std::memcpy(block, &shift, sizeof shift);
    *factor = power_of_two(shift);
    return found == 0 || found - (14u << 23) < kMostFit - (14u << 23);
  }
  TPK_ALWAYS_INLINE static bool read_scales(const char* block, float* factor) {
    int16_t shift;
    std::memcpy(&shift, block, sizeof shift);
    *factor = power_of_two(-shift);
    return -127 <= shift && shift <= 126;
  }
};

template <>
struct VectorCodec<Int8Codec> {
  static constexpr uint32_t kNormal = 64u << 7;  // between a scale's exponent and a float's
  static constexpr size_t kGroups = kCodecBlockValues / Int8Codec::kScaleValues;

  TPK_ALWAYS_INLINE static bool write_scales(const float* values, char* block, float* factors) {
    bool is_fit = true;
    for (size_t g = 0; g < kGroups; g += kWidth) {
      const Ints largest = largest_of_groups(values + g * Int8Codec::kScaleValues);
      const Ints scale = bits_of(multiply(floats_of(largest), all(1.0f / 127.0f)));
      const Ints upper = right(add(scale, all(0xffffu)), 16);
      store_scales(where_nonzero(largest, add(upper, all(kNormal))), reinterpret_cast<uint16_t*>(block) + g);
      store(factors + g, floats_of(where_nonzero(largest, bits_of(divide(all(1.0f), floats_of(left(upper, 16)))))));
      is_fit = is_fit && all_zero_or_within(largest, 0x10000000u, kMostFit - 1);
    }
    return is_fit;
  }
  TPK_ALWAYS_INLINE static bool read_scales(const char* block, float* factors) {
    bool is_fit = true;
    for (size_t g = 0; g < kGroups; g += kWidth) {
      const Ints scale = load_scales(reinterpret_cast<const uint16_t*>(block) + g);
      store(factors + g, floats_of(where_nonzero(scale, left(add(scale, all(0u - kNormal)), 16))));
      is_fit = is_fit && all_zero_or_within(scale, kNormal + 128, kNormal + 0x7f7fu);
    }
    return is_fit;
  }
};

template <>
struct VectorCodec<Fp8Codec> {
  static constexpr uint32_t kLeast = 15;  // exponent whose e4m3 are normal floats
  static constexpr size_t kGroups = kCodecBlockValues / Fp8Codec::kScaleValues;

  TPK_ALWAYS_INLINE static bool write_scales(const float* values, char* block, float* factors) {
    bool is_fit = true;
    for (size_t g = 0; g < kGroups; g += kWidth) {
      const Ints largest = largest_of_groups(values + g * Fp8Codec::kScaleValues);
      const Ints exponent = larger(right(add(largest, all(0x1fffffu)), 23), all(1u));
      store_scales(add(exponent, all(~0u)), reinterpret_cast<uint8_t*>(block) + g);
      const Ints least = subtract(larger(exponent, all(kLeast)), all(14u));  // of a normal e4m3: 2^-6
      const Ints missing = both(subtract(all(0u - 8 * 20), left(least, 3)), all(127u));
      store(factors + g, floats_of(add(missing, all(147u << 23))));
      store(factors + kGroups + g, floats_of(left(least, 23)));
      is_fit = is_fit && all_zero_or_within(largest, kLeast << 23, kMostFit - (21u << 23));
    }
    return is_fit;
  }
  TPK_ALWAYS_INLINE static bool read_scales(const char* block, float* factors) {
    bool is_fit = true;
    for (size_t g = 0; g < kGroups; g += kWidth) {
      const Ints scale = load_scales(reinterpret_cast<const uint8_t*>(block) + g);
      store(factors + g, floats_of(left(add(scale, all(1u)), 23)));
      is_fit = is_fit && all_zero_or_within(scale, 1, 253);
    }
    return is_fit;
  }
};

template <class C>
constexpr bool kHasVectors<C, std::void_t<decltype(VectorCodec<C>::read_scales)>> = true;

// ---- whole blocks ---------------------------------------------------------------------------------------------------

// The factor of vector v of the four that begin at value i.
template <class C>
TPK_ALWAYS_INLINE Floats scaled(Floats values, const float* factors, size_t i, size_t v) {
  if constexpr (!C::kScaled) return values;
  return multiply(values, all(factors[kScales<C> == 1 ? 0 : i / C::kScaleValues + v * kWidth / C::kScaleValues]));
}

template <class C, Kept kind>
TPK_ALWAYS_INLINE void pack_whole(const float* values, const float* factors, const float* inverse_factors, char* block,
                                  float* kept) {
  auto* const payloads = reinterpret_cast<typename C::Payload*>(block + C::kHeaderBytes);
  TPK_ROLLED
  for (size_t i = 0; i < C::kBlockValues; i += kFour) {
    Floats four[4], sent[4];
    if constexpr (kFactors<C> == kScales<C>) {
      for (size_t v = 0; v < 4; ++v) {
        // Of a block that is read later; with more scales there are no loads to spare for it.
        if constexpr (C::kScaled && kScales<C> == 1) prefetch(values + i + v * kWidth + 4 * C::kBlockValues);
        four[v] = scaled<C>(load(values + i + v * kWidth), factors, i, v);
      }
      store_payloads(four, payloads + i, sent);
    } else {
      for (size_t v = 0; v < 4; ++v) four[v] = load_once(values + i + v * kWidth);
      const float* const own = factors + i / C::kScaleValues;
      store_payloads(four, own, own + kScales<C>, payloads + i, sent);
    }
    if constexpr (kind == Kept::Nothing) continue;
    for (size_t v = 0; v < 4; ++v) {
      Floats result = kFactors<C> == kScales<C> ? scaled<C>(sent[v], inverse_factors, i, v) : sent[v];
      if constexpr (kind == Kept::Rest) {
        result = subtract(load(values + i + v * kWidth), result);
        if constexpr (!C::kScaled) result = where_finite(result, load(kept + i + v * kWidth));
      }
      store(kept + i + v * kWidth, result);
    }
  }
}

// take(i, vector) for every vector of a block, which begins with value i.
template <class C, class Take>
TPK_ALWAYS_INLINE void for_each_vector(const char* block, const float* factors, const Take& take) {
  const auto* const payloads = reinterpret_cast<const typename C::Payload*>(block + C::kHeaderBytes);
  TPK_ROLLED
  for (size_t i = 0; i < C::kBlockValues; i += kFour) {
    Floats four[4];
    load_payloads(payloads + i, four);
    for (size_t v = 0; v < 4; ++v) take(i + v * kWidth, scaled<C>(four[v], factors, i, v));
  }
}

template <class C>
TPK_ALWAYS_INLINE void unpack_whole(const char* block, const float* factors, float* to) {
  for_each_vector<C>(block, factors, [=](size_t i, Floats value) TPK_LAMBDA { store(to + i, value); });
}

template <class C>
TPK_ALWAYS_INLINE void add_whole(const char* block, const float* factors, float* to) {
  for_each_vector<C>(block, factors,
                     [=](size_t i, Floats value) TPK_LAMBDA { store(to + i, add(load(to + i), value)); });
}

template <class C>
TPK_ALWAYS_INLINE void add_two_whole(const char* block, const float* factors, const char* other,
                                     const float* other_factors, float* to) {
  const auto* const left = reinterpret_cast<const typename C::Payload*>(block + C::kHeaderBytes);
  const auto* const right = reinterpret_cast<const typename C::Payload*>(other + C::kHeaderBytes);
  TPK_ROLLED
  for (size_t i = 0; i < C::kBlockValues; i += kFour) {
    Floats a[4], b[4];
    load_payloads(left + i, a), load_payloads(right + i, b);
    for (size_t v = 0; v < 4; ++v)
      store(to + i + v * kWidth, add(scaled<C>(a[v], factors, i, v), scaled<C>(b[v], other_factors, i, v)));
  }
}

#endif

}  // namespace
}  // namespace tpk
