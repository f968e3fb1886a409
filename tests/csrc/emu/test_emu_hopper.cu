// What Hopper does beside its threads: one block multiplies a tile, stage by stage, as gemm_sm90.cuh does.
#include <cmath>
#include <random>

#include "cuda/kernels/hopper.cuh"
#include "cuda/tensor_map.h"
#include "emu/control.h"
#include "expect.h"

using namespace tpk;
using namespace tpk::cuda;

namespace {

constexpr int kRows = 128, kColumns = 128, kDepth = 64, kStages = 3;
constexpr uint32_t kStageBytes = (kRows + kColumns) * kDepth * 2;

// What is planted into the kernel.
enum class Fault { None, NoExpect, WrongParity, EarlyRelease, NoWait, WrongStep, NoBegin, OtherOperand };

struct GemmArgs {
  TensorMap x, w;
  float* y;
  int K;
  Fault fault;
};

TPK_KERNEL void __launch_bounds__(384, 1) gemm_of_one_tile(const __grid_constant__ GemmArgs args) {
  TPK_DYNAMIC_SHARED(char, dynamic);
  __shared__ uint64_t full[kStages], empty[kStages];
  char* const ring = dynamic + (1024 - reinterpret_cast<uintptr_t>(dynamic) % 1024) % 1024;
  const int steps = (args.K + kDepth - 1) / kDepth;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) transaction_init(&full[s], 1), transaction_init(&empty[s], 8);
    transaction_init_done();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    if (threadIdx.x >= 32 || !one_of_warp()) return;
    for (int step = 0; step < steps; ++step) {
      const int stage = step % kStages;
      const uint32_t parity = static_cast<uint32_t>(step / kStages) & 1;
      const bool wrong = args.fault == Fault::WrongParity && step == kStages;
      while (!transaction_done(&empty[stage], parity ^ 1 ^ (wrong ? 1 : 0))) {
      }
      char* const to = ring + static_cast<uint32_t>(stage) * kStageBytes;
      if (args.fault == Fault::NoExpect && step == 1) {
        transaction_arrive(&full[stage]);
      } else {
        transaction_expect(&full[stage], kStageBytes);
      }
      load_tile(to, &args.x, &full[stage], step * kDepth, 0);
      load_tile(to + kRows * kDepth * 2, &args.w, &full[stage], step * kDepth, 0);
    }
    return;
  }
  const uint32_t thread = threadIdx.x - 128, half = thread / 128;
  float d[kColumns / 2] = {};
  const auto release = [&](int step) {
    if (thread % 32 == 0) transaction_arrive(&empty[step % kStages]);
  };
  for (int step = 0; step < steps; ++step) {
    const int stage = step % kStages;
    while (!transaction_done(&full[stage], static_cast<uint32_t>(step / kStages) & 1)) {
    }
    const char* const from = ring + static_cast<uint32_t>(stage) * kStageBytes;
    const uint64_t a = operand(from + half * 64 * 128), b = operand(from + kRows * kDepth * 2);
    if (args.fault != Fault::NoBegin) products_begin();
    for (uint32_t j = 0; j < kDepth / 16; ++j) {
      const uint32_t advance = args.fault == Fault::WrongStep ? j : 2 * j;
      const bool other = args.fault == Fault::OtherOperand && thread == 77 && step == 1;
      product<Bfloat16, kColumns>(d, a + advance, (other ? a : b) + 2 * j, step > 0 || j > 0);
    }
    products_commit();
    if (args.fault == Fault::EarlyRelease) release(step);
    products_wait<1>();
    if (step > 0 && args.fault != Fault::EarlyRelease) release(step - 1);
  }
  if (args.fault != Fault::NoWait) products_wait<0>();
  const uint32_t warp = thread / 32, lane = thread % 32;
  for (uint32_t i = 0; i < kColumns / 2; ++i) {
    const uint32_t row = 16 * warp + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + 2 * (lane % 4) + i % 2;
    args.y[row * kColumns + column] = d[i];
  }
}

struct Matrix {
  Matrix(int rows, int columns, uint32_t seed)
      : rows(rows), columns(columns), values(static_cast<size_t>(rows * columns)) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (Bfloat16& value : values) value = from_float<Bfloat16>(normal(random));
    EXPECT(cudaMalloc(&data, values.size() * 2) == cudaSuccess);
    EXPECT(cudaMemcpy(data, values.data(), values.size() * 2, cudaMemcpyHostToDevice) == cudaSuccess);
  }
  ~Matrix() { cudaFree(data); }
  double at(int r, int c) const { return to_float(values[static_cast<size_t>(r * columns + c)]); }
  TensorMap map() const {
    const auto n = static_cast<uint64_t>(columns);
    return tensor_map_of(DType::BF16, data, static_cast<uint64_t>(rows), n, n * 2, 128);
  }
  int rows, columns;
  std::vector<Bfloat16> values;
  void* data = nullptr;
};

// The largest error of a product, in units of what rounding allows; rows and columns outside x and w must be zero.
double error_of(int rows, int columns, int K, Fault fault) {
  const Matrix x(rows, K, 1), w(columns, K, 2);
  float* y;
  EXPECT(cudaMalloc(reinterpret_cast<void**>(&y), kRows * kColumns * 4) == cudaSuccess);
  const int bytes = kStages * static_cast<int>(kStageBytes) + 1024;
  EXPECT(cudaFuncSetAttribute(reinterpret_cast<const void*>(gemm_of_one_tile),
                              cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) == cudaSuccess);
  const GemmArgs args{x.map(), w.map(), y, K, fault};
  EXPECT(TPK_LAUNCH(gemm_of_one_tile, 1, 384, static_cast<size_t>(bytes), nullptr, args) == cudaSuccess);
  double worst = 0;
  if (cudaDeviceSynchronize() == cudaSuccess) {
    for (int r = 0; r < kRows; ++r) {
      for (int c = 0; c < kColumns; ++c) {
        double sum = 0, size = 0;
        for (int k = 0; k < K && r < rows && c < columns; ++k) {
          sum += x.at(r, k) * w.at(c, k), size += std::abs(x.at(r, k) * w.at(c, k));
        }
        const double off = std::abs(y[r * kColumns + c] - sum);
        worst = off <= 1e-30 ? worst : std::isnan(off) ? INFINITY : std::max(worst, off / (size * K * 6e-8));
      }
    }
  }
  cudaFree(y);
  return worst;
}

emu::Options with_seed(uint64_t seed) {
  emu::Options options;
  options.seed = seed, options.loud = false, options.timeout_s = 1;
  return options;
}

CASE(a_tile_is_multiplied) {
  for (const uint64_t seed : {0, 1, 2, 3}) {
    emu::configure(with_seed(seed));
    EXPECT(error_of(128, 128, 256, Fault::None) <= 1);
    EXPECT(error_of(100, 72, 328, Fault::None) <= 1);
    EXPECT(error_of(1, 8, 8, Fault::None) <= 1);
    for (const emu::Report& report : emu::take_reports()) EXPECT(false, report.text);
  }
}

// Caught by a report or by wrong values, in one order or another.
void expect_caught(Fault fault) {
  int caught = 0;
  for (const uint64_t seed : {1, 2, 3, 4}) {
    emu::configure(with_seed(seed));
    const double error = error_of(128, 128, 512, fault);
    caught += !emu::take_reports().empty() || error > 1 ? 1 : 0;
    cudaGetLastError();
    emu::reset();
  }
  EXPECT(caught > 0);
}

CASE(bytes_that_nobody_expects) { expect_caught(Fault::NoExpect); }
CASE(a_stage_is_waited_for_with_the_wrong_parity) { expect_caught(Fault::WrongParity); }
CASE(a_stage_is_given_back_before_it_has_been_read) { expect_caught(Fault::EarlyRelease); }
CASE(sums_are_read_before_they_are_there) { expect_caught(Fault::NoWait); }
CASE(an_operand_advances_by_half_a_step) { expect_caught(Fault::WrongStep); }
CASE(products_without_a_beginning) { expect_caught(Fault::NoBegin); }
CASE(threads_of_a_warpgroup_that_ask_for_different_products) { expect_caught(Fault::OtherOperand); }

}  // namespace
