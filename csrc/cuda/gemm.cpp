#include "gemm.h"

namespace tpk::cuda {
namespace {

// Around a product: no more multiprocessors than this thread's products may take.
class ProductLimit {
 public:
  ProductLimit() : limited_(product_multiprocessors() > 0) {
    if (limited_) limit_products(product_multiprocessors());
  }
  ~ProductLimit() {
    if (limited_) limit_products(0);
  }
  ProductLimit(const ProductLimit&) = delete;
  ProductLimit& operator=(const ProductLimit&) = delete;

 private:
  bool limited_;
};

}  // namespace

Tensor rows_of(const Tensor& x, int64_t start, int64_t count) {
  Tensor whole = x;
  return kept(torch::stable::narrow(whole, 0, start, count));
}

Tensor transpose(const Tensor& x) { return kept(torch::stable::transpose(x, 0, 1)); }

void linear_into(const Tensor& x, const Tensor& w, const OptionalTensor& bias, const Tensor& y) {
  if (!bias.has_value()) return product_into(x, transpose(w), y);
  const ProductLimit limit;
  call_on_stream("aten::linear", "out", x, w, bias, y);
}

void product_into(const Tensor& x, const Tensor& w, const Tensor& y) {
  const ProductLimit limit;
  call_on_stream("aten::mm", "out", x, w, y);
}

void copy_on_stream(const Tensor& x, const Tensor& y) { call_on_stream("aten::copy_", "", y, x, true); }

void sum_rows_into(const Tensor& dy, const Tensor& db) {
  const std::vector<int64_t> tokens{0};
  call_on_stream("aten::sum", "IntList_out", dy, std::optional<std::vector<int64_t>>(tokens), false,
                 std::optional<ScalarType>(), db);
}

std::pair<Tensor, Tensor> sort_stably(const Tensor& x) {
  return made([x] {
    std::array<StableIValue, 4> stack{torch::stable::detail::from(x),
                                      torch::stable::detail::from(std::optional<bool>(true)),
                                      torch::stable::detail::from(int64_t{-1}), torch::stable::detail::from(false)};
    const Tensor values = call_op("aten::sort", "stable", stack.data());
    return std::pair<Tensor, Tensor>(values, torch::stable::detail::to<Tensor>(stack[1]));
  });
}

Tensor to_int64(const Tensor& x) {
  return made([x] { return torch::stable::to(x, ScalarType::Long); });
}

}  // namespace tpk::cuda
