// Packing of tensors outside collectives, and of what is packed already into them, as gradient aggregation uses it
// (schemas and formulas in schemas.cpp).
#pragma once

#include "tensor.h"

namespace tpk {

Tensor compress(const Tensor& x, Text codec);
Tensor decompress(const Tensor& wire, std::vector<int64_t> shape, ScalarType dtype, Text codec);
Tensor compress_with_feedback(const Tensor& x, Tensor residual, Text codec, double scale);
Tensor all_reduce_packed(const Tensor& wire, std::vector<int64_t> shape, ScalarType dtype, Text group,
                         int64_t world_size, Text op, Text codec);
Tensor reduce_scatter_packed(const Tensor& wire, int64_t numel, ScalarType dtype, Text group, int64_t world_size,
                             int64_t rank, Text op, Text codec);

}  // namespace tpk
