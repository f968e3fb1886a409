// Compiled for AVX-512 F, BW, VL and BF16 (CMakeLists.txt), so it includes nothing that another file could share.
#include "gemv_intrinsics.h"

#if defined(__AVX512F__) && defined(__AVX512BF16__)

#include <immintrin.h>

#include "gemv_loops.h"

namespace tpk {
namespace {

TPK_INLINE __m256i sixteen_halves(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
TPK_INLINE __m512 sixteen(const float* from) { return _mm512_loadu_ps(from); }
TPK_INLINE __m512 sixteen(const Half* from) { return _mm512_cvtph_ps(sixteen_halves(from)); }
TPK_INLINE __m512 sixteen(const Bfloat16* from) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(sixteen_halves(from)), 16));
}

struct Avx512Sums {
  using Sums = __m512;
  static constexpr int kParts = 1, kMostWeights = 4, kMostSums = 16;
  // Rows of weights that share the loads of x; up to kMostSums / rows of x share theirs.
  static constexpr int rows_with(size_t rows) { return 4 <= rows && rows <= 6 ? 2 : 4; }

  TPK_INLINE static __m512 zeros() { return _mm512_setzero_ps(); }
  TPK_INLINE static float total(const __m512* sums) {
    const __m256 upper = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(*sums), 1));
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(*sums), upper);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
};

template <class T>
struct Avx512 : Avx512Sums {
  using Value = T;
  using Packed = float;
  using Weights = __m512;
  static constexpr const char* kName = "avx512";
  static constexpr size_t kStep = 16;
  static constexpr int rows_with(size_t rows) { return std::is_same_v<T, Half> ? 4 : Avx512Sums::rows_with(rows); }

  TPK_INLINE static void pack(const T* x, float* to) { _mm512_store_ps(to, sixteen(x)); }
  TPK_INLINE static __m512 load(const T* w, int) { return sixteen(w); }
  TPK_INLINE static __m512 inputs(const float* x, int) { return _mm512_load_ps(x); }
  TPK_INLINE static void add(__m512& sums, __m512 w, __m512 x) { sums = _mm512_fmadd_ps(w, x, sums); }
};

// Two products for each lane and instruction, each rounded once more by its sum; subnormal values count as zero.
struct Avx512Bf16 : Avx512Sums {
  using Value = Bfloat16;
  using Packed = Bfloat16;
  using Weights = __m512bh;
  static constexpr const char* kName = "avx512_bf16";
  static constexpr size_t kStep = 32;

  TPK_INLINE static void pack(const Bfloat16* x, Bfloat16* to) { std::memcpy(to, x, kStep * sizeof *x); }
  TPK_INLINE static __m512bh load(const Bfloat16* w, int) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(w)); }
  TPK_INLINE static __m512bh inputs(const Bfloat16* x, int) { return load(x, 0); }
  TPK_INLINE static void add(__m512& sums, __m512bh w, __m512bh x) { sums = _mm512_dpbf16_ps(sums, w, x); }
};

}  // namespace

GemvPath gemv_avx512(DType dtype) {
  if (dtype == DType::F32) return gemv_path<Avx512<float>>();
  return dtype == DType::F16 ? gemv_path<Avx512<Half>>() : gemv_path<Avx512<Bfloat16>>();
}

GemvPath gemv_avx512_bf16() { return gemv_path<Avx512Bf16>(); }

}  // namespace tpk

#endif
