// Packing of tensors outside collectives, as gradient aggregation uses it (schemas and formulas in ops.cpp).
#pragma once

#include "tensor.h"

namespace tpk {

Tensor compress(const Tensor& x, std::string codec);
Tensor decompress(const Tensor& wire, std::vector<int64_t> shape, ScalarType dtype, std::string codec);
Tensor compress_with_feedback(const Tensor& x, Tensor residual, std::string codec, double scale);

}  // namespace tpk
