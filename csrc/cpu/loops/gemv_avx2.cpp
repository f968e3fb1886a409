// Compiled for AVX2, FMA and F16C (CMakeLists.txt), so it includes nothing that another file could share.
#include "gemv_intrinsics.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include <immintrin.h>

#include "gemv_loops.h"

namespace tpk {
namespace {

TPK_INLINE __m256 eight(const float* from) { return _mm256_loadu_ps(from); }
TPK_INLINE __m128i eight_halves(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }
TPK_INLINE __m256 eight(const Half* from) { return _mm256_cvtph_ps(eight_halves(from)); }
TPK_INLINE __m256 eight(const Bfloat16* from) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(eight_halves(from)), 16));
}

// In a register from here on. The compiler would move loads up to where the sums no longer fit into the registers, and
// load x again for each row of weights.
TPK_INLINE __m256 in_register(__m256 values) {
  asm volatile("" : "+x"(values));
  return values;
}

// Sixteen lanes as two parts.
template <class T>
struct Avx2 {
  using Value = T;
  using Packed = float;
  using Sums = __m256;
  using Weights = __m256;
  static constexpr const char* kName = "avx2";
  static constexpr size_t kStep = 16;
  static constexpr int kParts = 2, kMostWeights = 2, kMostSums = 6;  // of sixteen registers
  static constexpr int rows_with(size_t) { return kMostWeights; }

  TPK_INLINE static void pack(const T* x, float* to) {
    _mm256_store_ps(to, eight(x));
    _mm256_store_ps(to + 8, eight(x + 8));
  }
  TPK_INLINE static __m256 zeros() { return _mm256_setzero_ps(); }
  TPK_INLINE static __m256 load(const T* w, int part) { return in_register(eight(w + 8 * part)); }
  TPK_INLINE static __m256 inputs(const float* x, int part) { return in_register(_mm256_load_ps(x + 8 * part)); }
  // The intrinsic leaves open which operand is overwritten; another one than the sum costs a register.
  TPK_INLINE static void add(__m256& sums, __m256 w, __m256 x) {
    asm("vfmadd231ps %2, %1, %0" : "+x"(sums) : "x"(w), "x"(x));
  }
  TPK_INLINE static float total(const __m256* parts) { return total(parts[0], parts[1]); }
  TPK_INLINE static float total(__m256 low, __m256 high) {
    const __m256 eight = _mm256_add_ps(low, high);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
};

alignas(32) constexpr uint32_t kUpperHalves[8] = {0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000,
                                                  0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000};

// One part has the first values of each pair, which are shifted to where a float has them; the other the second ones,
// which are there.
struct Avx2Bf16 : Avx2<Bfloat16> {
  TPK_INLINE static void pack(const Bfloat16* x, float* to) {
    _mm256_store_ps(to, load(x, 0));
    _mm256_store_ps(to + 8, load(x, 1));
  }
  TPK_INLINE static __m256 load(const Bfloat16* w, int part) {
    __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
    if (part == 0) return in_register(_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)));
    asm volatile("vpand %1, %0, %0" : "+x"(pairs) : "m"(kUpperHalves));  // a mask in a register would be one too many
    return _mm256_castsi256_ps(pairs);
  }
  TPK_INLINE static float total(const __m256* parts) {
    const __m256 outer = _mm256_unpacklo_ps(parts[0], parts[1]), inner = _mm256_unpackhi_ps(parts[0], parts[1]);
    return Avx2::total(_mm256_permute2f128_ps(outer, inner, 0x20), _mm256_permute2f128_ps(outer, inner, 0x31));
  }
};

}  // namespace

GemvPath gemv_avx2(DType dtype) {
  if (dtype == DType::F32) return gemv_path<Avx2<float>>();
  return dtype == DType::F16 ? gemv_path<Avx2<Half>>() : gemv_path<Avx2Bf16>();
}

}  // namespace tpk

#endif
