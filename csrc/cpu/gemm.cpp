#include "gemm.h"

#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>
#include <tuple>

#include "cpu/loops/gemv.h"

// torch's own door to its oneDNN linear for compiled programs; absent where torch has no oneDNN. As an op,
// mkldnn::_linear_pointwise, it takes two strings, and loses them at each call (torch_side/text.h).
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_cpu__linear_pointwise(  // NOLINT: the name is torch's
    AtenTensorHandle x, AtenTensorHandle w, AtenTensorHandle* bias, const char* attr, const double** scalars,
    int64_t num_scalars, const char** algorithm, AtenTensorHandle* y);

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

Cpu found_cpu() {
#if defined(__x86_64__)
  return {__builtin_cpu_is("amd") != 0, __builtin_cpu_supports("avx512f") != 0};
#else
  return {};
#endif
}

std::atomic<Cpu>& cpu() {
  static std::atomic<Cpu> instance{found_cpu()};
  return instance;
}

// Whether no two places of x can be one piece of memory; oneDNN has no name for strides that cross. Zero strides it
// takes.
bool is_laid_out(const Tensor& x) {
  int64_t reach = 1;  // of the dimensions that were gone through, from the smallest stride on
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (x.size(d) > 1 && x.stride(d) > 0) dims.emplace_back(x.stride(d), x.size(d));
  }
  std::sort(dims.begin(), dims.end());
  for (const auto& [stride, size] : dims) {
    if (stride < reach) return false;
    reach = stride * size;
  }
  return true;
}

Tensor onednn_linear(const Tensor& x, const Tensor& w, const OptionalTensor& bias) {
  // oneDNN takes strides of x and w into account, but reads the bias as dense.
  const Tensor packed = bias.has_value() ? dense(*bias) : x;
  const Tensor rows = is_laid_out(x) ? x : dense(x), weight = is_laid_out(w) ? w : dense(w);
  AtenTensorHandle added = packed.get(), y = nullptr;
  const char* algorithm = "";
  check_torch("mkldnn::_linear_pointwise",
              aoti_torch_cpu__linear_pointwise(rows.get(), weight.get(), bias.has_value() ? &added : nullptr, "none",
                                               nullptr, 0, &algorithm, &y));
  return Tensor(y);
}

Tensor transpose(const Tensor& x) { return torch::stable::transpose(x, 0, 1); }

bool has_dense_rows(const Tensor& w) { return w.size(1) <= 1 || w.stride(1) == 1; }

constexpr int64_t kGemvGrain = 1 << 16;  // weights that are worth a thread of their own

void gemv_into(const Tensor& x, const Tensor& w, const OptionalTensor& bias, Tensor& y) {
  const Tensor inputs = dense(x);
  const Tensor added = bias.has_value() ? dense(*bias) : inputs;
  std::vector<float> wide(numel_of(inputs));
  widen(static_cast<const Bfloat16*>(inputs.const_data_ptr()), wide.data(), wide.size());
  Gemv product{};
  product.x = wide.data();
  product.w = static_cast<const Bfloat16*>(w.const_data_ptr());
  product.w_stride = w.stride(0);
  product.bias = bias.has_value() ? static_cast<const Bfloat16*>(added.const_data_ptr()) : nullptr;
  product.y = static_cast<Bfloat16*>(y.mutable_data_ptr());
  product.M = static_cast<size_t>(num_rows(x));
  product.N = static_cast<size_t>(w.size(0));
  product.K = static_cast<size_t>(w.size(1));
  const int64_t grain = std::max<int64_t>(kGemvGrain / w.size(1), 1);
  torch::stable::parallel_for(0, w.size(0), grain, [&](int64_t begin, int64_t end) {
    gemv(product, static_cast<size_t>(begin), static_cast<size_t>(end));
  });
}

Tensor gemv_linear(const Tensor& x, const Tensor& w, const OptionalTensor& bias) {
  Shape shape = shape_of(x);
  shape.back() = w.size(0);
  Tensor y = empty_of(x, shape);
  gemv_into(x, w, bias, y);
  return y;
}

EngineChoice choose_for_few_rows(int64_t M) {
  // Against ATen, one core (Zen 4), weights that the caches do not hold: 1.25 to 2.5 times as fast for one row, where
  // it reads the weights at 11 to 18 GB/s; 1.14 to 1.6 times for two to four. Without AVX-512 the sums of four rows do
  // not fit the registers.
  if (M == 1) return {Engine::Gemv, "rule: one row in bf16, bound by memory"};
  if (M <= static_cast<int64_t>(kMostGemvRows) && cpu().load().avx512) {
    return {Engine::Gemv, "rule: few rows in bf16, AVX-512"};
  }
  return {Engine::Aten, "rule: bf16 of many rows; aten calls oneDNN itself where it can"};
}

}  // namespace

const char* name_of(Engine engine) {
  switch (engine) {
    case Engine::OneDnn: return "onednn";
    case Engine::Gemv: return "gemv";
    default: return "aten";
  }
}

Engine engine_of(const std::string& name) {
  for (Engine engine : {Engine::Aten, Engine::OneDnn, Engine::Gemv}) {
    if (name == name_of(engine)) return engine;
  }
  throw std::invalid_argument(concat("engine must be aten, onednn or gemv, got '", name, "'"));
}

bool takes(Engine engine, DType dtype, int64_t M, int64_t N, int64_t K) {
  if (engine == Engine::Aten) return true;
  if (M <= 0 || N <= 0 || K <= 0) return false;
  if (engine == Engine::OneDnn) return onednn_available && dtype == DType::F32;
  return M <= static_cast<int64_t>(kMostGemvRows) && dtype == DType::BF16;
}

void set_onednn_available(bool available) {
  onednn_available = available && &aoti_torch_cpu__linear_pointwise != nullptr;
}

void assume_cpu(std::optional<Cpu> other) { cpu() = other.value_or(found_cpu()); }

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
  if (dtype != DType::F32 && dtype != DType::BF16) return {Engine::Aten, "only fp32 and bf16 have several engines"};
  if (M == 0 || N == 0 || K == 0) return {Engine::Aten, "nothing to multiply"};
  if (measured().any) {
    std::lock_guard<std::mutex> lock(measured().mutex);
    const auto found = measured().engines.find({dtype, M, N, K});
    if (found != measured().engines.end() && takes(found->second, dtype, M, N, K)) {
      return {found->second, "measured on this machine"};
    }
  }
  if (dtype == DType::BF16) return choose_for_few_rows(M);
  if (!onednn_available) return {Engine::Aten, "this torch has no oneDNN"};
  // oneDNN against MKL, one core each. Zen 4: 1.3 to 1.9 times as fast from 16 rows on. Zen 3, which has no
  // AVX-512: 1.2 to 1.6 times at 4 to 64 rows and weights that the caches do not hold, 1.1 at 128, behind from 256 on
  // and for small weights.
  constexpr int64_t kLargeWeights = int64_t{4} << 20;
  const Cpu here = cpu();
  if (!here.amd) return {Engine::Aten, "rule: not an AMD core"};
  if (here.avx512) {
    if (M < 8) return {Engine::Aten, "rule: few rows, bound by memory"};
    return {Engine::OneDnn, "rule: oneDNN beats MKL on AMD cores with AVX-512 from 8 rows on"};
  }
  if (N * K < kLargeWeights) return {Engine::Aten, "rule: AMD core without AVX-512, weights fit the caches"};
  if (M < 4 || M > 128) return {Engine::Aten, "rule: AMD core without AVX-512, not 4 to 128 rows"};
  return {Engine::OneDnn, "rule: AMD core, large weights, 4 to 128 rows"};
}

Engine engine_for(const Tensor& x, const Tensor& w) {
  const Engine engine = choose_engine(dtype_of(x), num_rows(x), w.size(0), w.size(1)).engine;
  return engine == Engine::Gemv && !has_dense_rows(w) ? Engine::Aten : engine;
}

Tensor linear_by(Engine engine, const Tensor& x, const Tensor& w, const OptionalTensor& bias) {
  if (engine == Engine::OneDnn) return onednn_linear(x, w, bias);
  if (engine == Engine::Gemv) return gemv_linear(x, w, bias);
  return call("aten::linear", "", x, w, bias);
}

Tensor linear(const Tensor& x, const Tensor& w, const OptionalTensor& bias) {
  const Tensor y = dense(linear_by(engine_for(x, w), x, w, bias));
  // Of more than two dims, aten and oneDNN make a view of rows, and autograd forbids to modify that in place.
  return y.dim() == 2 ? y : call("aten::_unsafe_view", "", y, shape_of(y));
}

void linear_into(Engine engine, const Tensor& x, const Tensor& w, Tensor& y) {
  if (engine == Engine::Gemv) return gemv_into(x, w, std::nullopt, y);
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
