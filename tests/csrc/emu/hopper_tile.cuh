// One block multiplies one tile, stage by stage, as gemm_sm90.cuh does; with mistakes that can be planted into it.
#pragma once

#include <cmath>
#include <map>
#include <random>

#include "cuda/comm/tensor_map.h"
#include "cuda/kernels/operand.cuh"
#include "planted.h"

namespace tpk::planted {

using namespace tpk::cuda;

constexpr int kRows = 128, kDepth = 64, kStages = 3;

enum class Fault {
  None,
  NotPublished,
  NoExpect,
  WrongParity,
  EarlyRelease,
  WrongStep,
  WrongSwizzle,
  WrongStart,
  OtherLayout,
  WrongLeading,
  WrongAdvance,
  NoBegin,
  NoCommit,
  NoWait,
  Touched,
  OtherOperand,
  OneWarpLess,
  LeftTile,
  TooManyRegisters,
  ReadUnawaited,
};

struct TileArgs {
  TensorMap x, w;
  float* y;
  int K;
  Fault fault;
  bool transposed;  // w
};

template <int N>
struct TileStage {
  static constexpr uint32_t kXBytes = kRows * kDepth * 2, kBytes = kXBytes + N * kDepth * 2;
  static constexpr int kShared = kStages * static_cast<int>(kBytes) + 1024;
};

template <int N>
__device__ __forceinline__ void load_stages_of(const TileArgs& args, char* ring, uint64_t* full, uint64_t* empty) {
  using Stage = TileStage<N>;
  const int steps = (args.K + kDepth - 1) / kDepth + (args.fault == Fault::LeftTile ? 1 : 0);
  for (int step = 0; step < steps; ++step) {
    const int stage = step % kStages;
    const uint32_t parity = static_cast<uint32_t>(step / kStages) & 1;
    const bool wrong = args.fault == Fault::WrongParity && step == kStages;
    while (!transaction_done(&empty[stage], parity ^ 1 ^ (wrong ? 1 : 0))) {
    }
    char* const to = ring + static_cast<uint32_t>(stage) * Stage::kBytes;
    if (args.fault == Fault::NoExpect && step == 1) {
      transaction_arrive(&full[stage]);
    } else {
      transaction_expect(&full[stage], Stage::kBytes);
    }
    load_tile(to, &args.x, &full[stage], step * kDepth, 0);
    if (!args.transposed) load_tile(to + Stage::kXBytes, &args.w, &full[stage], step * kDepth, 0);
    for (int n = 0; args.transposed && n < N; n += 64)
      load_tile(to + Stage::kXBytes + n * 128, &args.w, &full[stage], n, step * kDepth);
  }
}

// Operands of a step, with what is wrong with them.
__device__ __forceinline__ uint64_t x_operand(const char* stage, uint32_t half, Fault fault) {
  uint64_t x = operand(stage + half * 64 * 128);
  if (fault == Fault::WrongSwizzle) x ^= uint64_t{3} << 62;
  if (fault == Fault::WrongStart) x += 512 >> 4;
  return x;
}

__device__ __forceinline__ uint64_t w_operand(const char* tile, bool transposed, Fault fault) {
  if (!transposed) return operand(tile);
  return transposed_operand(tile) - (fault == Fault::WrongLeading ? uint64_t{4096 / 16} << 16 : 0);
}

template <class T, int N>
__device__ __forceinline__ void multiply_step(float (&d)[N / 2], const TileArgs& args, const char* stage,
                                              uint32_t thread, int step) {
  const Fault fault = args.fault;
  const bool transposed = args.transposed != (fault == Fault::OtherLayout);
  const uint64_t x = x_operand(stage, thread / 128, fault);
  const uint64_t w = w_operand(stage + TileStage<N>::kXBytes, transposed, fault);
  const uint32_t advance = transposed && fault != Fault::WrongAdvance ? 128 : 2;
  if (fault != Fault::NoBegin) products_begin();
  for (uint32_t j = 0; j < kDepth / 16; ++j) {
    const bool other = fault == Fault::OtherOperand && thread == 77 && step == 1;
    if (fault == Fault::OneWarpLess && thread / 32 == 3 && step == 1 && j == 3) continue;
    const uint64_t a = x + (fault == Fault::WrongStep ? j : 2 * j), b = (other ? x : w) + advance * j;
    if (transposed) {
      product<T, N, true>(d, a, b, step > 0 || j > 0);
    } else {
      product<T, N>(d, a, b, step > 0 || j > 0);
    }
  }
  if (fault == Fault::Touched && step == 1) d[5] = 0;
  if (fault != Fault::NoCommit) products_commit();
}

template <class T, int N>
__device__ __forceinline__ void multiply_stages(const TileArgs& args, const char* ring, uint64_t* full,
                                                uint64_t* empty) {
  const uint32_t thread = threadIdx.x - 128;
  const auto release = [&](int step) {
    if (thread % 32 == 0) transaction_arrive(&empty[step % kStages]);
  };
  float d[N / 2] = {};
  const int steps = (args.K + kDepth - 1) / kDepth;
  for (int step = 0; step < steps; ++step) {
    const int stage = step % kStages;
    const char* const from = ring + static_cast<uint32_t>(stage) * TileStage<N>::kBytes;
    while (!transaction_done(&full[stage], static_cast<uint32_t>(step / kStages) & 1)) {
      if (args.fault == Fault::ReadUnawaited && step == 0) args.y[thread] = from[thread];
    }
    multiply_step<T, N>(d, args, from, thread, step);
    if (args.fault == Fault::EarlyRelease) release(step);
    products_wait<1>();
    if (step > 0 && args.fault != Fault::EarlyRelease) release(step - 1);
  }
  if (args.fault != Fault::NoWait) products_wait<0>();
  const uint32_t warp = thread / 32, lane = thread % 32;
  for (uint32_t i = 0; i < N / 2; ++i) {
    const uint32_t row = 16 * warp + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + 2 * (lane % 4) + i % 2;
    args.y[row * N + column] = d[i];
  }
}

template <class T, int N>
TPK_KERNEL void __launch_bounds__(384, 1) multiply_tile(const __grid_constant__ TileArgs args) {
  TPK_DYNAMIC_SHARED(char, dynamic);
  __shared__ uint64_t full[kStages], empty[kStages];
  char* const ring = dynamic + (1024 - reinterpret_cast<uintptr_t>(dynamic) % 1024) % 1024;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) transaction_init(&full[s], 1), transaction_init(&empty[s], 8);
    if (args.fault != Fault::NotPublished) transaction_init_done();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    registers_lower<40>();
    if (threadIdx.x < 32 && one_of_warp()) load_stages_of<N>(args, ring, full, empty);
    return;
  }
  if (args.fault == Fault::TooManyRegisters) {
    registers_raise<240>();
  } else {
    registers_raise<232>();
  }
  multiply_stages<T, N>(args, ring, full, empty);
}

// ---- the host ------------------------------------------------------------------------------------------------------

template <class T>
struct Matrix {
  Matrix(int rows, int columns, uint32_t seed)
      : rows(rows), columns(columns), values(static_cast<size_t>(rows * columns)) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (T& value : values) value = from_float<T>(normal(random));
  }
  Matrix transposed() const {
    Matrix made(*this);
    std::swap(made.rows, made.columns);
    for (int r = 0; r < rows; ++r) {
      for (int c = 0; c < columns; ++c)
        made.values[static_cast<size_t>(c * rows + r)] = values[static_cast<size_t>(r * columns + c)];
    }
    return made;
  }
  TensorMap map(uint32_t box_rows) const {
    void* data = nullptr;  // freed by emu::reset
    EXPECT(cudaMalloc(&data, values.size() * 2) == cudaSuccess);
    EXPECT(cudaMemcpy(data, values.data(), values.size() * 2, cudaMemcpyHostToDevice) == cudaSuccess);
    const auto n = static_cast<uint64_t>(columns);
    return tensor_map_of(std::is_same_v<T, Half> ? DType::F16 : DType::BF16, data, static_cast<uint64_t>(rows), n,
                         n * 2, box_rows);
  }
  int rows, columns;
  std::vector<T> values;
};

// A product in fp64, and how far off sums in fp32 may be; zeros outside of x and w. Not watched: it is the host's.
struct Expected {
  std::vector<double> sums, bounds;

  template <class T>
  __attribute__((no_sanitize("thread"))) Expected(const Matrix<T>& x, const Matrix<T>& w, int N)
      : sums(static_cast<size_t>(kRows * N)), bounds(sums.size()) {
    std::vector<float> a(x.values.size()), b(w.values.size());
    for (size_t i = 0; i < a.size(); ++i) a[i] = to_float(x.values[i]);
    for (size_t i = 0; i < b.size(); ++i) b[i] = to_float(w.values[i]);
    const auto K = static_cast<size_t>(x.columns);
    for (int r = 0; r < x.rows; ++r) {
      for (int c = 0; c < w.rows; ++c) {
        const float* const left = a.data() + static_cast<size_t>(r) * K;
        const float* const right = b.data() + static_cast<size_t>(c) * K;
        double sum = 0, size = 0;
        for (size_t k = 0; k < K; ++k) sum += double{left[k]} * right[k], size += std::abs(double{left[k]} * right[k]);
        sums[static_cast<size_t>(r * N + c)] = sum;
        bounds[static_cast<size_t>(r * N + c)] = size * static_cast<double>(K) * 0x1p-24;
      }
    }
  }
  bool agrees(const std::vector<float>& y) const {
    for (size_t i = 0; i < y.size(); ++i) {
      if (!(std::abs(y[i] - sums[i]) <= bounds[i])) return false;
    }
    return true;
  }
};

// Multiplies x[rows, K] and w[columns, K].T, which may lie transposed; whether the values are right.
template <class T, int N>
bool multiplies(int rows, int columns, int K, Fault fault = Fault::None, bool transposed = false) {
  const Matrix<T> x(rows, K, 1), w(columns, K, 2);
  static std::map<std::array<int, 3>, Expected> known;
  const Expected& expected = known.try_emplace({rows, columns, K}, x, w, N).first->second;
  float* const y = filled<float>(kRows * N, -1);
  const auto kernel = multiply_tile<T, N>;
  EXPECT(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                              TileStage<N>::kShared) == cudaSuccess);
  const TensorMap of_w = transposed ? w.transposed().map(kDepth) : w.map(N);
  const TileArgs args{x.map(kRows), of_w, y, K, fault, transposed};
  EXPECT(TPK_LAUNCH(kernel, 1, 384, TileStage<N>::kShared, nullptr, args) == cudaSuccess);
  return cudaDeviceSynchronize() == cudaSuccess && expected.agrees(values_of(y, static_cast<size_t>(kRows * N)));
}

}  // namespace tpk::planted
