#include "gemv.h"

#include "gemv_intrinsics.h"
#include "gemv_loops.h"

namespace tpk {
namespace {

struct Lanes {
  float values[kLanes];
};

template <class T>
struct Portable {
  using Value = T;
  using Packed = float;
  using Sums = Lanes;
  using Weights = Lanes;
  static constexpr const char* kName = "portable";
  static constexpr size_t kStep = kLanes;
  static constexpr int kParts = 1, kMostWeights = 1, kMostSums = 4;
  static constexpr int rows_with(size_t) { return 1; }

  TPK_INLINE static void pack(const T* x, float* to) {
    for (size_t l = 0; l < kLanes; ++l) to[l] = to_float(x[l]);
  }
  TPK_INLINE static Lanes zeros() { return {}; }
  TPK_INLINE static Lanes load(const T* w, int) {
    Lanes to;
    pack(w, to.values);
    return to;
  }
  TPK_INLINE static Lanes inputs(const float* x, int) {
    Lanes to;
    std::memcpy(to.values, x, sizeof to.values);
    return to;
  }
  TPK_INLINE static void add(Lanes& sums, const Lanes& w, const Lanes& x) {
    for (size_t l = 0; l < kLanes; ++l) sums.values[l] += w.values[l] * x.values[l];
  }
  TPK_INLINE static float total(const Lanes* sums) {
    Lanes copy = *sums;
    return sum_of_lanes(copy.values);
  }
};

std::vector<GemvPath> found_paths(DType dtype) {
  std::vector<GemvPath> paths;
#if defined(__x86_64__)
  const bool avx512 =
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (avx512 && dtype == DType::BF16 && __builtin_cpu_supports("avx512bf16")) paths.push_back(gemv_avx512_bf16());
  if (avx512) paths.push_back(gemv_avx512(dtype));
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    paths.push_back(gemv_avx2(dtype));
  }
#endif
  if (dtype == DType::F32) paths.push_back(gemv_path<Portable<float>>());
  if (dtype == DType::BF16) paths.push_back(gemv_path<Portable<Bfloat16>>());
  if (dtype == DType::F16) paths.push_back(gemv_path<Portable<Half>>());
  return paths;
}

}  // namespace

const std::vector<GemvPath>& gemv_paths(DType dtype) {
  static const std::vector<GemvPath> fp32 = found_paths(DType::F32), bf16 = found_paths(DType::BF16),
                                     fp16 = found_paths(DType::F16);
  return dtype == DType::F32 ? fp32 : dtype == DType::BF16 ? bf16 : fp16;
}

size_t gemv_packed_bytes(size_t M, size_t K) {
  constexpr size_t kWidestStep = 32;
  return M * ((K + kWidestStep - 1) / kWidestStep * kWidestStep) * sizeof(float);
}

}  // namespace tpk
