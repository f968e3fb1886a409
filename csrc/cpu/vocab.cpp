#include "torch_side/vocab.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "core/bytes.h"
#include "cpu/loops/softmax.h"
#include "parallel.h"
#include "torch_side/collectives.h"

namespace tpk {
namespace {

// --- loss

void check_targets(const Integers& targets, int64_t vocab_size, int64_t ignore_index) {
  for (size_t i = 0; i < targets.count; ++i) {
    TPK_CHECK(targets[i] == ignore_index || (targets[i] >= 0 && targets[i] < vocab_size),
              "vocab_cross_entropy: target must be in [0, ", vocab_size, ") or ignore_index (", ignore_index, "), got ",
              targets[i], " at token ", i);
  }
}

template <class T>
std::vector<RowStats<SumOf<T>>> local_stats(const Tensor& logits, const Integers& targets, int64_t vocab_start,
                                            bool smoothing) {
  std::vector<RowStats<SumOf<T>>> stats(targets.count);
  const size_t shard = static_cast<size_t>(logits.size(logits.dim() - 1));
  const T* const all = static_cast<const T*>(logits.const_data_ptr());
  in_parallel_rows(targets.count, shard, [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) {
      const T* const row = all + i * shard;
      row_stats<T>(row, shard, smoothing, &stats[i]);
      const int64_t local = targets[i] - vocab_start;
      if (local >= 0 && local < static_cast<int64_t>(shard)) stats[i].target = load(row[local]);
    }
  });
  return stats;
}

// Every rank's stats of every token, [R][tokens], so that all ranks take the same sums in the same order.
template <class Stats>
std::vector<Stats> gather_stats(Communicator& comm, const std::vector<Stats>& mine, int64_t vocab_size) {
  constexpr size_t kNumbers = 4;
  const Wire& wire =
      wire_of(sizeof(Stats) == kNumbers * sizeof(float) ? DType::F32 : DType::F64, Codec::None, ReduceOp::Sum);
  std::vector<Stats> all(mine.size() * static_cast<size_t>(comm.world_size()));
  const std::vector<int64_t> sizes(static_cast<size_t>(comm.world_size()),
                                   static_cast<int64_t>(mine.size() * kNumbers));
  const Cut cut = Cut::of_sizes(sizes);
  comm.all_gather(spec_of(Op::VocabCrossEntropy, wire, cut.total(), {vocab_size}, sizes.front()), wire, mine.data(),
                  all.data(), cut);
  return all;
}

template <class Sum>
void combine_stats(const std::vector<RowStats<Sum>>& all, const Integers& targets, int64_t vocab_size,
                   int64_t ignore_index, Sum smoothing, Sum* loss, double* lse) {
  const size_t tokens = targets.count, ranks = tokens == 0 ? 0 : all.size() / tokens;
  for (size_t i = 0; i < tokens; ++i) {
    Sum largest = -std::numeric_limits<Sum>::infinity();
    for (size_t r = 0; r < ranks; ++r) largest = std::max(largest, all[r * tokens + i].largest);
    Sum exponents = 0, target = 0, total = 0;
    for (size_t r = 0; r < ranks; ++r) {
      const RowStats<Sum>& row = all[r * tokens + i];
      const bool empty = row.largest == -std::numeric_limits<Sum>::infinity() && row.exponents == 0;
      // A NaN in any logit is in `exponents` and stays visible.
      exponents += empty ? Sum(0) : row.exponents * std::exp(row.largest - largest);
      target += row.target;
      total += row.total;
    }
    lse[i] = static_cast<double>(largest) + std::log(static_cast<double>(exponents));
    // Differences of logits first: they are small where the logits themselves are large.
    loss[i] = std::log(exponents) + (1 - smoothing) * (largest - target);
    if (smoothing != 0) loss[i] += smoothing * (largest - total / static_cast<Sum>(vocab_size));
    if (targets[i] == ignore_index) loss[i] = 0;
  }
}

template <class T>
void loss_gradient(const Tensor& dloss, const Tensor& logits, const Integers& targets, const Tensor& lse,
                   int64_t vocab_start, int64_t vocab_size, int64_t ignore_index, double label_smoothing,
                   Tensor& dlogits) {
  using Sum = SumOf<T>;
  const size_t shard = static_cast<size_t>(logits.size(logits.dim() - 1));
  const Sum smoothing = static_cast<Sum>(label_smoothing), uniform = smoothing / static_cast<Sum>(vocab_size);
  const Sum* scale = static_cast<const Sum*>(dloss.const_data_ptr());
  const double* row_lse = static_cast<const double*>(lse.const_data_ptr());
  const T* const all = static_cast<const T*>(logits.const_data_ptr());
  T* const gradients = static_cast<T*>(dlogits.mutable_data_ptr());
  in_parallel_rows(targets.count, shard, [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) {
      const T* const row = all + i * shard;
      T* const gradient = gradients + i * shard;
      if (targets[i] == ignore_index) {
        if (shard > 0) std::memset(static_cast<void*>(gradient), 0, shard * sizeof(T));
        continue;
      }
      const LogSum<Sum> of_row(row_lse[i]);
      row_gradient<T>(row, shard, of_row, uniform, scale[i], gradient);
      const int64_t local = targets[i] - vocab_start;
      if (local < 0 || local >= static_cast<int64_t>(shard)) continue;
      const Sum likely = std::exp(Sum(load(row[local]) - of_row.near) - of_row.rest);
      store(scale[i] * (likely - (1 - smoothing) - uniform), &gradient[local]);
    }
  });
}

// --- embedding

// Bytes of a copy that are worth a thread of their own: about 50 us.
constexpr size_t kCopyGrain = size_t{512} << 10;
// Columns of a row that are worth a thread of their own.
constexpr size_t kFewestColumns = 64;

// Threads share the columns, so that every sum is taken in the order of the tokens.
template <class T>
void add_rows(const Tensor& dy, const Integers& ids, int64_t vocab_start, int64_t shard, Tensor& sums) {
  using Sum = SumOf<T>;
  const size_t width = static_cast<size_t>(dy.size(dy.dim() - 1));
  const T* const rows = static_cast<const T*>(dy.const_data_ptr());
  Sum* const table = static_cast<Sum*>(sums.mutable_data_ptr());
  in_parallel(width, std::max(kFewestColumns, kGrain / std::max<size_t>(ids.count, 1)), [&](size_t begin, size_t end) {
    for (size_t i = 0; i < ids.count; ++i) {
      const int64_t local = ids[i] - vocab_start;
      if (local < 0 || local >= shard) continue;
      const T* const from = rows + i * width;
      Sum* const to = table + static_cast<size_t>(local) * width;
      for (size_t j = begin; j < end; ++j) to[j] += load(from[j]);
    }
  });
}

}  // namespace

Tensor vocab_embedding(const Tensor& ids, const Tensor& table_shard, Text group, int64_t world_size,
                       int64_t vocab_start, int64_t vocab_size) {
  const auto comm = communicator_of(Op::VocabEmbedding, group, world_size);
  TPK_CHECK(table_shard.dim() == 2, "vocab_embedding: table_shard must have 2 dims [vocabulary shard, D], got shape ",
            text_of(shape_of(table_shard)));
  const int64_t shard = table_shard.size(0);
  check_shard("vocab_embedding", vocab_start, shard, vocab_size);
  const Wire& wire = wire_for(Op::VocabEmbedding, table_shard, "none");
  const Integers rows = integers_of("vocab_embedding", "ids", ids);
  const Tensor table = dense(table_shard);
  Shape shape = shape_of(ids);
  shape.push_back(table.size(1));
  Tensor out = fresh_output(table, shape);
  const size_t row_bytes = static_cast<size_t>(table.size(1)) * table.element_size();
  for (size_t i = 0; i < rows.count; ++i) {
    TPK_CHECK(rows[i] >= 0 && rows[i] < vocab_size, "vocab_embedding: ids must be in [0, ", vocab_size, "), got ",
              rows[i], " at token ", i);
  }
  const void* const from = table.const_data_ptr();
  void* const to = out.mutable_data_ptr();
  const size_t copies = row_bytes == 0 ? 0 : rows.count;
  in_parallel(copies, kCopyGrain / std::max<size_t>(row_bytes, 1), [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) {
      const int64_t local = rows[i] - vocab_start;
      if (local >= 0 && local < shard) {
        std::memcpy(at(to, i * row_bytes), at(from, static_cast<size_t>(local) * row_bytes), row_bytes);
      } else {
        std::memset(at(to, i * row_bytes), 0, row_bytes);
      }
    }
  });
  all_reduce_into(Op::VocabEmbedding, *comm, wire, out, out);
  return out;
}

Tensor vocab_embedding_backward(const Tensor& dy, const Tensor& ids, int64_t vocab_start, int64_t shard_size) {
  const Integers rows = integers_of("vocab_embedding_backward", "ids", ids);
  const Tensor gradient = dense(dy);
  const bool half = gradient.element_size() == 2;  // summed in fp32, rounded once
  Tensor sums = empty_of(gradient, {shard_size, gradient.size(gradient.dim() - 1)},
                         half ? ScalarType::Float : gradient.scalar_type());
  torch::stable::zero_(sums);
  with_float_type("vocab_embedding_backward", gradient,
                  [&](auto type) { add_rows<decltype(type)>(gradient, rows, vocab_start, shard_size, sums); });
  return half ? torch::stable::to(sums, gradient.scalar_type()) : sums;
}

std::tuple<Tensor, Tensor> vocab_cross_entropy(const Tensor& logits_shard, const Tensor& target, Text group,
                                               int64_t world_size, int64_t vocab_start, int64_t vocab_size,
                                               int64_t ignore_index, double label_smoothing) {
  const auto comm = communicator_of(Op::VocabCrossEntropy, group, world_size);
  TPK_CHECK(logits_shard.dim() == target.dim() + 1,
            "vocab_cross_entropy: logits_shard must have one dim more than target, "
            "got shapes ",
            text_of(shape_of(logits_shard)), " and ", text_of(shape_of(target)));
  check_shard("vocab_cross_entropy", vocab_start, logits_shard.size(logits_shard.dim() - 1), vocab_size);
  const Integers targets = integers_of("vocab_cross_entropy", "target", target);
  TPK_CHECK(static_cast<int64_t>(targets.count) == num_rows(logits_shard),
            "vocab_cross_entropy: logits_shard and target must have the same tokens, got shapes ",
            text_of(shape_of(logits_shard)), " and ", text_of(shape_of(target)));
  check_targets(targets, vocab_size, ignore_index);
  const Tensor logits = dense(logits_shard);
  const ScalarType sum_type = sum_type_of(logits);
  Tensor loss = empty_of(logits, shape_of(target), sum_type);
  Tensor lse = empty_of(logits, shape_of(target), ScalarType::Double);
  with_float_type("vocab_cross_entropy", logits, [&](auto type) {
    using T = decltype(type);
    using Sum = SumOf<T>;
    const auto all =
        gather_stats(*comm, local_stats<T>(logits, targets, vocab_start, label_smoothing != 0), vocab_size);
    combine_stats<Sum>(all, targets, vocab_size, ignore_index, static_cast<Sum>(label_smoothing),
                       static_cast<Sum*>(loss.mutable_data_ptr()), static_cast<double*>(lse.mutable_data_ptr()));
  });
  return {loss, lse};
}

Tensor vocab_cross_entropy_backward(const Tensor& dloss, const Tensor& logits_shard, const Tensor& target,
                                    const Tensor& lse, int64_t vocab_start, int64_t vocab_size, int64_t ignore_index,
                                    double label_smoothing) {
  const Integers targets = integers_of("vocab_cross_entropy_backward", "target", target);
  const Tensor logits = dense(logits_shard);
  const Tensor scale = of_targets("dloss", dloss, sum_type_of(logits), targets);
  const Tensor sums = of_targets("lse", lse, ScalarType::Double, targets);
  Tensor dlogits = fresh_output(logits, shape_of(logits));
  with_float_type("vocab_cross_entropy_backward", logits, [&](auto type) {
    loss_gradient<decltype(type)>(scale, logits, targets, sums, vocab_start, vocab_size, ignore_index, label_smoothing,
                                  dlogits);
  });
  return dlogits;
}

}  // namespace tpk
