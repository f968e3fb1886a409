// A sharded GEMM with the collective before or after it (schemas and formulas in schemas.cpp).
#pragma once

#include <tuple>

#include "tensor.h"

namespace tpk {

// The shape of y = x @ w.T + bias.
inline Shape check_linear(Op op, const Tensor& x, const Tensor& w, const OptionalTensor& bias) {
  const Shape bias_shape = bias.has_value() ? shape_of(*bias) : Shape{};
  const Shape y = linear_shape(name_of(op), shape_of(x), shape_of(w), bias.has_value() ? &bias_shape : nullptr);
  TPK_CHECK(x.scalar_type() == w.scalar_type() && (!bias.has_value() || bias->scalar_type() == x.scalar_type()),
            name_of(op), ": x, w and bias must have the same dtype");
  return y;
}

// The bias is added once over the ranks: rank 0 has it in its partial product.
inline OptionalTensor bias_of_rank(const Communicator& comm, const OptionalTensor& bias) {
  return comm.rank() == 0 ? bias : OptionalTensor();
}

using Gradients = std::tuple<Tensor, Tensor, Tensor>;  // of x, w, bias; an empty tensor where it is not needed

Tensor gemm_all_reduce(const Tensor& x_shard, const Tensor& w_shard, OptionalTensor bias, Text group,
                       int64_t world_size, Text codec);
Tensor gemm_reduce_scatter(const Tensor& x_shard, const Tensor& w_shard, OptionalTensor bias, Text group,
                           int64_t world_size, int64_t rank, int64_t dim, Text codec, Text grad_codec);
Tensor all_gather_gemm(const Tensor& x_shard, const Tensor& w_shard, OptionalTensor bias, Text group,
                       int64_t world_size, int64_t rank, int64_t dim, int64_t dim_size, Text codec, Text grad_codec);
Tensor replicated_gemm(const Tensor& x, const Tensor& w_shard, OptionalTensor bias, Text group, int64_t world_size,
                       Text codec);
Gradients linear_backward(const Tensor& dy, const Tensor& x, const Tensor& w, bool need_x, bool need_w, bool need_b,
                          Text group);
Gradients replicated_gemm_backward(const Tensor& dy, const Tensor& x, const Tensor& w_shard, bool need_x, bool need_w,
                                   bool need_b, Text group, int64_t world_size, Text codec);
Gradients gemm_reduce_scatter_backward(const Tensor& dy_shard, const Tensor& x_shard, const Tensor& w_shard,
                                       bool need_x, bool need_w, bool need_b, Text group, int64_t world_size,
                                       int64_t dim, int64_t dim_size, Text codec);
Gradients all_gather_gemm_backward(const Tensor& dy, const Tensor& x_shard, const Tensor& w_shard, bool need_x,
                                   bool need_w, bool need_b, Text group, int64_t world_size, int64_t rank, int64_t dim,
                                   int64_t dim_size, Text codec, Text grad_codec);

}  // namespace tpk
