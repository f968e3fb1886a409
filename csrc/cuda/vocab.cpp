// Vocabulary-parallel embedding and cross-entropy on a device. An id outside the vocabulary is found by the kernel, so
// it is an error of a later call or of check(), as a mismatch between ranks is.
#include "torch_side/vocab.h"

#include "row_parts.h"

namespace tpk {
namespace {

using cuda::current_stream;

constexpr int64_t kStats = 4;  // numbers of a rank for a row

}  // namespace

Tensor vocab_embedding(const Tensor& ids, const Tensor& table_shard, Text group, int64_t world_size,
                       int64_t vocab_start, int64_t vocab_size) {
  constexpr Op op = Op::VocabEmbedding;
  const auto comm = cuda::device_communicator_of(op, group, world_size);
  TPK_CHECK(table_shard.dim() == 2, "vocab_embedding: table_shard must have 2 dims [vocabulary shard, D], got shape ",
            text_of(shape_of(table_shard)));
  const int64_t shard = table_shard.size(0);
  check_shard("vocab_embedding", vocab_start, shard, vocab_size);
  const Wire& wire = wire_for(op, table_shard, "none");
  const Integers rows = integers_of("vocab_embedding", "ids", ids);
  const Tensor table = dense(table_shard);
  Shape shape = shape_of(ids);
  shape.push_back(table.size(1));
  Tensor out = fresh_output(table, shape);
  const size_t row = static_cast<size_t>(table.size(1)) * table.element_size();
  TPK_CUDA_CHECK(cuda::launch_embedding(rows.data, rows.are_64, table.const_data_ptr(), out.mutable_data_ptr(),
                                        rows.count, row, vocab_start, shard, vocab_size, comm->bad_ids(vocab_size),
                                        current_stream()));
  all_reduce_into(op, *comm, wire, out, out);
  return out;
}

Tensor vocab_embedding_backward(const Tensor& dy, const Tensor& ids, int64_t vocab_start, int64_t shard_size) {
  const char* const op = "vocab_embedding_backward";
  const Integers rows = integers_of(op, "ids", ids);
  const DType dtype = float_dtype_of(op, dy);
  const Tensor gradient = dense(dy);
  const int64_t width = gradient.size(gradient.dim() - 1), tokens = rows.values.numel();
  const Tensor flat = kept(torch::stable::reshape(rows.values, {tokens}));
  const auto [sorted, order] = cuda::sort_stably(rows.are_64 ? flat : cuda::to_int64(flat));
  const Tensor table = fresh_output(gradient, {shard_size, width});
  TPK_CUDA_CHECK(cuda::launch_embedding_backward(
      dtype, gradient.const_data_ptr(), static_cast<const int64_t*>(sorted.const_data_ptr()),
      static_cast<const int64_t*>(order.const_data_ptr()), table.mutable_data_ptr(), static_cast<size_t>(tokens),
      static_cast<size_t>(width), vocab_start, shard_size, current_stream()));
  return table;
}

std::tuple<Tensor, Tensor> vocab_cross_entropy(const Tensor& logits_shard, const Tensor& target, Text group,
                                               int64_t world_size, int64_t vocab_start, int64_t vocab_size,
                                               int64_t ignore_index, double label_smoothing) {
  constexpr Op op = Op::VocabCrossEntropy;
  const auto comm = cuda::device_communicator_of(op, group, world_size);
  TPK_CHECK(logits_shard.dim() == target.dim() + 1,
            "vocab_cross_entropy: logits_shard must have one dim more than target, got shapes ",
            text_of(shape_of(logits_shard)), " and ", text_of(shape_of(target)));
  const int64_t shard = logits_shard.size(logits_shard.dim() - 1);
  check_shard("vocab_cross_entropy", vocab_start, shard, vocab_size);
  const Integers targets = integers_of("vocab_cross_entropy", "target", target);
  TPK_CHECK(targets.values.numel() == num_rows(logits_shard),
            "vocab_cross_entropy: logits_shard and target must have the same tokens, got shapes ",
            text_of(shape_of(logits_shard)), " and ", text_of(shape_of(target)));
  const Tensor logits = dense(logits_shard);
  const DType dtype = float_dtype_of("vocab_cross_entropy", logits);
  const ScalarType sum_type = sum_type_of(logits);
  const size_t tokens = targets.count;
  const Tensor mine = empty_of(logits, {static_cast<int64_t>(tokens) * kStats}, sum_type);
  TPK_CUDA_CHECK(cuda::launch_row_stats(dtype, logits.const_data_ptr(), targets.data, targets.are_64,
                                        mine.mutable_data_ptr(), tokens, static_cast<size_t>(shard), vocab_start,
                                        vocab_size, ignore_index, comm->bad_targets(vocab_size), current_stream()));

  const Wire& wire = wire_of(dtype_of(mine), Codec::None, ReduceOp::Sum);
  const Cut cut = Cut::of_sizes(std::vector<int64_t>(static_cast<size_t>(comm->world_size()), mine.numel()));
  const Tensor all = empty_of(mine, {static_cast<int64_t>(cut.total())});
  comm->all_gather(spec_of(op, wire, cut.total(), {vocab_size}, mine.numel()), wire, mine.const_data_ptr(),
                   all.mutable_data_ptr(), cut);

  const Tensor loss = empty_of(logits, shape_of(target), sum_type);
  const Tensor lse = empty_of(logits, shape_of(target), ScalarType::Double);
  TPK_CUDA_CHECK(cuda::launch_combine_stats(dtype, all.const_data_ptr(), comm->world_size(), targets.data,
                                            targets.are_64, loss.mutable_data_ptr(), lse.mutable_data_ptr(), tokens,
                                            vocab_size, ignore_index, label_smoothing, current_stream()));
  return {loss, lse};
}

Tensor vocab_cross_entropy_backward(const Tensor& dloss, const Tensor& logits_shard, const Tensor& target,
                                    const Tensor& lse, int64_t vocab_start, int64_t vocab_size, int64_t ignore_index,
                                    double label_smoothing) {
  const char* const op = "vocab_cross_entropy_backward";
  const Integers targets = integers_of(op, "target", target);
  const Tensor logits = dense(logits_shard);
  const Tensor scale = of_targets("dloss", dloss, sum_type_of(logits), targets);
  const Tensor sums = of_targets("lse", lse, ScalarType::Double, targets);
  const DType dtype = float_dtype_of(op, logits);
  const Tensor dlogits = fresh_output(logits, shape_of(logits));
  TPK_CUDA_CHECK(cuda::launch_loss_gradient(dtype, scale.const_data_ptr(), logits.const_data_ptr(), targets.data,
                                            targets.are_64, sums.const_data_ptr(), dlogits.mutable_data_ptr(),
                                            targets.count, static_cast<size_t>(logits.size(logits.dim() - 1)),
                                            vocab_start, vocab_size, ignore_index, label_smoothing, current_stream()));
  return dlogits;
}

}  // namespace tpk
