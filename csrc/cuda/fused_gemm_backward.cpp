// The gradients of the fused GEMMs. Sums and gathers run beside the products that do not need them.
#include "row_parts.h"
#include "torch_side/fused_gemm.h"

namespace tpk {
namespace {

using cuda::data_of;
using cuda::product_into;
using cuda::rows_of;

// dx, dw and db of y = x @ w.T + b; what is not needed stays empty.
struct LocalGradients {
  bool need_x, need_w, need_b;
  Tensor dx, dw, db;

  LocalGradients(const Tensor& dy, bool need_x, bool need_w, bool need_b)
      : need_x(need_x), need_w(need_w), need_b(need_b), dx(nothing(dy)), dw(nothing(dy)), db(nothing(dy)) {}
  Gradients all() const { return {dx, dw, db}; }

  // Returns dx, of the rows that dy has.
  const Tensor& input(const Tensor& dy, const Tensor& w) {
    if (!need_x) return dx;
    Shape shape = shape_of(dy);
    shape.back() = w.size(1);
    dx = fresh_output(dy, shape);
    product_into(as_rows(dy), w, as_rows(dx));
    return dx;
  }
  void others(const Tensor& dy, const Tensor& x) {
    if (need_w) {
      dw = fresh_output(dy, {dy.size(dy.dim() - 1), x.size(x.dim() - 1)});
      product_into(cuda::transpose(as_rows(dy)), as_rows(x), dw);
    }
    if (need_b) {
      db = fresh_output(dy, {dy.size(dy.dim() - 1)});
      cuda::sum_rows_into(as_rows(dy), db);
    }
  }
};

}  // namespace

Gradients linear_backward(const Tensor& dy, const Tensor& x, const Tensor& w, bool need_x, bool need_w, bool need_b,
                          Text group) {
  find_communicator(group, "linear_backward");  // nothing is sent, but a group that was closed is refused
  LocalGradients gradients(dy, need_x, need_w, need_b);
  gradients.input(dy, w);
  gradients.others(dy, x);
  return gradients.all();
}

Gradients replicated_gemm_backward(const Tensor& dy, const Tensor& x, const Tensor& w_shard, bool need_x, bool need_w,
                                   bool need_b, Text group, int64_t world_size, Text codec) {
  constexpr Op op = Op::ReplicatedGemmBackward;
  const auto comm = cuda::device_communicator_of(op, group, world_size);
  LocalGradients gradients(dy, need_x, need_w, need_b);
  const auto others = [&] { gradients.others(dy, x); };
  if (need_x) {
    const Wire& wire = wire_for(op, dy, codec);
    const Tensor& dx = gradients.input(dy, w_shard);
    comm->all_reduce_beside(spec_of(op, wire, numel_of(dx), shape_of(dx)), wire, data_of(dx), numel_of(dx), others);
  } else {
    others();
  }
  return gradients.all();
}

Gradients gemm_reduce_scatter_backward(const Tensor& dy_shard, const Tensor& x_shard, const Tensor& w_shard,
                                       bool need_x, bool need_w, bool need_b, Text group, int64_t world_size,
                                       int64_t dim, int64_t dim_size, Text codec) {
  constexpr Op op = Op::GemmReduceScatterBackward;
  const auto comm = cuda::device_communicator_of(op, group, world_size);
  const Wire& wire = wire_for(op, dy_shard, codec);
  if (dim != 0 || dim_size < 0) {
    const Tensor dy = all_gather_dim(op, *comm, wire, dy_shard, dim, dim_size);
    return linear_backward(dy, x_shard, w_shard, need_x, need_w, need_b, std::move(group));
  }
  const cuda::RowGather gather(op, *comm, wire, dy_shard, dim_size);
  const cuda::RowParts parts = gather.parts();
  LocalGradients gradients(dy_shard, need_x, need_w, need_b);
  const Tensor dy = gather.rows();
  if (need_x) {  // x_shard is here only if need_w
    Shape shape = shape_of(dy_shard);
    shape.front() = dim_size;
    shape.back() = w_shard.size(1);
    gradients.dx = fresh_output(dy_shard, shape);
  }
  const Tensor dx = need_x ? as_rows(gradients.dx) : gradients.dx;
  comm->receive_and_consume(
      op, parts.count(), [&](int i) { gather.send(parts.stretch(i)); },
      [&](int i) {
        if (!need_x) return;
        parts.each_range(i, [&](int64_t from, int64_t count) {
          product_into(rows_of(dy, from, count), w_shard, rows_of(dx, from, count));
        });
      });
  gradients.others(gather.whole(), x_shard);
  return gradients.all();
}

Gradients all_gather_gemm_backward(const Tensor& dy, const Tensor& x_shard, const Tensor& w_shard, bool need_x,
                                   bool need_w, bool need_b, Text group, int64_t world_size, int64_t rank, int64_t dim,
                                   int64_t dim_size, Text codec, Text grad_codec) {
  constexpr Op op = Op::AllGatherGemmBackward;
  const auto comm = cuda::device_communicator_of(op, group, world_size);
  check_rank(name_of(op), *comm, rank);
  const Wire& x_wire = wire_for(op, x_shard, codec);
  const Wire& dx_wire = wire_for(op, dy, grad_codec);
  LocalGradients gradients(dy, need_x, need_w, need_b), partial(dy, need_x, false, false);
  if (dim != 0 || dim_size < 0) {
    gradients.others(dy, need_w ? all_gather_dim(op, *comm, x_wire, x_shard, dim, dim_size) : x_shard);
    partial.input(dy, w_shard);
    if (need_x) gradients.dx = reduce_scatter_dim(op, *comm, dx_wire, partial.dx, dim);
    return gradients.all();
  }
  // x is gathered again instead of kept (that is the memory that sequence parallelism saves), beside the partial dx;
  // that is summed beside dw.
  const auto partial_input = [&] { partial.input(dy, w_shard); };
  Tensor x = nothing(dy);
  if (need_w) {
    const cuda::RowGather gather(op, *comm, x_wire, x_shard, dim_size);
    x = gather.whole();
    comm->send_beside(op, [&](int) { gather.send_all(); }, partial_input);
  } else {
    partial_input();
  }
  const auto others = [&] { gradients.others(dy, x); };
  if (!need_x) {
    others();
    return gradients.all();
  }
  Shape dx_shape = shape_of(partial.dx);
  const CutCall scatter = reduce_scatter_call(op, dx_wire, dx_shape.data(), dx_shape.size(), dim, *comm);
  dx_shape[0] = scatter.rows;
  gradients.dx = fresh_output(dy, dx_shape);
  comm->send_beside(
      op,
      [&](int) {
        comm->send_reduce_scatter(scatter.spec, dx_wire, data_of(partial.dx), data_of(gradients.dx), scatter.cut,
                                  cuda::Stretch::all(scatter.cut));
      },
      others);
  return gradients.all();
}

}  // namespace tpk
