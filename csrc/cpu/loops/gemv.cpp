#include "gemv.h"

#include <cstring>

namespace tpk {
namespace {

// Sixteen values that the compiler keeps in registers; as arrays of plain loops, those of four rows spill to the stack
// and the product takes a third longer. It makes several registers of one where the machine has none so wide.
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));
typedef uint32_t LaneBits __attribute__((vector_size(kLanes * sizeof(uint32_t))));
typedef uint16_t HalfLanes __attribute__((vector_size(kLanes * sizeof(uint16_t))));

TPK_INLINE void read(const float* from, Lanes& to) { std::memcpy(&to, from, sizeof to); }
TPK_INLINE void read(const Bfloat16* from, Lanes& to) {
  HalfLanes values;
  std::memcpy(&values, from, sizeof values);
  const LaneBits bits = __builtin_convertvector(values, LaneBits) << 16;
  std::memcpy(&to, &bits, sizeof to);
}

TPK_INLINE float finish(const Lanes* lanes, int count, const Gemv& p, size_t m, size_t n, size_t k) {
  float sums[2 * kLanes];
  std::memcpy(sums, lanes, count * sizeof(Lanes));
  const Bfloat16* w = p.w + static_cast<ptrdiff_t>(n) * p.w_stride;
  for (size_t l = 0; k + l < p.K; ++l) sums[l] += to_float(w[k + l]) * p.x[m * p.K + k + l];
  if (count == 2) {
    for (size_t l = 0; l < kLanes; ++l) sums[l] += sums[l + kLanes];
  }
  const float sum = sum_of_lanes(sums);
  return p.bias == nullptr ? sum : sum + to_float(p.bias[n]);
}

// The outputs of M rows of x and R rows of w, with U x kLanes partial sums each. The next R rows of w are prefetched
// where R > 1: the hardware follows one row at a time by itself, but not several.
template <int R, int M, int U>
TPK_INLINE void tile(const Gemv& p, size_t n) {
  Lanes sums[R * M * U];
  for (Lanes& sum : sums) sum = Lanes{};
  const Bfloat16* const w = p.w + static_cast<ptrdiff_t>(n) * p.w_stride;
  size_t k = 0;
  for (; k + U * kLanes <= p.K; k += U * kLanes) {
#pragma GCC unroll 2
    for (int u = 0; u < U; ++u) {
      const size_t at = k + static_cast<size_t>(u) * kLanes;
      Lanes weights[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        if constexpr (R > 1) __builtin_prefetch(w + (r + R) * p.w_stride + at);
        read(w + r * p.w_stride + at, weights[r]);
      }
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        Lanes values;
        read(p.x + static_cast<size_t>(m) * p.K + at, values);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sums[(r * M + m) * U + u] += weights[r] * values;
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const size_t row = n + static_cast<size_t>(r), token = static_cast<size_t>(m);
      store(finish(sums + (r * M + m) * U, U, p, token, row, k), &p.y[token * p.N + row]);
    }
  }
}

template <int M>
TPK_INLINE void rows_of_weights(const Gemv& p, size_t begin, size_t end) {
  size_t n = begin;
  if constexpr (M == 1) {
    for (; n < end; ++n) tile<1, 1, 2>(p, n);
  } else {
    for (; n + 4 <= end; n += 4) tile<4, M, 1>(p, n);
    for (; n < end; ++n) tile<1, M, 1>(p, n);
  }
}

TPK_INLINE void gemv_loop(const Gemv& p, size_t begin, size_t end) {
  switch (p.M) {
    case 1: return rows_of_weights<1>(p, begin, end);
    case 2: return rows_of_weights<2>(p, begin, end);
    case 3: return rows_of_weights<3>(p, begin, end);
    default: return rows_of_weights<4>(p, begin, end);
  }
}

}  // namespace

TPK_SIMD void gemv(const Gemv& product, size_t begin, size_t end) { gemv_loop(product, begin, end); }

TPK_SIMD void widen(const Bfloat16* from, float* to, size_t n) {
  for (size_t i = 0; i < n; ++i) to[i] = to_float(from[i]);
}

}  // namespace tpk
