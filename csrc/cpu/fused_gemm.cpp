// On the CPU a rank multiplies and communicates with the same cores, so on one host "fused" means: the sum goes back
// into the GEMM's own output, the bias is inside the GEMM of rank 0, and in the backward the gradient of x is under way
// while the gradient of w is computed. A product written straight into the arena was not faster on any CPU (DESIGN.md).
// Between hosts the link is busy while the cores are: chunked_gemm.h.
#include "torch_side/fused_gemm.h"

#include "chunked_gemm.h"
#include "torch_side/collectives.h"

namespace tpk {
namespace {

// The chunks of y = x @ w.T.
ChunkCut chunks_of_product(const Communicator& comm, const Wire& wire, const Tensor& x, const Tensor& w, int shares) {
  return chunks_of_sum(comm, wire, static_cast<size_t>(num_rows(x)), static_cast<size_t>(w.size(0)), shares);
}

Gradients local_gradients(const Communicator& comm, const Tensor& dy, const Tensor& x, const Tensor& w, bool need_x,
                          bool need_w, bool need_b) {
  return {need_x ? grad_input(comm, dy, w) : nothing(dy), need_w ? grad_weight(dy, x) : nothing(dy),
          need_b ? grad_bias(dy) : nothing(dy)};
}

}  // namespace

Tensor gemm_all_reduce(const Tensor& x_shard, const Tensor& w_shard, OptionalTensor bias, Text group,
                       int64_t world_size, Text codec) {
  const auto comm = communicator_of(Op::GemmAllReduce, group, world_size);
  check_linear(Op::GemmAllReduce, x_shard, w_shard, bias);
  const Wire& wire = wire_for(Op::GemmAllReduce, x_shard, codec);
  const OptionalTensor rank_bias = bias_of_rank(*comm, bias);
  const ChunkCut cut = chunks_of_product(*comm, wire, x_shard, w_shard, 2);
  if (cut.ends.size() > 1) {
    return all_reduce_product(Op::GemmAllReduce, *comm, wire, x_shard, w_shard, rank_bias, cut, [] {});
  }
  Tensor y = linear(*comm, x_shard, w_shard, rank_bias);
  all_reduce_into(Op::GemmAllReduce, *comm, wire, y, y);
  return y;
}

Tensor gemm_reduce_scatter(const Tensor& x_shard, const Tensor& w_shard, OptionalTensor bias, Text group,
                           int64_t world_size, int64_t rank, int64_t dim, Text codec, Text) {
  const auto comm = communicator_of(Op::GemmReduceScatter, group, world_size);
  check_linear(Op::GemmReduceScatter, x_shard, w_shard, bias);
  check_token_dim("gemm_reduce_scatter", shape_of(x_shard), dim);
  check_rank("gemm_reduce_scatter", *comm, rank);
  const Wire& wire = wire_for(Op::GemmReduceScatter, x_shard, codec);
  const OptionalTensor rank_bias = bias_of_rank(*comm, bias);
  if (comm->cuts_parts() && cuts_rows(x_shard, dim) &&
      chunks_of_product(*comm, wire, x_shard, w_shard, 1).ends.size() > 1) {
    return reduce_scatter_product(Op::GemmReduceScatter, *comm, wire, x_shard, w_shard, rank_bias, dim);
  }
  const Tensor partial = linear(*comm, x_shard, w_shard, rank_bias);
  return reduce_scatter_dim(Op::GemmReduceScatter, *comm, wire, partial, dim);
}

Tensor all_gather_gemm(const Tensor& x_shard, const Tensor& w_shard, OptionalTensor bias, Text group,
                       int64_t world_size, int64_t rank, int64_t dim, int64_t dim_size, Text codec, Text) {
  const auto comm = communicator_of(Op::AllGatherGemm, group, world_size);
  check_rank("all_gather_gemm", *comm, rank);
  check_linear(Op::AllGatherGemm, x_shard, w_shard, bias);
  check_token_dim("all_gather_gemm", shape_of(x_shard), dim);
  const Wire& wire = wire_for(Op::AllGatherGemm, x_shard, codec);
  const std::vector<size_t> ends = gathered_ends_of(*comm, wire, x_shard, w_shard, dim, dim_size);
  if (!ends.empty()) {
    return product_of_gathered(Op::AllGatherGemm, *comm, wire, x_shard, w_shard, bias, dim, dim_size, ends).y;
  }
  const Tensor x = all_gather_dim(Op::AllGatherGemm, *comm, wire, x_shard, dim, dim_size);
  return linear(*comm, x, w_shard, bias);
}

Tensor replicated_gemm(const Tensor& x, const Tensor& w_shard, OptionalTensor bias, Text group, int64_t, Text) {
  const auto comm = find_communicator(group, "replicated_gemm");  // nothing is sent; it has the engines
  check_linear(Op::ReplicatedGemmBackward, x, w_shard, bias);
  return linear(*comm, x, w_shard, bias);
}

Gradients linear_backward(const Tensor& dy, const Tensor& x, const Tensor& w, bool need_x, bool need_w, bool need_b,
                          Text group) {
  return local_gradients(*find_communicator(group, "linear_backward"), dy, x, w, need_x, need_w, need_b);
}

Gradients replicated_gemm_backward(const Tensor& dy, const Tensor& x, const Tensor& w_shard, bool need_x, bool need_w,
                                   bool need_b, Text group, int64_t world_size, Text codec) {
  const auto comm = communicator_of(Op::ReplicatedGemmBackward, group, world_size);
  const Wire& wire = wire_for(Op::ReplicatedGemmBackward, dy, codec);
  Tensor dw = nothing(dy), db = nothing(dy);
  const bool beside = need_x && is_for_thread(*comm, wire, static_cast<size_t>(num_rows(dy) * w_shard.size(1)));
  const auto meanwhile = [&] {
    if (need_w) dw = beside ? grad_weight_in_steps(*comm, dy, x) : grad_weight(dy, x);
    if (need_b) db = grad_bias(dy);
  };
  if (!need_x) {
    meanwhile();
    return {nothing(dy), dw, db};
  }
  const ChunkCut cut = chunks_of_product(*comm, wire, dy, transpose(w_shard), 2);
  if (cut.ends.size() > 1) {
    Tensor dx = all_reduce_product(Op::ReplicatedGemmBackward, *comm, wire, dy, transpose(w_shard), {}, cut, meanwhile);
    return {dx, dw, db};
  }
  Tensor dx = grad_input(*comm, dy, w_shard);
  comm->all_reduce_beside(spec_of(Op::ReplicatedGemmBackward, wire, numel_of(dx), shape_of(dx)), wire,
                          dx.mutable_data_ptr(), numel_of(dx), meanwhile);
  return {dx, dw, db};
}

Gradients gemm_reduce_scatter_backward(const Tensor& dy_shard, const Tensor& x_shard, const Tensor& w_shard,
                                       bool need_x, bool need_w, bool need_b, Text group, int64_t world_size,
                                       int64_t dim, int64_t dim_size, Text codec) {
  const auto comm = communicator_of(Op::GemmReduceScatterBackward, group, world_size);
  const Wire& wire = wire_for(Op::GemmReduceScatterBackward, dy_shard, codec);
  const Tensor w = transpose(w_shard);
  const std::vector<size_t> ends = gathered_ends_of(*comm, wire, dy_shard, w, dim, dim_size);
  if (need_x && !ends.empty()) {
    const auto [dy, dx] =
        product_of_gathered(Op::GemmReduceScatterBackward, *comm, wire, dy_shard, w, {}, dim, dim_size, ends);
    const auto [none, dw, db] = local_gradients(*comm, dy, x_shard, w_shard, false, need_w, need_b);
    return {dx, dw, db};
  }
  const Tensor dy = all_gather_dim(Op::GemmReduceScatterBackward, *comm, wire, dy_shard, dim, dim_size);
  return local_gradients(*comm, dy, x_shard, w_shard, need_x, need_w, need_b);
}

Gradients all_gather_gemm_backward(const Tensor& dy, const Tensor& x_shard, const Tensor& w_shard, bool need_x,
                                   bool need_w, bool need_b, Text group, int64_t world_size, int64_t rank, int64_t dim,
                                   int64_t dim_size, Text codec, Text grad_codec) {
  const auto comm = communicator_of(Op::AllGatherGemmBackward, group, world_size);
  check_rank("all_gather_gemm_backward", *comm, rank);
  const Wire& x_wire = wire_for(Op::AllGatherGemmBackward, x_shard, codec);
  const Wire& dx_wire = wire_for(Op::AllGatherGemmBackward, dy, grad_codec);
  Tensor dx = nothing(dy), dw = nothing(dy);
  // x is gathered again instead of kept: what sequence parallelism saves is this memory.
  const bool beside = need_x && need_w && dim_size >= 0 && comm->cuts_parts() && cuts_rows(dy, dim) &&
                      is_for_thread(*comm, x_wire, static_cast<size_t>(num_rows(dy) * w_shard.size(1)));
  if (beside) {
    const Work product = [&] { dx = grad_input_in_steps(*comm, dy, w_shard); };
    const Tensor x = all_gather_beside(Op::AllGatherGemmBackward, *comm, x_wire, x_shard, dim, dim_size, product);
    const Work product_of_x = [&] { dw = grad_weight_in_steps(*comm, dy, x); };
    dx = reduce_scatter_beside(Op::AllGatherGemmBackward, *comm, dx_wire, dx, dim, product_of_x);
  } else {
    if (need_w) {
      dw = grad_weight(dy, all_gather_dim(Op::AllGatherGemmBackward, *comm, x_wire, x_shard, dim, dim_size));
    }
    if (need_x) {
      dx = reduce_scatter_dim(Op::AllGatherGemmBackward, *comm, dx_wire, grad_input(*comm, dy, w_shard), dim);
    }
  }
  return {dx, dw, need_b ? grad_bias(dy) : nothing(dy)};
}

}  // namespace tpk
