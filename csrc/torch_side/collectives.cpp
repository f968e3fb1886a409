#include "collectives.h"

#include <dlfcn.h>

#include <algorithm>

#include "core/specs.h"

namespace tpk {

void check_torch(const char* name, AOTITorchError code) {
  if (code == AOTI_TORCH_SUCCESS) return;
  // Newer torch keeps the text of the last exception for us; older torch has only printed it.
  using TextOf = const char* (*)();
  static const auto text = reinterpret_cast<TextOf>(dlsym(RTLD_DEFAULT, "torch_exception_get_what_without_backtrace"));
  throw std::runtime_error(concat(name, ": ", text != nullptr ? text() : "failed (torch printed why)"));
}

Tensor call_op(const char* name, const char* overload, StableIValue* stack) {
  check_torch(name, torch_call_dispatcher(name, overload, stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

ReduceOp reduce_op_of(const char* op, const std::string& name) {
  for (ReduceOp candidate : {ReduceOp::Sum, ReduceOp::Avg, ReduceOp::Max, ReduceOp::Min}) {
    if (name == name_of(candidate)) return candidate;
  }
  throw std::invalid_argument(concat(op, ": op must be sum, avg, max or min, got '", name, "'"));
}

std::shared_ptr<Communicator> communicator_of(Op op, const std::string& group, int64_t world_size) {
  std::shared_ptr<Communicator> communicator = find_communicator(group, name_of(op));
  TPK_CHECK(communicator->world_size() == world_size, name_of(op), ": world_size must be that of group '",
            communicator->label(), "', ", communicator->world_size(), ", got ", world_size);
  return communicator;
}

void check_rank(const char* op, const Communicator& comm, int64_t rank) {
  TPK_CHECK(rank == comm.rank(), op, ": rank must be this rank of the group, ", comm.rank(), ", got ", rank);
}

const Wire& wire_for(Op op, const Tensor& x, const std::string& codec, ReduceOp reduce_op) {
  const DType dtype = dtype_of(x);
  TPK_CHECK(dtype != DType::Count, name_of(op), ": x has a dtype without arithmetic here (", x.element_size(),
            " bytes a value); expected float32, float64, bfloat16, float16 or an integer dtype");
  try {
    return wire_of(dtype, codec_of(name_of(op), codec), reduce_op);
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument(concat(name_of(op), ": ", error.what()));
  }
}

CallSpec spec_of(Op op, const Wire& wire, size_t numel, const Shape& must_agree, int64_t mine) {
  return {op, wire.dtype, wire.op, wire.codec, numel, hash_of(must_agree.data(), must_agree.size()), mine};
}

void all_reduce_into(Op op, Communicator& comm, const Wire& wire, const Tensor& x, Tensor& out) {
  comm.all_reduce(spec_of(op, wire, numel_of(x), shape_of(x)), wire, x.const_data_ptr(), out.mutable_data_ptr(),
                  numel_of(x));
}

namespace {

// Where a collective writes rows of this shape, whose dimension 0 is `dim` of the result; and the result. Where both
// have one order in memory they are one tensor, so that the result is never a view: autograd forbids to modify those.
bool is_in_order(const Shape& rows, int64_t dim) {
  int64_t before = 1, all = rows[0];
  for (size_t i = 1; i < rows.size(); ++i) {
    all *= rows[i];
    if (static_cast<int64_t>(i) <= dim) before *= rows[i];
  }
  return before == 1 || rows[0] == 1 || all == 0;
}

Tensor output_for(const Tensor& like, Shape rows, int64_t dim) {
  if (is_in_order(rows, dim)) std::rotate(rows.begin(), rows.begin() + 1, rows.begin() + dim + 1);
  return fresh_output(like, rows);
}

Tensor result_of(const Tensor& out, const Shape& rows, int64_t dim) {
  return is_in_order(rows, dim) ? out : dim_back(out, dim);
}

}  // namespace

Tensor reduce_scatter_dim(Op op, Communicator& comm, const Wire& wire, const Tensor& x, int64_t dim) {
  const Tensor rows = dim_first(x, dim);
  Shape shape = shape_of(rows);
  const CutCall call = reduce_scatter_call(op, wire, shape.data(), shape.size(), dim, comm);
  shape[0] = call.rows;
  Tensor out = output_for(rows, shape, dim);
  comm.reduce_scatter(call.spec, wire, rows.const_data_ptr(), out.mutable_data_ptr(), call.cut);
  return result_of(out, shape, dim);
}

Tensor all_gather_dim(Op op, Communicator& comm, const Wire& wire, const Tensor& x_shard, int64_t dim,
                      int64_t dim_size) {
  Tensor rows = dim_first(x_shard, dim);
  Shape shape = shape_of(rows);
  const Cut items = dim_size < 0 ? Cut::of_sizes(comm.exchange(Op::Sizes, shape[0]))
                                 : Cut::even(static_cast<size_t>(dim_size), comm.world_size());
  const CutCall call = all_gather_call(op, wire, shape.data(), shape.size(), dim, items);
  if (numel_of(rows) < call.cut.size(comm.rank())) {
    // The ranks will find out that this one brings too little; until then its part is copied as the cut has it.
    shape[0] = static_cast<int64_t>(items.size(comm.rank()));
    rows = empty_of(rows, shape);
  }
  shape[0] = call.rows;
  Tensor out = output_for(rows, shape, dim);
  comm.all_gather(call.spec, wire, rows.const_data_ptr(), out.mutable_data_ptr(), call.cut);
  return result_of(out, shape, dim);
}

Tensor all_reduce(const Tensor& x, Text group, int64_t world_size, Text op, Text codec) {
  const auto comm = communicator_of(Op::AllReduce, group, world_size);
  const Wire& wire = wire_for(Op::AllReduce, x, codec, reduce_op_of("all_reduce", op));
  const Tensor in = dense(x);
  Tensor out = fresh_output(in, shape_of(in));
  all_reduce_into(Op::AllReduce, *comm, wire, in, out);
  return out;
}

void all_reduce_(Tensor x, Text group, int64_t world_size, Text op, Text codec) {
  const auto comm = communicator_of(Op::AllReduceInplace, group, world_size);
  const Wire& wire = wire_for(Op::AllReduceInplace, x, codec, reduce_op_of("all_reduce_", op));
  if (in_memory(x).is_contiguous()) return all_reduce_into(Op::AllReduceInplace, *comm, wire, x, x);
  Tensor copy = dense(x);
  all_reduce_into(Op::AllReduceInplace, *comm, wire, copy, copy);
  copy_into(x, copy);
}

Tensor reduce_scatter(const Tensor& x, Text group, int64_t world_size, int64_t rank, int64_t dim, Text op, Text codec,
                      Text) {
  const auto comm = communicator_of(Op::ReduceScatter, group, world_size);
  check_rank("reduce_scatter", *comm, rank);
  TPK_CHECK(dim >= 0 && dim < x.dim(), "reduce_scatter: dim must be in [0, ", x.dim(), "), got ", dim);
  const Wire& wire = wire_for(Op::ReduceScatter, x, codec, reduce_op_of("reduce_scatter", op));
  return reduce_scatter_dim(Op::ReduceScatter, *comm, wire, x, dim);
}

Tensor all_gather(const Tensor& x_shard, Text group, int64_t world_size, int64_t rank, int64_t dim, int64_t dim_size,
                  Text codec, Text) {
  const auto comm = communicator_of(Op::AllGather, group, world_size);
  check_rank("all_gather", *comm, rank);
  TPK_CHECK(dim >= 0 && dim < x_shard.dim(), "all_gather: dim must be in [0, ", x_shard.dim(), "), got ", dim);
  // A gather without a codec needs no arithmetic: it takes any dtype.
  const bool packs = codec_of("all_gather", codec) != Codec::None;
  const DType raw = raw_dtype_of(x_shard);
  const Wire& wire = packs ? wire_for(Op::AllGather, x_shard, codec)
                           : wire_of(raw, Codec::None, raw < DType::Raw1 ? ReduceOp::Sum : ReduceOp::None);
  return all_gather_dim(Op::AllGather, *comm, wire, x_shard, dim, dim_size);
}

Tensor arena_empty(Text group, std::vector<int64_t> shape, ScalarType dtype) {
  const std::shared_ptr<Communicator> comm = find_communicator(group, "group.empty");
  Shape strides(shape.size());
  int64_t numel = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    TPK_CHECK(shape[i] >= 0, "group.empty: shape must not be negative, got ", text_of(shape));
    strides[i] = numel;
    numel *= std::max<int64_t>(shape[i], 1);
  }
  const Tensor one = torch::stable::empty({0}, dtype);
  const size_t bytes = static_cast<size_t>(numel) * one.element_size();
  void* memory = comm->heap_allocate(bytes);
  if (memory == nullptr) {
    TPK_CHECK(comm->heap_bytes() > 0, "group.empty: group '", comm->label(), "' has no arena (transport ",
              comm->transport(), "); use torch.empty");
    throw std::invalid_argument(concat("group.empty: ", bytes, " bytes do not fit into the arena's heap of ",
                                       comm->heap_bytes(), " bytes (", text_of(shape),
                                       "); open the group with a larger arena_bytes or free tensors of group.empty"));
  }
  // The tensor keeps the communicator, and so the mapping, alive.
  return torch::stable::from_blob(memory, shape, strides, device_of(*comm), dtype, [comm](void* pointer) {
    // A forked child has a copy of the tensor; the block is its parent's.
    if (comm->is_of_this_process()) comm->heap_free(pointer);
  });
}

Tensor device_arena_empty(Text group, std::vector<int64_t> shape, ScalarType dtype, torch::stable::Device device) {
  const auto here = device_of(*find_communicator(group, "group.empty"));
  TPK_CHECK(device.type() == here.type() && (device.index() == here.index() || device.index() < 0),
            "group.empty: the group is on device ", here.index(), ", got device ", device.index());
  return arena_empty(std::move(group), std::move(shape), dtype);
}

std::vector<int64_t> exchange_sizes(Text group, int64_t mine) {
  return find_communicator(group, "sizes")->exchange(Op::Sizes, mine);
}

}  // namespace tpk
