// Residual add and RMSNorm after an all-reduce, its gradient, and the squared norm, on a device.
#include "torch_side/norm.h"

#include <algorithm>

#include "row_parts.h"

namespace tpk {
namespace {

using cuda::current_stream;

// Blocks that add up what is summed over tokens or tensors. A function of nothing but the size, so that ranks and runs
// add in the same order.
constexpr int64_t kValuesPerBlock = 1 << 16;
constexpr int64_t kMostBlocks = 256;

int blocks_for(int64_t values) {
  return static_cast<int>(std::clamp<int64_t>((values + kValuesPerBlock - 1) / kValuesPerBlock, 1, kMostBlocks));
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> all_reduce_add_rms_norm(const Tensor& x, const Tensor& residual,
                                                           const Tensor& weight, Text group, int64_t world_size,
                                                           double eps, Text codec) {
  constexpr Op op = Op::AllReduceAddRmsNorm;
  const auto comm = cuda::device_communicator_of(op, group, world_size);
  check_add_norm(name_of(op), shape_of(x), shape_of(residual), shape_of(weight));
  TPK_CHECK(x.scalar_type() == residual.scalar_type() && x.scalar_type() == weight.scalar_type(), name_of(op),
            ": x, residual and weight must have the same dtype");
  const Wire& wire = wire_for(op, x, codec);
  const DType dtype = float_dtype_of(name_of(op), x);
  const Tensor in = dense(x), from = dense(residual), scale = dense(weight);
  Tensor residual_out = fresh_output(in, shape_of(in));
  const Tensor y = fresh_output(in, shape_of(in));
  Shape rows = shape_of(in);
  rows.pop_back();
  const Tensor inverse_rms = empty_of(in, rows, sum_type_of(in));
  const cuda::AddNorm args{in.const_data_ptr(),
                           from.const_data_ptr(),
                           scale.const_data_ptr(),
                           y.mutable_data_ptr(),
                           residual_out.mutable_data_ptr(),
                           inverse_rms.mutable_data_ptr(),
                           numel_of(inverse_rms),
                           numel_of(scale),
                           eps};
  const CallSpec spec = spec_of(op, wire, numel_of(in), shape_of(in));
  if (!comm->add_norm(spec, wire, args)) {
    comm->all_reduce(spec, wire, args.x, args.residual_out, numel_of(in));
    TPK_CUDA_CHECK(cuda::launch_add_rms_norm(dtype, args.residual_out, args.residual, args.weight, args.y,
                                             args.residual_out, args.inverse_rms, args.tokens, args.width, args.eps,
                                             current_stream()));
  }
  return {y, residual_out, inverse_rms};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& dy, OptionalTensor dresidual_out, const Tensor& residual_out,
                                             const Tensor& weight, const Tensor& inverse_rms, bool need_r,
                                             bool need_w) {
  const char* const op = "rms_norm_backward";
  check_add_norm(op, shape_of(residual_out), shape_of(dy), shape_of(weight));
  const DType dtype = float_dtype_of(op, residual_out);
  const Tensor g = dense(dy), r = dense(residual_out), scale = dense(weight), inverse = dense(inverse_rms);
  const OptionalTensor from_above = dresidual_out.has_value() ? OptionalTensor(dense(*dresidual_out)) : dresidual_out;
  const Tensor dr = need_r ? fresh_output(r, shape_of(r)) : nothing(r);
  const Tensor dweight = need_w ? empty_of(scale, shape_of(scale)) : nothing(scale);
  const int blocks = blocks_for(r.numel());
  const Tensor partial = need_w ? empty_of(scale, {blocks, scale.numel()}, sum_type_of(scale)) : nothing(scale);
  TPK_CUDA_CHECK(cuda::launch_rms_norm_backward(
      dtype, g.const_data_ptr(), from_above.has_value() ? from_above->const_data_ptr() : nullptr, r.const_data_ptr(),
      scale.const_data_ptr(), inverse.const_data_ptr(), need_r ? dr.mutable_data_ptr() : nullptr,
      need_w ? partial.mutable_data_ptr() : nullptr, need_w ? dweight.mutable_data_ptr() : nullptr, numel_of(inverse),
      numel_of(scale), blocks, current_stream()));
  return {dr, dweight};
}

Tensor squared_norm(std::vector<Tensor> xs) {
  TPK_CHECK(!xs.empty(), "squared_norm: xs must have a tensor at least, got none");
  const Tensor total = empty_of(xs.front(), {}, ScalarType::Double);
  TPK_CUDA_CHECK(cudaMemsetAsync(total.mutable_data_ptr(), 0, sizeof(double), current_stream()));
  std::vector<Tensor> packed;
  for (const Tensor& x : xs) packed.push_back(dense(x));
  for (size_t first = 0; first < packed.size();) {
    const DType dtype = float_dtype_of("squared_norm", packed[first]);
    cuda::TensorList list{};
    int64_t values = 0;
    for (; first < packed.size() && list.count < cuda::TensorList::kMax && dtype_of(packed[first]) == dtype; ++first) {
      list.data[list.count] = packed[first].const_data_ptr();
      list.numel[list.count++] = numel_of(packed[first]);
      values += packed[first].numel();
    }
    const int blocks = blocks_for(values);
    const Tensor partial = empty_of(total, {blocks});
    TPK_CUDA_CHECK(cuda::launch_squared_norm(dtype, list, static_cast<double*>(partial.mutable_data_ptr()),
                                             static_cast<double*>(total.mutable_data_ptr()), blocks, current_stream()));
  }
  return total;
}

}  // namespace tpk
