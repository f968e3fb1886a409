// The gradients of the fused GEMMs. Sums and gathers run beside the products that do not need them; where path fused is
// chosen, the gradient of x and its collective are one kernel, which reads w transposed. Which gradients are wanted
// must be the same on all ranks.
#include "fused_path.h"
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

  // dx without its values, of so many items.
  const Tensor& fresh_input(const Tensor& dy, const Tensor& w, int64_t items) {
    Shape shape = shape_of(dy);
    shape.front() = items;
    shape.back() = w.size(1);
    return dx = fresh_output(dy, shape);
  }
  // Returns dx, of the rows that dy has.
  const Tensor& input(const Tensor& dy, const Tensor& w) {
    if (need_x) product_into(as_rows(dy), w, as_rows(fresh_input(dy, w, dy.size(0))));
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
    const Tensor dy_rows = as_rows(dy);
    if (cuda::takes_fused(*comm, op, wire, dy_rows.size(0), w_shard.size(1), dy_rows.size(1), need_w)) {
      const Tensor dx = gradients.fresh_input(dy, w_shard, dy.size(0));
      const Cut rows = Cut::even(static_cast<size_t>(dy_rows.size(0)), comm->world_size());
      cuda::reduce_fused(*comm, spec_of(op, wire, numel_of(dx), shape_of(dx)), dy_rows, cuda::transpose(w_shard), {},
                         rows, as_rows(dx));
      others();
      return gradients.all();
    }
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
  // x_shard is here only if need_w
  const Tensor dx = need_x ? as_rows(gradients.fresh_input(dy_shard, w_shard, dim_size)) : gradients.dx;
  if (need_x && cuda::takes_fused(*comm, op, wire, dy.size(0), dy.size(1), w_shard.size(1), need_w)) {
    cuda::gather_fused(*comm, gather.spec(), gather.mine(), dy, cuda::transpose(w_shard), {}, gather.cut(), dx);
    gradients.others(gather.whole(), x_shard);
    return gradients.all();
  }
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
  Tensor x = nothing(dy);
  const auto gather_beside = [&](const std::function<void()>& meanwhile) {
    if (!need_w) return meanwhile();
    const cuda::RowGather gather(op, *comm, x_wire, x_shard, dim_size);
    x = gather.whole();
    comm->send_beside(op, [&](int) { gather.send_all(); }, meanwhile);
  };
  const auto others = [&] { gradients.others(dy, x); };
  if (!need_x) {
    gather_beside([] {});
    others();
    return gradients.all();
  }
  Shape dx_shape = shape_of(dy);
  dx_shape.back() = w_shard.size(1);
  const CutCall scatter = reduce_scatter_call(op, dx_wire, dx_shape.data(), dx_shape.size(), dim, *comm);
  const Tensor dy_rows = as_rows(dy), dx = gradients.fresh_input(dy, w_shard, scatter.rows);
  if (cuda::takes_fused(*comm, op, dx_wire, dy_rows.size(0), w_shard.size(1), dy_rows.size(1), need_w)) {
    const Cut items = Cut::even(static_cast<size_t>(dim_size), comm->world_size());
    cuda::reduce_fused(*comm, scatter.spec, dy_rows, cuda::transpose(w_shard), {}, items.times(cuda::rows_in_item(dy)),
                       as_rows(dx));
    // Nothing is left to hide this behind: that kernel takes the whole device. Where dw is wanted the other way hides
    // both transfers behind products, so that this one is for a w that is frozen (a model, not measured).
    gather_beside([] {});
    others();
    return gradients.all();
  }
  gather_beside([&] { partial.input(dy, w_shard); });
  comm->send_beside(
      op,
      [&](int) {
        comm->send_reduce_scatter(scatter.spec, dx_wire, data_of(partial.dx), data_of(dx), scatter.cut,
                                  cuda::Stretch::all(scatter.cut));
      },
      others);
  return gradients.all();
}

}  // namespace tpk
