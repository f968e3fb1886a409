#include "gemv.h"

#include "gemv_intrinsics.h"
#include "gemv_loops.h"

namespace tpk {
namespace {

// Registers of any machine, of sixteen values each; the compiler makes several of one where they are narrower.
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));

template <class T>
struct Portable {
  using Value = T;
  using Packed = float;
  using Sums = Lanes;
  using Weights = Lanes;
  static constexpr const char* kName = "portable";
  static constexpr size_t kStep = kLanes;
  static constexpr int kMostRows = 4;
  static constexpr int rows_with(int) { return 1; }

  TPK_INLINE static void pack(const T* x, size_t count, float* to) {
    for (size_t i = 0; i < count; ++i) to[i] = to_float(x[i]);
  }
  TPK_INLINE static void clear(Lanes& sums) { sums = Lanes{}; }
  TPK_INLINE static void load(const T* w, Lanes& to) {
    float values[kLanes];
    pack(w, kLanes, values);
    std::memcpy(&to, values, sizeof to);
  }
  TPK_INLINE static void add(Lanes& sums, const Lanes& w, const float* x) {
    Lanes values;
    std::memcpy(&values, x, sizeof values);
    sums += w * values;
  }
  TPK_INLINE static float total(const Lanes& sums) {
    float lanes[kLanes];
    std::memcpy(lanes, &sums, sizeof lanes);
    return sum_of_lanes(lanes);
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
