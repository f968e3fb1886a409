// On the CPU a rank multiplies and communicates with the same cores, so "fused" here means: no copy that is not needed
// (the GEMM writes into the arena, or the sum goes back into the GEMM's own output), the bias inside the GEMM of rank
// 0, and in the backward the gradient of x under way while the gradient of w is computed.
#include "torch_side/fused_gemm.h"

#include "core/arena.h"
#include "gemm.h"
#include "torch_side/collectives.h"

namespace tpk {
namespace {

// The partial product in the arena, or nothing when it does not fit or oneDNN, which makes its own output, is faster.
OptionalTensor product_in_arena(const Communicator& comm, const std::string& group, const Tensor& x, const Tensor& w,
                                bool has_bias, const Shape& y_shape) {
  const int64_t rows = num_rows(x);
  const size_t bytes = static_cast<size_t>(rows * w.size(0)) * x.element_size();
  // A bias would be added in a second step there, which rounds twice and gives other bits than the GEMM's own bias.
  if (has_bias) return {};
  if (bytes < kSmallestInArena || bytes > comm.heap_bytes() || x.size(x.dim() - 1) == 0) return {};
  const Engine engine = engine_for(x, w);
  if (engine == Engine::OneDnn) return {};
  OptionalTensor y;
  try {
    y = arena_empty(group, y_shape, x.scalar_type());
  } catch (const std::invalid_argument&) {
    return {};  // the heap is taken by tensors of group.empty; the copying way is right, too
  }
  linear_into(engine, x, w, *y);
  return y;
}

}  // namespace

Tensor gemm_all_reduce(const Tensor& x_shard, const Tensor& w_shard, OptionalTensor bias, Text group,
                       int64_t world_size, Text codec) {
  const auto comm = communicator_of(Op::GemmAllReduce, group, world_size);
  const Shape y_shape = check_linear(Op::GemmAllReduce, x_shard, w_shard, bias);
  const Wire& wire = wire_for(Op::GemmAllReduce, x_shard, codec);
  const OptionalTensor rank_bias = bias_of_rank(*comm, bias);
  if (wire.is_plain()) {
    const OptionalTensor partial = product_in_arena(*comm, group, x_shard, w_shard, bias.has_value(), y_shape);
    if (partial.has_value()) {
      Tensor y = fresh_output(x_shard, y_shape);
      all_reduce_into(Op::GemmAllReduce, *comm, wire, *partial, y);
      return y;
    }
  }
  Tensor y = linear(x_shard, w_shard, rank_bias);
  all_reduce_into(Op::GemmAllReduce, *comm, wire, y, y);
  return y;
}

Tensor gemm_reduce_scatter(const Tensor& x_shard, const Tensor& w_shard, OptionalTensor bias, Text group,
                           int64_t world_size, int64_t rank, int64_t dim, Text codec, Text) {
  const auto comm = communicator_of(Op::GemmReduceScatter, group, world_size);
  const Shape y_shape = check_linear(Op::GemmReduceScatter, x_shard, w_shard, bias);
  check_token_dim("gemm_reduce_scatter", shape_of(x_shard), dim);
  check_rank("gemm_reduce_scatter", *comm, rank);
  const Wire& wire = wire_for(Op::GemmReduceScatter, x_shard, codec);
  const OptionalTensor rank_bias = bias_of_rank(*comm, bias);
  OptionalTensor partial;
  if (wire.is_plain() && dim == 0) {
    partial = product_in_arena(*comm, group, x_shard, w_shard, bias.has_value(), y_shape);
  }
  if (!partial.has_value()) partial = linear(x_shard, w_shard, rank_bias);
  return reduce_scatter_dim(Op::GemmReduceScatter, *comm, wire, *partial, dim);
}

Tensor all_gather_gemm(const Tensor& x_shard, const Tensor& w_shard, OptionalTensor bias, Text group,
                       int64_t world_size, int64_t rank, int64_t dim, int64_t dim_size, Text codec, Text) {
  const auto comm = communicator_of(Op::AllGatherGemm, group, world_size);
  check_rank("all_gather_gemm", *comm, rank);
  check_linear(Op::AllGatherGemm, x_shard, w_shard, bias);
  check_token_dim("all_gather_gemm", shape_of(x_shard), dim);
  const Wire& wire = wire_for(Op::AllGatherGemm, x_shard, codec);
  const Tensor x = all_gather_dim(Op::AllGatherGemm, *comm, wire, x_shard, dim, dim_size);
  return linear(x, w_shard, bias);
}

Tensor replicated_gemm(const Tensor& x, const Tensor& w_shard, OptionalTensor bias, Text group, int64_t, Text) {
  find_communicator(group, "replicated_gemm");  // nothing is sent, but a shard is of no use without its group
  check_linear(Op::ReplicatedGemmBackward, x, w_shard, bias);
  return linear(x, w_shard, bias);
}

Gradients linear_backward(const Tensor& dy, const Tensor& x, const Tensor& w, bool need_x, bool need_w, bool need_b) {
  return {need_x ? grad_input(dy, w) : nothing(dy), need_w ? grad_weight(dy, x) : nothing(dy),
          need_b ? grad_bias(dy) : nothing(dy)};
}

Gradients replicated_gemm_backward(const Tensor& dy, const Tensor& x, const Tensor& w_shard, bool need_x, bool need_w,
                                   bool need_b, Text group, int64_t world_size, Text codec) {
  const auto comm = communicator_of(Op::ReplicatedGemmBackward, group, world_size);
  Tensor dw = nothing(dy), db = nothing(dy);
  const auto local_gradients = [&] {
    if (need_w) dw = grad_weight(dy, x);
    if (need_b) db = grad_bias(dy);
  };
  if (!need_x) {
    local_gradients();
    return {nothing(dy), dw, db};
  }
  const Wire& wire = wire_for(Op::ReplicatedGemmBackward, dy, codec);
  Tensor dx = grad_input(dy, w_shard);
  comm->all_reduce_beside(spec_of(Op::ReplicatedGemmBackward, wire, numel_of(dx), shape_of(dx)), wire,
                          dx.mutable_data_ptr(), numel_of(dx), local_gradients);
  return {dx, dw, db};
}

Gradients gemm_reduce_scatter_backward(const Tensor& dy_shard, const Tensor& x_shard, const Tensor& w_shard,
                                       bool need_x, bool need_w, bool need_b, Text group, int64_t world_size,
                                       int64_t dim, int64_t dim_size, Text codec) {
  const auto comm = communicator_of(Op::GemmReduceScatterBackward, group, world_size);
  const Wire& wire = wire_for(Op::GemmReduceScatterBackward, dy_shard, codec);
  const Tensor dy = all_gather_dim(Op::GemmReduceScatterBackward, *comm, wire, dy_shard, dim, dim_size);
  return linear_backward(dy, x_shard, w_shard, need_x, need_w, need_b);
}

Gradients all_gather_gemm_backward(const Tensor& dy, const Tensor& x_shard, const Tensor& w_shard, bool need_x,
                                   bool need_w, bool need_b, Text group, int64_t world_size, int64_t rank, int64_t dim,
                                   int64_t dim_size, Text codec, Text grad_codec) {
  const auto comm = communicator_of(Op::AllGatherGemmBackward, group, world_size);
  check_rank("all_gather_gemm_backward", *comm, rank);
  const Wire& x_wire = wire_for(Op::AllGatherGemmBackward, x_shard, codec);
  const Wire& dx_wire = wire_for(Op::AllGatherGemmBackward, dy, grad_codec);
  Tensor dx = nothing(dy), dw = nothing(dy);
  if (need_w) {  // gathered again instead of kept: what sequence parallelism saves is this memory
    dw = grad_weight(dy, all_gather_dim(Op::AllGatherGemmBackward, *comm, x_wire, x_shard, dim, dim_size));
  }
  if (need_x) dx = reduce_scatter_dim(Op::AllGatherGemmBackward, *comm, dx_wire, grad_input(dy, w_shard), dim);
  return {dx, dw, need_b ? grad_bias(dy) : nothing(dy)};
}

}  // namespace tpk
