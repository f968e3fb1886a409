// The residual add and RMSNorm after an all-reduce, its gradient, and the squared norm of gradients (schemas in
// schemas.cpp).
#pragma once

#include <tuple>

#include "tensor.h"

namespace tpk {

std::tuple<Tensor, Tensor, Tensor> all_reduce_add_rms_norm(const Tensor& x, const Tensor& residual,
                                                           const Tensor& weight, Text group, int64_t world_size,
                                                           double eps, Text codec);
std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& dy, OptionalTensor dresidual_out, const Tensor& residual_out,
                                             const Tensor& weight, const Tensor& inverse_rms, bool need_r, bool need_w);
Tensor squared_norm(std::vector<Tensor> xs);

}  // namespace tpk
