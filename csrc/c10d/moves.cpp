// Collectives that move tensors.
#include "backend.h"
#include "core/check.h"
#include "run.h"
#include "tensors.h"

namespace tpk {
namespace {

using c10d::OpType;

}  // namespace

Backend::Works Backend::broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) {
  const at::Tensor& tensor = only("broadcast", "tensors", tensors);
  check_rank("broadcast", "root", options.rootRank);
  const int root = static_cast<int>(options.rootRank);
  return run(OpType::BROADCAST, "tpk:broadcast", options.asyncOp, tensors, tensors, [this, tensor, root] {
    const Values values(tensor, rank_ == root);
    const Wire& wire = *comm_.wire(raw_of(tensor.element_size()), Codec::None, ReduceOp::None);
    const size_t n = values.numel();
    const int64_t mine = rank_ == root ? static_cast<int64_t>(n) : 0;
    comm_.all_gather(spec_of(Op::Broadcast, tensor, wire, n, mine, root), wire, values.data(), values.data(),
                     all_of(root, n, size_));
    if (rank_ != root) values.write_back();
  });
}

// outputs: one for each rank, or one with the parts of all.
void Backend::gather_into(const at::Tensor& input, const Tensors& outputs) {
  const Values in(input, true);
  const Parts out(outputs, false);
  const Wire& wire = *comm_.wire(raw_of(input.element_size()), Codec::None, ReduceOp::None);
  Cut cut = out.cut;
  if (outputs.size() == 1) {
    cut.starts.clear();
    for (int r = 0; r <= size_; ++r) cut.starts.push_back(static_cast<size_t>(r) * in.numel());
  }
  const CallSpec spec = spec_of(Op::AllGather, input, wire, cut.total(), static_cast<int64_t>(in.numel()), -1);
  const size_t item = input.element_size();
  const bool is_in_place = in.data() == out.data() + cut.start(rank_) * item;
  const Apart apart(in.data(), in.numel() * item, out.data(), cut.total() * item, is_in_place);
  comm_.all_gather(spec, wire, apart.data(), out.data(), cut);
  out.write_back();
}

Backend::Works Backend::allgather(std::vector<Tensors>& outputs, Tensors& inputs,
                                  const c10d::AllgatherOptions& options) {
  const at::Tensor& input = only("all_gather", "input", inputs);
  TORCH_CHECK(outputs.size() == 1 && outputs[0].size() == static_cast<size_t>(size_), "all_gather", where(),
              ": output must be a list of ", size_, " tensors");
  for (const at::Tensor& output : outputs[0]) check_alike("all_gather", input, output);
  const at::Tensor& mine = outputs[0][static_cast<size_t>(rank_)];
  TORCH_CHECK(mine.numel() == input.numel(), "all_gather", where(), ": output[", rank_, "] must have ", input.numel(),
              " values, as the input has, got ", mine.numel());
  return run(OpType::ALLGATHER, "tpk:all_gather", options.asyncOp, inputs, outputs[0],
             [this, input, outputs = outputs[0]] { gather_into(input, outputs); });
}

Backend::Works Backend::_allgather_base(at::Tensor& output, at::Tensor& input, const c10d::AllgatherOptions& options) {
  check_tensor("all_gather_into_tensor", input);
  check_alike("all_gather_into_tensor", input, output);
  TORCH_CHECK(output.numel() == input.numel() * size_, "all_gather_into_tensor", where(), ": output must have ",
              input.numel() * size_, " values, ", size_, " times those of input, got ", output.numel());
  return run(OpType::_ALLGATHER_BASE, "tpk:all_gather_into_tensor", options.asyncOp, {input}, {output},
             [this, input, output] { gather_into(input, {output}); });
}

Backend::Works Backend::allgather_into_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                                        const c10d::AllgatherOptions& options) {
  TORCH_CHECK(!inputs.empty() && inputs.size() == outputs.size(), "all_gather_into_tensor_coalesced", where(),
              ": inputs and outputs must be as many, got ", inputs.size(), " and ", outputs.size());
  for (size_t i = 0; i < inputs.size(); ++i) {
    check_tensor("all_gather_into_tensor", inputs[i]);
    check_alike("all_gather_into_tensor", inputs[i], outputs[i]);
    TORCH_CHECK(outputs[i].numel() == inputs[i].numel() * size_, "all_gather_into_tensor_coalesced", where(),
                ": output ", i, " must have ", inputs[i].numel() * size_, " values, got ", outputs[i].numel());
  }
  return run(OpType::ALLGATHER_COALESCED, "tpk:all_gather_into_tensor", options.asyncOp, inputs, outputs,
             [this, inputs, outputs] {
               for (size_t i = 0; i < inputs.size(); ++i) gather_into(inputs[i], {outputs[i]});
             });
}

Backend::Works Backend::allgather_coalesced(std::vector<Tensors>& outputs, Tensors& inputs,
                                            const c10d::AllgatherOptions& options) {
  // outputs[r][i]: what rank r has as inputs[i].
  TORCH_CHECK(outputs.size() == static_cast<size_t>(size_), "all_gather_coalesced", where(), ": output must have ",
              size_, " lists, got ", outputs.size());
  Tensors all;
  for (const Tensors& list : outputs) {
    TORCH_CHECK(list.size() == inputs.size(), "all_gather_coalesced", where(), ": each list of output must have ",
                inputs.size(), " tensors, got ", list.size());
    for (size_t i = 0; i < list.size(); ++i) {
      check_alike("all_gather_coalesced", inputs[i], list[i]);
      TORCH_CHECK(list[i].numel() == inputs[i].numel(), "all_gather_coalesced", where(), ": output ", i, " must have ",
                  inputs[i].numel(), " values, got ", list[i].numel());
      all.push_back(list[i]);
    }
  }
  return run(OpType::ALLGATHER_COALESCED, "tpk:all_gather", options.asyncOp, inputs, all, [this, outputs, inputs] {
    for (size_t i = 0; i < inputs.size(); ++i) {
      Tensors parts;
      for (const Tensors& list : outputs) parts.push_back(list[i]);
      gather_into(inputs[i], parts);
    }
  });
}

void Backend::exchange(const CallSpec& spec, const Wire& wire, const char* in, char* out, const Cut& send,
                       const Cut& receive) {
  const Apart apart(in, send.total() * wire.value_bytes, out, receive.total() * wire.value_bytes);
  comm_.all_to_all(spec, wire, apart.data(), out, send, receive);
}

// inputs and outputs: one for each rank, or none where nothing is sent or received.
void Backend::exchange_all(Op op, const Tensors& inputs, const Tensors& outputs, int64_t root) {
  const Parts in(inputs, true), out(outputs, false);
  const at::Tensor& like = inputs.empty() ? outputs[0] : inputs[0];
  const Wire& wire = *comm_.wire(raw_of(like.element_size()), Codec::None, ReduceOp::None);
  exchange(spec_of(op, like, wire, 0, 0, root), wire, in.data(), out.data(), in.cut, out.cut);
  out.write_back();
}

// Gather and scatter: every rank has `one`, and the root `list`, one for each rank.
Backend::Works Backend::exchange_with_root(Op op, OpType type, const at::Tensor& one, const char* list_name,
                                           const std::vector<Tensors>& list, int64_t root, bool async_op) {
  const bool is_root = rank_ == root, gathers = op == Op::Gather;
  check_rank(name_of(op), "root", root);
  TORCH_CHECK(is_root ? list.size() == 1 && list[0].size() == static_cast<size_t>(size_) : list.empty(), name_of(op),
              where(), ": ", list_name, " must be a list of ", size_, " tensors on the root, and none elsewhere");
  // Where nothing goes, an empty tensor does.
  Tensors mine(static_cast<size_t>(size_), one.new_empty({0})), roots = is_root ? list[0] : mine;
  mine[static_cast<size_t>(root)] = one;
  for (const at::Tensor& tensor : roots) check_alike(name_of(op), one, tensor);
  const Tensors ones{one}, listed = is_root ? roots : Tensors{};
  return run(type, gathers ? "tpk:gather" : "tpk:scatter", async_op, gathers ? ones : listed, gathers ? listed : ones,
             [this, op, to = gathers ? mine : roots, from = gathers ? roots : mine, root] {
               exchange_all(op, to, from, root);
             });
}

Backend::Works Backend::gather(std::vector<Tensors>& outputs, Tensors& inputs, const c10d::GatherOptions& options) {
  const at::Tensor& input = only("gather", "input", inputs);
  return exchange_with_root(Op::Gather, OpType::GATHER, input, "output", outputs, options.rootRank, options.asyncOp);
}

Backend::Works Backend::scatter(Tensors& outputs, std::vector<Tensors>& inputs, const c10d::ScatterOptions& options) {
  const at::Tensor& output = only("scatter", "output", outputs);
  return exchange_with_root(Op::Scatter, OpType::SCATTER, output, "input", inputs, options.rootRank, options.asyncOp);
}

Backend::Works Backend::alltoall(Tensors& outputs, Tensors& inputs, const c10d::AllToAllOptions& options) {
  for (const Tensors* list : {&inputs, &outputs}) {
    TORCH_CHECK(list->size() == static_cast<size_t>(size_), "all_to_all", where(), ": ",
                list == &inputs ? "input" : "output", " must be a list of ", size_, " tensors, got ", list->size());
    for (const at::Tensor& tensor : *list) check_alike("all_to_all", inputs[0], tensor);
  }
  return run(OpType::ALLTOALL, "tpk:all_to_all", options.asyncOp, inputs, outputs,
             [this, inputs, outputs] { exchange_all(Op::AllToAll, inputs, outputs, -1); });
}

Backend::Works Backend::alltoall_base(at::Tensor& output, at::Tensor& input, std::vector<int64_t>& output_splits,
                                      std::vector<int64_t>& input_splits, const c10d::AllToAllOptions& options) {
  check_tensor("all_to_all_single", input);
  check_alike("all_to_all_single", input, output);
  const auto cut_of = [&](const char* name, const at::Tensor& tensor, const std::vector<int64_t>& splits) {
    const int64_t rows = tensor.dim() > 0 ? tensor.size(0) : 1, row = rows > 0 ? tensor.numel() / rows : 0;
    Cut cut{{0}};
    if (splits.empty()) {
      TORCH_CHECK(rows % size_ == 0, "all_to_all_single", where(), ": dim 0 of ", name, ", ", rows,
                  ", must be a multiple of ", size_, " where there are no split sizes");
      for (int r = 1; r <= size_; ++r) cut.starts.push_back(static_cast<size_t>(r * (rows / size_) * row));
      return cut;
    }
    TORCH_CHECK(splits.size() == static_cast<size_t>(size_), "all_to_all_single", where(), ": ", name,
                "_split_sizes must be ", size_, " numbers, got ", splits.size());
    int64_t sum = 0;
    for (int64_t split : splits) {
      TORCH_CHECK(split >= 0, "all_to_all_single", where(), ": ", name, "_split_sizes must not be negative, got ",
                  split);
      cut.starts.push_back(static_cast<size_t>((sum += split) * row));
    }
    TORCH_CHECK(sum == rows, "all_to_all_single", where(), ": the ", name, "_split_sizes must sum up to ", rows,
                ", dim 0 of ", name, ", got ", sum);
    return cut;
  };
  Cut send = cut_of("input", input, input_splits), receive = cut_of("output", output, output_splits);
  return run(OpType::ALLTOALL_BASE, "tpk:all_to_all_single", options.asyncOp, {input}, {output},
             [this, input, output, send = std::move(send), receive = std::move(receive)] {
               const Values in(input, true), out(output, false);
               const Wire& wire = *comm_.wire(raw_of(input.element_size()), Codec::None, ReduceOp::None);
               exchange(spec_of(Op::AllToAll, input, wire, 0, 0, -1), wire, in.data(), out.data(), send, receive);
               out.write_back();
             });
}

}  // namespace tpk
