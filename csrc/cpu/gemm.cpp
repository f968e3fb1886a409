#include "gemm.h"

#include <atomic>
#include <map>
#include <mutex>
#include <tuple>

namespace tpk {
namespace {

std::atomic<bool> onednn_available{false};

using Key = std::tuple<DType, int64_t, int64_t, int64_t>;

struct Measured {
  std::mutex mutex;
  std::map<Key, Engine> engines;
  std::atomic<bool> any{false};
};

Measured& measured() {
  static Measured* instance = new Measured;
  return *instance;
}

bool is_amd() {
#if defined(__x86_64__)
  static const bool amd = __builtin_cpu_is("amd") != 0;
  return amd;
#else
  return false;
#endif
}

bool has_avx512() {
#if defined(__x86_64__)
  static const bool found = __builtin_cpu_supports("avx512f") != 0;
  return found;
#else
  return false;
#endif
}

Tensor onednn_linear(const Tensor& x, const Tensor& w, const OptionalTensor& bias) {
  // oneDNN takes strides of x and w into account, but reads the bias as dense.
  const OptionalTensor packed = bias.has_value() ? OptionalTensor(dense(*bias)) : bias;
  return call("mkldnn::_linear_pointwise", "", x, w, packed, std::string("none"), std::vector<int64_t>{},
              std::optional<std::string>(std::string()));
}

Tensor transpose(const Tensor& x) { return torch::stable::transpose(x, 0, 1); }

EngineChoice engine_for(const Tensor& x, const Tensor& w) {
  return choose_engine(dtype_of(x), num_rows(x), w.size(0), w.size(1));
}

}  // namespace

const char* name_of(Engine engine) { return engine == Engine::OneDnn ? "onednn" : "aten"; }

void set_onednn_available(bool available) { onednn_available = available; }

void set_measured_engine(DType dtype, int64_t M, int64_t N, int64_t K, Engine engine) {
  std::lock_guard<std::mutex> lock(measured().mutex);
  measured().engines[{dtype, M, N, K}] = engine;
  measured().any = true;
}

void forget_measured_engines() {
  std::lock_guard<std::mutex> lock(measured().mutex);
  measured().engines.clear();
  measured().any = false;
}

EngineChoice choose_engine(DType dtype, int64_t M, int64_t N, int64_t K) {
  if (dtype != DType::F32) return {Engine::Aten, "only fp32 has two engines; aten calls oneDNN itself where it can"};
  if (!onednn_available) return {Engine::Aten, "this torch has no oneDNN"};
  if (M == 0 || N == 0 || K == 0) return {Engine::Aten, "nothing to multiply"};
  if (measured().any) {
    std::lock_guard<std::mutex> lock(measured().mutex);
    const auto found = measured().engines.find({dtype, M, N, K});
    if (found != measured().engines.end()) return {found->second, "measured on this machine"};
  }
  // oneDNN against MKL, one core each. Zen 4: 1.3 to 1.9 times as fast from 16 rows on. Zen 3, which has no
  // AVX-512: 1.2 to 1.6 times at 4 to 64 rows and weights that the caches do not hold, 1.1 at 128, behind from 256 on
  // and for small weights.
  constexpr int64_t kLargeWeights = int64_t{4} << 20;
  if (!is_amd()) return {Engine::Aten, "rule: not an AMD core"};
  if (has_avx512()) {
    if (M < 8) return {Engine::Aten, "rule: few rows, bound by memory"};
    return {Engine::OneDnn, "rule: oneDNN beats MKL on AMD cores with AVX-512 from 8 rows on"};
  }
  if (N * K < kLargeWeights) return {Engine::Aten, "rule: AMD core without AVX-512, weights fit the caches"};
  if (M < 4 || M > 128) return {Engine::Aten, "rule: AMD core without AVX-512, not 4 to 128 rows"};
  return {Engine::OneDnn, "rule: AMD core, large weights, 4 to 128 rows"};
}

Tensor as_rows(const Tensor& x) {
  if (x.dim() == 2) return x;
  return torch::stable::reshape(x, {num_rows(x), x.size(x.dim() - 1)});
}

int64_t num_rows(const Tensor& x) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) rows *= x.size(i);
  return rows;
}

Tensor linear_by(Engine engine, const Tensor& x, const Tensor& w, const OptionalTensor& bias) {
  if (engine == Engine::OneDnn) return onednn_linear(x, w, bias);
  return call("aten::linear", "", x, w, bias);
}

Tensor linear(const Tensor& x, const Tensor& w, const OptionalTensor& bias) {
  return dense(linear_by(engine_for(x, w).engine, x, w, bias));
}

void linear_into(const Tensor& x, const Tensor& w, Tensor& y) {
  Tensor rows = as_rows(y);
  call("aten::mm", "out", as_rows(x), transpose(w), rows);
}

Tensor grad_input(const Tensor& dy, const Tensor& w) { return linear(dy, transpose(w), std::nullopt); }

Tensor grad_weight(const Tensor& dy, const Tensor& x) {
  const Tensor rows = as_rows(dy), inputs = as_rows(x);
  return dense(call("aten::mm", "", transpose(rows), inputs));
}

Tensor grad_bias(const Tensor& dy) {
  const std::vector<int64_t> tokens{0};
  return call("aten::sum", "dim_IntList", as_rows(dy), std::optional<std::vector<int64_t>>(tokens), false,
              std::optional<ScalarType>());
}

}  // namespace tpk
