// For tests of kernels that know no peers: memory of a rank by dtype, and values as doubles with bounds.
#pragma once

#include "emu_ranks.h"

namespace tpk::testing {

constexpr DType kFloating[] = {DType::F32, DType::F64, DType::BF16, DType::F16};

// The largest relative error of one rounding, and of a step of a sum of such values.
inline double unit_of(DType dtype) {
  return dtype == DType::F64 ? 0x1p-53 : dtype == DType::F32 ? 0x1p-24 : dtype == DType::BF16 ? 0x1p-8 : 0x1p-11;
}
inline double sum_unit_of(DType dtype) { return dtype == DType::F64 ? 0x1p-53 : 0x1p-24; }
inline DType sum_dtype_of(DType dtype) { return dtype == DType::F64 ? DType::F64 : DType::F32; }

inline std::vector<double> doubles(DType dtype, const Bytes& bytes) {
  std::vector<double> values(bytes.size() / size_of(dtype));
  for (size_t i = 0; i < values.size(); ++i) values[i] = value_at(dtype, bytes, i);
  return values;
}

inline Bytes bytes_of(DType dtype, const std::vector<double>& values) {
  Bytes bytes(values.size() * size_of(dtype));
  for (size_t i = 0; i < values.size(); ++i) put(dtype, bytes, i, values[i]);
  return bytes;
}

// Normal deviates that the dtype holds.
inline Bytes normal_values(DType dtype, size_t n, uint64_t seed, double scale = 1.0) {
  std::mt19937_64 random(seed * 7919 + 3);
  std::normal_distribution<double> normal;
  std::vector<double> values(n);
  for (double& value : values) value = scale * normal(random);
  return bytes_of(dtype, values);
}

// |got - want| <= bound, and NaN where NaN is wanted.
inline void expect_near(double got, double want, double bound, const std::string& what) {
  if (std::isnan(want)) return EXPECT(std::isnan(got), what, ": got ", got, ", expected NaN");
  if (std::isinf(want)) return EXPECT(got == want, what, ": got ", got, ", expected ", want);
  EXPECT(std::abs(got - want) <= bound, what, ": got ", got, ", expected ", want, " within ", bound);
}

// Half's and float's steps near zero.
inline double smallest_step(DType dtype) {
  return dtype == DType::F16 ? 0x1p-24 : dtype == DType::F64 ? 0.0 : 0x1p-149;
}

}  // namespace tpk::testing
