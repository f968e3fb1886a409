// Reductions of inputs that are packed already: the output of compress_with_feedback is sent as it is.
//
// Such a call is the op without `packed` in its name, fingerprint and counters included: the same bytes are sent, so
// that the inputs of some ranks may be packed and those of others not.
#include "compress.h"
#include "core/specs.h"
#include "packing.h"

namespace tpk {
namespace {

void check_wire(const char* op, const Tensor& wire_bytes, size_t expected, const std::string& what) {
  TPK_CHECK(wire_bytes.scalar_type() == ScalarType::Byte && wire_bytes.dim() == 1, op,
            ": wire must be uint8 with one dim, got ", wire_bytes.dim(), " dims of ", wire_bytes.element_size(),
            " bytes a value");
  TPK_CHECK(numel_of(wire_bytes) == expected, op, ": wire must have ", expected, " bytes for ", what, ", got ",
            numel_of(wire_bytes));
}

// With codec none the wire is the values.
Input input_of(const Tensor& packed, const Wire& wire) {
  return wire.is_plain() ? Input(packed.const_data_ptr()) : Input::packed(packed.const_data_ptr());
}

}  // namespace

Tensor all_reduce_packed(const Tensor& wire_bytes, std::vector<int64_t> shape, ScalarType dtype, Text group,
                         int64_t world_size, Text op, Text codec) {
  const auto comm = communicator_of(Op::AllReduce, group, world_size);
  Tensor out = fresh_output(empty_of(wire_bytes, {0}, dtype), shape);
  const size_t n = numel_of(out);
  const Wire& wire = wire_for(Op::AllReduce, out, codec, reduce_op_of("all_reduce_packed", op));
  check_wire("all_reduce_packed", wire_bytes, wire.bytes(n), concat("shape ", text_of(shape)));
  const Tensor packed = readable(wire_bytes);
  comm->all_reduce(spec_of(Op::AllReduce, wire, n, shape), wire, input_of(packed, wire), out.mutable_data_ptr(), n);
  return out;
}

Tensor reduce_scatter_packed(const Tensor& wire_bytes, int64_t numel, ScalarType dtype, Text group, int64_t world_size,
                             int64_t rank, Text op, Text codec) {
  const auto comm = communicator_of(Op::ReduceScatter, group, world_size);
  check_rank("reduce_scatter_packed", *comm, rank);
  TPK_CHECK(numel >= 0, "reduce_scatter_packed: numel must not be negative, got ", numel);
  const Tensor like = empty_of(wire_bytes, {0}, dtype);
  const Wire& wire = wire_for(Op::ReduceScatter, like, codec, reduce_op_of("reduce_scatter_packed", op));
  const CutCall call = reduce_scatter_call(Op::ReduceScatter, wire, &numel, 1, 0, *comm);
  size_t expected = 0;
  for (int r = 0; r < comm->world_size(); ++r) expected += wire.bytes(call.cut.size(r));
  check_wire("reduce_scatter_packed", wire_bytes, expected,
             concat(numel, " values in ", comm->world_size(), " packed parts"));
  const Tensor packed = readable(wire_bytes);
  Tensor out = fresh_output(like, {call.rows});
  comm->reduce_scatter(call.spec, wire, input_of(packed, wire), out.mutable_data_ptr(), call.cut);
  return out;
}

}  // namespace tpk
