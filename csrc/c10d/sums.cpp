// Sums of the ranks' tensors.
#include <optional>

#include "backend.h"
#include "core/check.h"
#include "run.h"
#include "tensors.h"

namespace tpk {
namespace {

using c10d::OpType;
using RedOp = c10d::ReduceOp;

Cut times(const Cut& cut, size_t item) {
  Cut all = cut;
  for (size_t& start : all.starts) start *= item;
  return all;
}

ReduceOp reduce_op_of(RedOp::RedOpType op, bool is_bool) {
  switch (op) {  // of booleans: sum is or, product is and
    case RedOp::SUM:
    case RedOp::PREMUL_SUM: return is_bool ? ReduceOp::Max : ReduceOp::Sum;
    case RedOp::AVG: return ReduceOp::Avg;
    case RedOp::PRODUCT: return is_bool ? ReduceOp::Min : ReduceOp::Product;
    case RedOp::MIN: return ReduceOp::Min;
    case RedOp::MAX: return ReduceOp::Max;
    case RedOp::BAND: return ReduceOp::BitAnd;
    case RedOp::BOR: return ReduceOp::BitOr;
    case RedOp::BXOR: return ReduceOp::BitXor;
    default: return ReduceOp::None;
  }
}

bool needs_order(ReduceOp op) { return op == ReduceOp::Min || op == ReduceOp::Max; }

}  // namespace

// How the values of a tensor are reduced.
struct Backend::Reduction {
  const Wire* wire;
  size_t count;  // of the wire's values in one of the tensor
  std::optional<at::Scalar> factor;

  at::Tensor scaled(const at::Tensor& tensor) const { return factor ? tensor.mul(*factor) : tensor; }
};

Backend::Reduction Backend::reduction_of(Op op, const RedOp& reduce, const at::Tensor& tensor) const {
  const ValueType type = value_type_of(tensor);
  const ReduceOp ours = reduce_op_of(reduce, tensor.scalar_type() == at::kBool);
  TORCH_CHECK(type.dtype < DType::Raw1 && ours != ReduceOp::None, name_of(op), where(), ": no sums of ",
              tensor.scalar_type(), "; its values can only be moved");
  TORCH_CHECK(type.has_order || !needs_order(ours), name_of(op), where(), ": ", name_of(ours), " has no meaning for ",
              tensor.scalar_type());
  TORCH_CHECK(type.count == 1 || ours == ReduceOp::Sum || ours == ReduceOp::Avg, name_of(op), where(), ": ",
              name_of(ours), " has no meaning for ", tensor.scalar_type());
  const Wire* wire = type.count == 1 ? comm_.wire(type.dtype, codec_, ours) : nullptr;
  if (wire == nullptr) wire = comm_.wire(type.dtype, Codec::None, ours);
  TORCH_CHECK(wire != nullptr, name_of(op), where(), ": ", name_of(ours), " has no meaning for ", tensor.scalar_type());
  Reduction found{wire, type.count, std::nullopt};
  if (reduce == RedOp::PREMUL_SUM) {
    const auto* const supplement = dynamic_cast<const c10d::PreMulSumSupplement*>(reduce.supplement_.get());
    TORCH_CHECK(supplement != nullptr, name_of(op), where(), ": premul_sum has no factor");
    found.factor =
        supplement->tensor_factor.defined() ? supplement->tensor_factor.item() : at::Scalar(supplement->double_factor);
  }
  return found;
}

void Backend::sum_in_place(const Reduction& reduction, const at::Tensor& tensor, Op op) {
  if (reduction.factor) const_cast<at::Tensor&>(tensor).mul_(*reduction.factor);
  const Values values(tensor, true);
  const size_t n = values.numel() * reduction.count;
  comm_.all_reduce(spec_of(op, tensor, *reduction.wire, n, 0, -1), *reduction.wire, values.data(), values.data(), n);
  values.write_back();
}

Backend::Works Backend::allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) {
  if (tensors.size() == 1 && tensors[0].is_sparse()) return allreduce_sparse(tensors, options);
  const at::Tensor& tensor = only("all_reduce", "tensors", tensors);
  const Reduction reduction = reduction_of(Op::AllReduce, options.reduceOp, tensor);
  return run(OpType::ALLREDUCE, "tpk:all_reduce", options.asyncOp, tensors, tensors,
             [this, reduction, tensor] { sum_in_place(reduction, tensor, Op::AllReduce); });
}

Backend::Works Backend::allreduce_sparse(Tensors& tensors, const c10d::AllreduceOptions& options) {
  return kept(gloo()->allreduce(tensors, options));
}

Backend::Works Backend::allreduce_coalesced(Tensors& tensors, const c10d::AllreduceCoalescedOptions& options) {
  TORCH_CHECK(!tensors.empty(), "all_reduce_coalesced", where(), ": tensors is empty");
  for (const at::Tensor& tensor : tensors) check_alike("all_reduce_coalesced", tensors[0], tensor);
  const Reduction reduction = reduction_of(Op::AllReduce, options.reduceOp, tensors[0]);
  return run(OpType::ALLREDUCE_COALESCED, "tpk:all_reduce", options.asyncOp, tensors, tensors,
             [this, reduction, tensors] {
               if (reduction.factor) {
                 for (at::Tensor tensor : tensors) tensor.mul_(*reduction.factor);
               }
               const Parts parts(tensors, true);
               const size_t n = parts.cut.total() * reduction.count;
               comm_.all_reduce(spec_of(Op::AllReduce, tensors[0], *reduction.wire, n, 0, -1), *reduction.wire,
                                parts.data(), parts.data(), n);
               parts.write_back();
             });
}

Backend::Works Backend::reduce(Tensors& tensors, const c10d::ReduceOptions& options) {
  const at::Tensor& tensor = only("reduce", "tensors", tensors);
  check_rank("reduce", "root", options.rootRank);
  const Reduction reduction = reduction_of(Op::Reduce, options.reduceOp, tensor);
  const int root = static_cast<int>(options.rootRank);
  return run(OpType::REDUCE, "tpk:reduce", options.asyncOp, tensors, tensors, [this, reduction, tensor, root] {
    const at::Tensor scaled = reduction.scaled(tensor);
    const Values values(scaled, true);
    const size_t n = values.numel() * reduction.count;
    const CallSpec spec = spec_of(Op::Reduce, tensor, *reduction.wire, n, 0, root);
    comm_.reduce_scatter(spec, *reduction.wire, values.data(), values.data(), all_of(root, n, size_));
    if (rank_ != root) return;
    values.write_back();
    if (reduction.factor) const_cast<at::Tensor&>(tensor).copy_(scaled);
  });
}

// output = the sum over the ranks of inputs[this rank].
void Backend::scatter_sum(const Reduction& reduction, const Tensors& inputs, const at::Tensor& output) {
  Tensors scaled;
  for (const at::Tensor& input : inputs) scaled.push_back(reduction.scaled(input));
  const Parts in(scaled, true);
  const Values out(output, false);
  Cut cut = times(in.cut, reduction.count);
  if (inputs.size() == 1) {  // one tensor with the parts of all ranks
    const size_t part = cut.total() / static_cast<size_t>(size_);
    cut.starts.clear();
    for (int r = 0; r <= size_; ++r) cut.starts.push_back(static_cast<size_t>(r) * part);
  }
  const size_t item = reduction.wire->value_bytes;
  const bool is_in_place = out.data() == in.data() + cut.start(rank_) * item;
  const Apart apart(in.data(), cut.total() * item, out.data(), cut.size(rank_) * item, is_in_place);
  comm_.reduce_scatter(spec_of(Op::ReduceScatter, output, *reduction.wire, cut.total(), 0, -1), *reduction.wire,
                       apart.data(), out.data(), cut);
  out.write_back();
}

Backend::Works Backend::reduce_scatter(Tensors& outputs, std::vector<Tensors>& inputs,
                                       const c10d::ReduceScatterOptions& options) {
  const at::Tensor& output = only("reduce_scatter", "output", outputs);
  TORCH_CHECK(inputs.size() == 1 && inputs[0].size() == static_cast<size_t>(size_), "reduce_scatter", where(),
              ": input must be a list of ", size_, " tensors");
  for (const at::Tensor& input : inputs[0]) check_alike("reduce_scatter", output, input);
  const at::Tensor& mine = inputs[0][static_cast<size_t>(rank_)];
  TORCH_CHECK(mine.numel() == output.numel(), "reduce_scatter", where(), ": output must have ", mine.numel(),
              " values, as input[", rank_, "] has, got ", output.numel());
  const Reduction reduction = reduction_of(Op::ReduceScatter, options.reduceOp, output);
  return run(OpType::REDUCE_SCATTER, "tpk:reduce_scatter", options.asyncOp, inputs[0], outputs,
             [this, reduction, inputs = inputs[0], output] { scatter_sum(reduction, inputs, output); });
}

Backend::Works Backend::_reduce_scatter_base(at::Tensor& output, at::Tensor& input,
                                             const c10d::ReduceScatterOptions& options) {
  check_tensor("reduce_scatter_tensor", output);
  check_alike("reduce_scatter_tensor", output, input);
  TORCH_CHECK(input.numel() == output.numel() * size_, "reduce_scatter_tensor", where(), ": input must have ",
              output.numel() * size_, " values, ", size_, " times those of output, got ", input.numel());
  const Reduction reduction = reduction_of(Op::ReduceScatter, options.reduceOp, output);
  return run(OpType::_REDUCE_SCATTER_BASE, "tpk:reduce_scatter_tensor", options.asyncOp, {input}, {output},
             [this, reduction, input, output] { scatter_sum(reduction, {input}, output); });
}

Backend::Works Backend::reduce_scatter_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                                        const c10d::ReduceScatterOptions& options) {
  TORCH_CHECK(!inputs.empty() && inputs.size() == outputs.size(), "reduce_scatter_tensor_coalesced", where(),
              ": inputs and outputs must be as many, got ", inputs.size(), " and ", outputs.size());
  std::vector<Reduction> reductions;
  for (size_t i = 0; i < inputs.size(); ++i) {
    check_tensor("reduce_scatter_tensor", outputs[i]);
    check_alike("reduce_scatter_tensor", outputs[i], inputs[i]);
    TORCH_CHECK(inputs[i].numel() == outputs[i].numel() * size_, "reduce_scatter_tensor_coalesced", where(), ": input ",
                i, " must have ", outputs[i].numel() * size_, " values, got ", inputs[i].numel());
    reductions.push_back(reduction_of(Op::ReduceScatter, options.reduceOp, outputs[i]));
  }
  return run(OpType::REDUCE_SCATTER_TENSOR_COALESCED, "tpk:reduce_scatter_tensor", options.asyncOp, inputs, outputs,
             [this, reductions, inputs, outputs] {
               for (size_t i = 0; i < inputs.size(); ++i) scatter_sum(reductions[i], {inputs[i]}, outputs[i]);
             });
}

}  // namespace tpk
