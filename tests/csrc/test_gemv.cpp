// Products of few rows: every path that this machine has, against sums in double, in every dtype, size and stride.
#include "cpu/loops/gemv.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>

#include "core/codec/half.h"
#include "expect.h"

using namespace tpk;

namespace {

constexpr size_t kSizes[][2] = {{1, 1},   {3, 5},   {7, 16},   {5, 31},   {4, 32},   {17, 33},  {6, 47},
                                {13, 63}, {16, 64}, {18, 130}, {33, 257}, {5, 1000}, {18, 4500}};  // N, K

template <class T>
struct Of;
template <>
struct Of<float> {
  static constexpr DType dtype = DType::F32;
  static constexpr double rounding = 0x1p-24;
};
template <>
struct Of<Bfloat16> {
  static constexpr DType dtype = DType::BF16;
  static constexpr double rounding = 0x1p-8;
};
template <>
struct Of<Half> {
  static constexpr DType dtype = DType::F16;
  static constexpr double rounding = 0x1p-11;
};

template <class T>
T value_of(float value) {
  return from_float<T>(value);
}

template <class T>
std::vector<T> random_values(size_t n, unsigned seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  std::vector<T> values(n);
  for (T& value : values) value = value_of<T>(normal(random));
  return values;
}

template <class T>
struct Problem {
  size_t M, N, K;
  std::vector<T> x, w, bias;
};

template <class T>
Problem<T> random_problem(size_t M, size_t N, size_t K) {
  return {M, N, K, random_values<T>(M * K, 1), random_values<T>(N * K, 2), random_values<T>(N, 3)};
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

// y by one path, the rows of weights in parts as several threads would take them; w_stride 0: the rows are dense.
template <class T>
std::vector<T> multiply(const GemvPath& path, const Problem<T>& p, bool with_bias, size_t parts = 1,
                        size_t w_stride = 0) {
  std::vector<T> y(p.M * p.N, value_of<T>(-7.0f));
  const Gemv product{p.x.data(),
                     p.w.data(),
                     static_cast<ptrdiff_t>(w_stride == 0 ? p.K : w_stride),
                     with_bias ? p.bias.data() : nullptr,
                     y.data(),
                     p.M,
                     p.N,
                     p.K};
  const size_t bytes = (gemv_packed_bytes(p.M, p.K) + 63) / 64 * 64;
  const std::unique_ptr<void, Free> packed(std::aligned_alloc(64, bytes));
  std::memset(packed.get(), 0xff, bytes);  // NaN where nothing is written
  path.pack(product, packed.get());
  for (size_t i = 0; i < parts; ++i) {
    path.multiply(product, packed.get(), p.N * i / parts, p.N * (i + 1) / parts);
  }
  return y;
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

template <class T>
void expect_near(const GemvPath& path, const Problem<T>& p, bool with_bias) {
  const std::vector<T> y = multiply(path, p, with_bias);
  for (size_t m = 0; m < p.M; ++m) {
    for (size_t n = 0; n < p.N; ++n) {
      double exact = with_bias ? to_float(p.bias[n]) : 0.0, steps = std::fabs(exact);
      for (size_t k = 0; k < p.K; ++k) {
        const double term = static_cast<double>(to_float(p.x[m * p.K + k])) * to_float(p.w[n * p.K + k]);
        exact += term;
        steps += std::fabs(term);
      }
      const double allowed =
          std::fabs(exact) * Of<T>::rounding * 1.01 + steps * (static_cast<double>(p.K) + 2) * 0x1p-24;
      EXPECT(std::fabs(to_float(y[m * p.N + n]) - exact) <= allowed, path.name, " ", name_of(Of<T>::dtype), " M ", p.M,
             " N ", p.N, " K ", p.K, ": y[", m, ", ", n, "] = ", to_float(y[m * p.N + n]), ", exactly ", exact);
    }
  }
}

template <class Body>
void for_each_dtype(Body&& body) {
  body(float{});
  body(Bfloat16{});
  body(Half{});
}

}  // namespace

CASE(every_machine_has_the_portable_path_last_and_no_path_twice) {
  for_each_dtype([](auto value) {
    const std::vector<GemvPath>& paths = gemv_paths(Of<decltype(value)>::dtype);
    EXPECT(std::string(paths.back().name) == "portable");
    for (size_t i = 0; i < paths.size(); ++i) {
      for (size_t j = 0; j < i; ++j) EXPECT(std::string(paths[i].name) != paths[j].name, paths[i].name);
    }
  });
}

CASE(products_of_every_path_are_those_of_double_rounded) {
  for_each_dtype([](auto value) {
    using T = decltype(value);
    for (const GemvPath& path : gemv_paths(Of<T>::dtype)) {
      for (size_t M = 1; M <= kMostGemvRows; ++M) {
        for (const auto& size : kSizes) {
          const Problem<T> p = random_problem<T>(M, size[0], size[1]);
          expect_near(path, p, false);
          expect_near(path, p, true);
        }
      }
    }
  });
}

CASE(a_row_has_the_same_bits_whatever_rows_are_beside_it) {
  for_each_dtype([](auto value) {
    using T = decltype(value);
    for (const GemvPath& path : gemv_paths(Of<T>::dtype)) {
      const size_t N = 37, K = 611;
      const Problem<T> all = random_problem<T>(kMostGemvRows, N, K);
      const std::vector<T> want = multiply(path, all, true);
      for (size_t M = 1; M < kMostGemvRows; ++M) {
        Problem<T> last = all;  // the last M rows
        last.M = M;
        last.x.erase(last.x.begin(), last.x.end() - static_cast<ptrdiff_t>(M * K));
        const std::vector<T> expected(want.end() - static_cast<ptrdiff_t>(M * N), want.end());
        EXPECT(same_bits(multiply(path, last, true), expected), path.name, " M ", M);
      }
    }
  });
}

CASE(parts_and_strides_change_no_bit) {
  for_each_dtype([](auto value) {
    using T = decltype(value);
    for (const GemvPath& path : gemv_paths(Of<T>::dtype)) {
      for (size_t M : {1, 3, 8}) {
        const Problem<T> p = random_problem<T>(M, 71, 205);
        const std::vector<T> want = multiply(path, p, true);
        for (size_t parts : {2, 3, 7, 71}) EXPECT(same_bits(multiply(path, p, true, parts), want), path.name, parts);
        Problem<T> wide = p;
        const size_t stride = p.K + 13;
        wide.w.assign(p.N * stride, value_of<T>(std::numeric_limits<float>::quiet_NaN()));
        for (size_t n = 0; n < p.N; ++n) std::memcpy(&wide.w[n * stride], &p.w[n * p.K], p.K * sizeof(T));
        EXPECT(same_bits(multiply(path, wide, true, 1, stride), want), path.name, " rows further apart");
      }
    }
  });
}

// Fused multiply-adds in fp32 and the order of a sum are those of every path with such an instruction; the product of
// two 16-bit values is exact, so that it makes no difference there. Two products an instruction round otherwise.
CASE(paths_with_the_same_arithmetic_have_the_same_bits) {
  for_each_dtype([](auto value) {
    using T = decltype(value);
    for (size_t K : {1, 31, 64, 577}) {
      const Problem<T> p = random_problem<T>(5, 19, K);
      std::vector<T> want;
      for (const GemvPath& path : gemv_paths(Of<T>::dtype)) {
        const std::string name = path.name;
        if (name == "avx512_bf16" || (name == "portable" && std::is_same_v<T, float>)) continue;
        const std::vector<T> y = multiply(path, p, true);
        if (!want.empty()) EXPECT(same_bits(y, want), name, " K ", K);
        want = y;
      }
    }
  });
}

CASE(what_is_not_finite_reaches_its_outputs_and_no_others) {
  for_each_dtype([](auto value) {
    using T = decltype(value);
    const float nan = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();
    for (const GemvPath& path : gemv_paths(Of<T>::dtype)) {
      for (size_t M : {1, 2, 4, 8}) {
        const size_t N = 9, K = 75;
        Problem<T> p{M, N, K, std::vector<T>(M * K, value_of<T>(1.0f)), std::vector<T>(N * K, value_of<T>(1.0f)), {}};
        p.w[2 * K + 74] = p.x[(M - 1) * K + 3] = value_of<T>(nan);
        p.w[5 * K + 3] = p.w[7 * K + 40] = value_of<T>(infinity);
        p.w[7 * K + 41] = value_of<T>(-infinity);
        const std::vector<T> y = multiply(path, p, false);
        for (size_t m = 0; m < M; ++m) {
          for (size_t n = 0; n < N; ++n) {
            const float found = to_float(y[m * N + n]);
            if (m == M - 1 || n == 2 || n == 7) {
              EXPECT(std::isnan(found), path.name, " y[", m, ", ", n, "] = ", found);
            } else {
              EXPECT(found == (n == 5 ? infinity : 75.0f), path.name, " y[", m, ", ", n, "] = ", found);
            }
          }
        }
      }
    }
  });
}

// 2^-24 is the least half; what a bf16 instruction counts as zero is below 2^-126.
CASE(small_values_are_not_lost) {
  const Problem<Half> halves{
      1, 1, 2, {value_of<Half>(0x1p-24f), value_of<Half>(0x1p-24f)}, {value_of<Half>(1.0f), value_of<Half>(1.0f)}, {}};
  for (const GemvPath& path : gemv_paths(DType::F16)) {
    EXPECT(to_float(multiply(path, halves, false)[0]) == 0x1p-23f, path.name);
  }
  const Problem<float> floats{1, 1, 1, {0x1p-149f}, {1.0f}, {}};
  for (const GemvPath& path : gemv_paths(DType::F32)) {
    EXPECT(multiply(path, floats, false)[0] == 0x1p-149f, path.name);
  }
  const Problem<Bfloat16> small{1, 1, 1, {value_of<Bfloat16>(0x1p-126f)}, {value_of<Bfloat16>(1.0f)}, {}};
  for (const GemvPath& path : gemv_paths(DType::BF16)) {
    EXPECT(to_float(multiply(path, small, false)[0]) == 0x1p-126f, path.name);
  }
}
