// A sharded GEMM and its collective on a device: cut over the rows into parts, of which one is sent on the group's
// communication stream while the caller's stream multiplies the next (choose.h: how many; one part is the plain way).
// Products that peers read are written straight into the arena's heap where they fit, so that nothing is copied in.
//
// Where path fused is chosen all of this is one kernel (fused_path.h). Backwards: fused_gemm_backward.cpp.
//
// Bits     the same for any number of parts: each row is its own sum, and parts begin at blocks of the codec. (Which
//          kernel cuBLAS takes depends on the number of rows, and with it the rounding of the products themselves.)
// Order    a part is sent when the event behind its product has come; the caller's stream goes on when the last one is
//          there. So what an op allocated may be freed when the op returns.
#include "torch_side/fused_gemm.h"

#include "fused_path.h"

namespace tpk {

using cuda::data_of;
using cuda::linear_into;
using cuda::rows_of;

Tensor gemm_all_reduce(const Tensor& x_shard, const Tensor& w_shard, OptionalTensor bias, Text group,
                       int64_t world_size, Text codec) {
  constexpr Op op = Op::GemmAllReduce;
  const auto comm = cuda::device_communicator_of(op, group, world_size);
  const Shape y_shape = check_linear(op, x_shard, w_shard, bias);
  const Wire& wire = wire_for(op, x_shard, codec);
  const OptionalTensor rank_bias = bias_of_rank(*comm, bias);
  const Tensor x = as_rows(x_shard), y = fresh_output(x_shard, y_shape), y_rows = as_rows(y);
  const CallSpec spec = spec_of(op, wire, numel_of(y), y_shape);
  if (cuda::takes_fused(*comm, op, wire, x.size(0), w_shard.size(0), x.size(1))) {
    const Cut rows = Cut::even(static_cast<size_t>(x.size(0)), comm->world_size());
    cuda::reduce_fused(*comm, spec, x, w_shard, rank_bias, rows, y_rows);
    return y;
  }
  const Tensor partial =
      comm->world_size() == 1 ? y_rows : cuda::product_for_peers(*comm, wire, group, x, {x.size(0), w_shard.size(0)});
  const int64_t M = x.size(0), unit = cuda::unit_of(wire, y_rows.size(1));
  const size_t row = cuda::row_bytes(y_rows);
  const int parts = cuda::choose_parts(comm->machine(), comm->forced(), M, row).parts;
  const auto start = [&](int i) { return cuda::part_start(M, parts, i, unit); };
  comm->produce_and_send(
      op, parts,
      [&](int i) {
        const int64_t from = start(i), count = start(i + 1) - from;
        linear_into(rows_of(x, from, count), w_shard, rank_bias, rows_of(partial, from, count));
      },
      [&](int i) {
        const size_t offset = static_cast<size_t>(start(i)) * row;
        comm->send_all_reduce(spec, wire, data_of(partial) + offset, data_of(y) + offset,
                              static_cast<size_t>((start(i + 1) - start(i)) * y_rows.size(1)));
      });
  return y;
}

Tensor gemm_reduce_scatter(const Tensor& x_shard, const Tensor& w_shard, OptionalTensor bias, Text group,
                           int64_t world_size, int64_t rank, int64_t dim, Text codec, Text) {
  constexpr Op op = Op::GemmReduceScatter;
  const auto comm = cuda::device_communicator_of(op, group, world_size);
  Shape y_shape = check_linear(op, x_shard, w_shard, bias);
  check_token_dim(name_of(op), shape_of(x_shard), dim);
  check_rank(name_of(op), *comm, rank);
  const Wire& wire = wire_for(op, x_shard, codec);
  const OptionalTensor rank_bias = bias_of_rank(*comm, bias);
  const Tensor x = as_rows(x_shard);
  if (dim != 0) {
    const Tensor y = fresh_output(x_shard, y_shape);
    linear_into(x, w_shard, rank_bias, as_rows(y));
    return reduce_scatter_dim(op, *comm, wire, y, dim);
  }
  const CutCall call = reduce_scatter_call(op, wire, y_shape.data(), y_shape.size(), dim, *comm);
  const Cut items = Cut::even(static_cast<size_t>(y_shape[0]), comm->world_size());
  y_shape[0] = call.rows;
  const Tensor y = fresh_output(x_shard, y_shape);
  if (cuda::takes_fused(*comm, op, wire, x.size(0), w_shard.size(0), x.size(1))) {
    cuda::reduce_fused(*comm, call.spec, x, w_shard, rank_bias, items.times(cuda::rows_in_item(x_shard)), y);
    return y;
  }
  const Tensor partial = cuda::product_for_peers(*comm, wire, group, x, {x.size(0), w_shard.size(0)});
  const cuda::RowParts parts(*comm, wire, items, x_shard, w_shard.size(0));
  comm->produce_and_send(
      op, parts.count(),
      [&](int i) {
        parts.each_range(i, [&](int64_t from, int64_t count) {
          linear_into(rows_of(x, from, count), w_shard, rank_bias, rows_of(partial, from, count));
        });
      },
      [&](int i) {
        comm->send_reduce_scatter(call.spec, wire, data_of(partial), data_of(y), call.cut, parts.stretch(i));
      });
  return y;
}

Tensor all_gather_gemm(const Tensor& x_shard, const Tensor& w_shard, OptionalTensor bias, Text group,
                       int64_t world_size, int64_t rank, int64_t dim, int64_t dim_size, Text codec, Text) {
  constexpr Op op = Op::AllGatherGemm;
  const auto comm = cuda::device_communicator_of(op, group, world_size);
  check_rank(name_of(op), *comm, rank);
  Shape y_shape = check_linear(op, x_shard, w_shard, bias);
  check_token_dim(name_of(op), shape_of(x_shard), dim);
  const Wire& wire = wire_for(op, x_shard, codec);
  if (dim != 0 || dim_size < 0) {
    const Tensor x = all_gather_dim(op, *comm, wire, x_shard, dim, dim_size);
    y_shape[static_cast<size_t>(dim)] = x.size(dim);
    const Tensor y = fresh_output(x_shard, y_shape);
    linear_into(as_rows(x), w_shard, bias, as_rows(y));
    return y;
  }
  const cuda::RowGather gather(op, *comm, wire, x_shard, dim_size);
  y_shape[0] = dim_size;
  const Tensor y = fresh_output(x_shard, y_shape), y_rows = as_rows(y), x_rows = gather.rows();
  if (cuda::takes_fused(*comm, op, wire, x_rows.size(0), x_rows.size(1), w_shard.size(0))) {
    cuda::gather_fused(*comm, gather.spec(), gather.mine(), x_rows, w_shard, bias, gather.cut(), y_rows);
    return y;
  }
  const cuda::RowParts parts = gather.parts();
  comm->receive_and_consume(
      op, parts.count(), [&](int i) { gather.send(parts.stretch(i)); },
      [&](int i) {
        parts.each_range(i, [&](int64_t from, int64_t count) {
          linear_into(rows_of(x_rows, from, count), w_shard, bias, rows_of(y_rows, from, count));
        });
      });
  return y;
}

Tensor replicated_gemm(const Tensor& x, const Tensor& w_shard, OptionalTensor bias, Text group, int64_t, Text) {
  find_communicator(group, "replicated_gemm");  // nothing is sent, but a group that was closed is refused
  const Tensor y = fresh_output(x, check_linear(Op::ReplicatedGemmBackward, x, w_shard, bias));
  linear_into(as_rows(x), w_shard, bias, as_rows(y));
  return y;
}

}  // namespace tpk
