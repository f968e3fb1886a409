// Packing of tensors outside collectives, and of what is packed already into them, as gradient aggregation uses it
// (schemas and formulas in ops.cpp).
#pragma once

#include "tensor.h"

namespace tpk {

Tensor compress(const Tensor& x, std::string codec);
Tensor decompress(const Tensor& wire, std::vector<int64_t> shape, ScalarType dtype, std::string codec);
Tensor compress_with_feedback(const Tensor& x, Tensor residual, std::string codec, double scale);
Tensor all_reduce_packed(const Tensor& wire, std::vector<int64_t> shape, ScalarType dtype, std::string group,
                         int64_t world_size, std::string op, std::string codec);
Tensor reduce_scatter_packed(const Tensor& wire, int64_t numel, ScalarType dtype, std::string group, int64_t world_size,
                             int64_t rank, std::string op, std::string codec);

}  // namespace tpk
