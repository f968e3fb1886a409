#include "gemm.h"

#include <algorithm>

#include "cpu/parallel.h"

// torch's own entry to its oneDNN linear for compiled programs; absent where torch has no oneDNN. As an op,
// mkldnn::_linear_pointwise, it takes two strings, and loses them at each call (torch_side/text.h).
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_cpu__linear_pointwise(  // NOLINT: the name is torch's
    AtenTensorHandle x, AtenTensorHandle w, AtenTensorHandle* bias, const char* attr, const double** scalars,
    int64_t num_scalars, const char** algorithm, AtenTensorHandle* y);

namespace tpk {
namespace {

// Whether no two elements of x can be at one address; oneDNN has no format for strides that cross. It takes zero
// strides.
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
  // oneDNN takes strides of x and w into account, but reads the bias as dense. Where w has gaps it takes its reference
  // loop, which is a thousand times slower (64x256x256: 110 ms in place of 0.1, torch 2.13).
  const Tensor packed = bias.has_value() ? dense(*bias) : x;
  const Tensor rows = is_laid_out(x) ? x : dense(x);
  const Tensor weight = transpose(w).is_contiguous() ? w : dense(w);
  AtenTensorHandle added = packed.get(), y = nullptr;
  const char* algorithm = "";
  check_torch("mkldnn::_linear_pointwise",
              aoti_torch_cpu__linear_pointwise(rows.get(), weight.get(), bias.has_value() ? &added : nullptr, "none",
                                               nullptr, 0, &algorithm, &y));
  return Tensor(y);
}

bool has_dense_rows(const Tensor& w) { return w.size(1) <= 1 || w.stride(1) == 1; }

constexpr size_t kGemvGrain = 1 << 16;  // weights that are worth a thread of their own

// Memory for the packed x of a product, kept by each thread: a decoding step asks for it hundreds of times.
void* packed_memory(size_t bytes) {
  constexpr size_t kAlignment = 64;
  thread_local std::vector<char> kept;
  if (kept.size() < bytes + kAlignment) kept.resize(bytes + kAlignment);
  const auto address = reinterpret_cast<uintptr_t>(kept.data());
  return reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment * kAlignment);
}

void gemv_into(const Tensor& x, const Tensor& w, const OptionalTensor& bias, Tensor& y) {
  const Tensor inputs = dense(x);
  const Tensor added = bias.has_value() ? dense(*bias) : inputs;
  Gemv product{};
  product.x = inputs.const_data_ptr();
  product.w = in_memory(w).const_data_ptr();
  product.w_stride = w.stride(0);
  product.bias = bias.has_value() ? added.const_data_ptr() : nullptr;
  product.y = y.mutable_data_ptr();
  product.M = static_cast<size_t>(num_rows(x));
  product.N = static_cast<size_t>(w.size(0));
  product.K = static_cast<size_t>(w.size(1));
  multiply_few_rows(dtype_of(x), product);
}

Tensor gemv_linear(const Tensor& x, const Tensor& w, const OptionalTensor& bias) {
  Shape shape = shape_of(x);
  shape.back() = w.size(0);
  Tensor y = empty_of(x, shape);
  gemv_into(x, w, bias, y);
  return y;
}

Tensor linear_by(Engine engine, const Tensor& x, const Tensor& w, const OptionalTensor& bias) {
  if (engine == Engine::OneDnn) return onednn_linear(x, w, bias);
  if (engine == Engine::Gemv) return gemv_linear(x, w, bias);
  return call("aten::linear", "", x, w, bias);
}

}  // namespace

bool has_onednn_linear() { return &aoti_torch_cpu__linear_pointwise != nullptr; }

Engine engine_for(const Communicator& comm, const Tensor& x, const Tensor& w) {
  const GemmShape shape{dtype_of(x), num_rows(x), w.size(0), w.size(1)};
  const Engine engine = choose_engine(comm.measured_engines(), shape).engine;
  return engine == Engine::Gemv && !has_dense_rows(w) ? Engine::Aten : engine;
}

void multiply_few_rows(DType dtype, const Gemv& product) {
  const GemvPath& path = gemv_paths(dtype).front();
  void* const packed = packed_memory(gemv_packed_bytes(product.M, product.K));
  path.pack(product, packed);
  in_parallel(product.N, kGemvGrain / product.K,
              [&](size_t begin, size_t end) { path.multiply(product, packed, begin, end); });
}

Tensor linear(const Communicator& comm, const Tensor& x, const Tensor& w, const OptionalTensor& bias) {
  const Tensor y = dense(linear_by(engine_for(comm, x, w), x, w, bias));
  // Of more than two dims, aten and oneDNN make a view of rows, and autograd forbids to modify that in place.
  return y.dim() == 2 ? y : call("aten::_unsafe_view", "", y, shape_of(y));
}

Tensor product_by(Engine engine, const Tensor& x, const Tensor& w, const OptionalTensor& bias) {
  return dense(linear_by(engine, x, w, bias));
}

void linear_into(Engine engine, const Tensor& x, const Tensor& w, Tensor& y) {
  if (engine == Engine::Gemv) return gemv_into(x, w, std::nullopt, y);
  Tensor rows = as_rows(y);
  call("aten::mm", "out", as_rows(x), transpose(w), rows);
}

Tensor grad_input(const Communicator& comm, const Tensor& dy, const Tensor& w) {
  return linear(comm, dy, transpose(w), std::nullopt);
}

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
