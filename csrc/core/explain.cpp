#include "explain.h"

#include "check.h"
#include "wire.h"

namespace tpk {

bool CallShape::is_gemm() const {
  return op == "gemm_all_reduce" || op == "gemm_reduce_scatter" || op == "all_gather_gemm" || op == "replicated_gemm";
}

const Wire& wire_of(const CallShape& call) {
  const DType dtype = call.is_gemm() ? float_dtype("explain", call.dtype) : dtype_named(call.dtype);
  const Codec codec = codec_of("explain", call.codec);
  const bool moves = call.op == "all_gather" && dtype >= DType::Raw1;  // no arithmetic: any dtype is moved
  const Wire* const wire = find_wire(dtype, codec, moves ? ReduceOp::None : ReduceOp::Sum);
  TPK_CHECK(wire != nullptr, "explain: ", call.op, " takes no ", call.dtype, " with codec ", call.codec);
  return *wire;
}

std::optional<Explained> explain_transport(const Communicator& comm) {
  const std::string transport = comm.transport();
  if (transport == "local") return Explained{"local", "one rank: nothing is sent"};
  if (transport != "group") return {};
  return Explained{"exchange", "all-to-all between the ranks, sums taken locally in rank order"};
}

}  // namespace tpk
