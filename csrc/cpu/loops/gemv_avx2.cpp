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

template <class T>
struct Avx2 {
  using Value = T;
  using Packed = float;
  struct Sums {
    __m256 low, high;
  };
  using Weights = Sums;
  static constexpr const char* kName = "avx2";
  static constexpr size_t kStep = 16;
  static constexpr int kMostRows = 3;  // of x in sixteen registers
  static constexpr int rows_with(int) { return 2; }

  TPK_INLINE static void pack(const T* x, size_t count, float* to) {
    for (size_t i = 0; i < count; ++i) to[i] = to_float(x[i]);
  }
  TPK_INLINE static void clear(Sums& sums) { sums = {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  TPK_INLINE static void load(const T* w, Weights& to) { to = {eight(w), eight(w + 8)}; }
  TPK_INLINE static void add(Sums& sums, const Weights& w, const float* x) {
    sums.low = _mm256_fmadd_ps(w.low, _mm256_load_ps(x), sums.low);
    sums.high = _mm256_fmadd_ps(w.high, _mm256_load_ps(x + 8), sums.high);
  }
  TPK_INLINE static float total(const Sums& sums) {
    const __m256 eight = _mm256_add_ps(sums.low, sums.high);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
};

}  // namespace

GemvPath gemv_avx2(DType dtype) {
  if (dtype == DType::F32) return gemv_path<Avx2<float>>();
  return dtype == DType::F16 ? gemv_path<Avx2<Half>>() : gemv_path<Avx2<Bfloat16>>();
}

}  // namespace tpk

#endif
