// Vocabulary-parallel embedding and cross-entropy (schemas and formulas in schemas.cpp).
#pragma once

#include <tuple>

#include "tensor.h"

namespace tpk {

// An argument of integers, int64 or int32, as they are in memory.
struct Integers {
  Tensor values;  // contiguous
  const void* data;
  size_t count;
  bool are_64;

  // Where the host can read them.
  int64_t operator[](size_t i) const {
    return are_64 ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

inline Integers integers_of(const char* op, const char* argument, const Tensor& x) {
  const DType dtype = dtype_of(x);
  TPK_CHECK(dtype == DType::I64 || dtype == DType::I32, op, ": ", argument, " must be int64 or int32, got ",
            dtype == DType::Count ? "another dtype" : name_of(dtype));
  const Tensor values = dense(x);
  return {values, values.const_data_ptr(), numel_of(values), dtype == DType::I64};
}

inline void check_shard(const char* op, int64_t vocab_start, int64_t shard, int64_t vocab_size) {
  TPK_CHECK(vocab_start >= 0 && vocab_start + shard <= vocab_size, op, ": the shard [", vocab_start, ", ",
            vocab_start + shard, ") must lie inside the vocabulary of ", vocab_size);
}

// What the backward of the loss reads, dense: dloss in the type of the loss, lse in fp64, one of each for every target.
inline Tensor of_targets(const char* argument, const Tensor& x, ScalarType type, const Integers& targets) {
  TPK_CHECK(x.scalar_type() == type && numel_of(x) == targets.count, "vocab_cross_entropy_backward: ", argument,
            " must be ", type == ScalarType::Double ? "float64" : "float32", ", one for each of ", targets.count,
            " targets, got ", numel_of(x), " of ",
            dtype_of(x) == DType::Count ? "another dtype" : name_of(dtype_of(x)));
  return dense(x);
}

Tensor vocab_embedding(const Tensor& ids, const Tensor& table_shard, Text group, int64_t world_size,
                       int64_t vocab_start, int64_t vocab_size);
Tensor vocab_embedding_backward(const Tensor& dy, const Tensor& ids, int64_t vocab_start, int64_t shard_size);
std::tuple<Tensor, Tensor> vocab_cross_entropy(const Tensor& logits_shard, const Tensor& target, Text group,
                                               int64_t world_size, int64_t vocab_start, int64_t vocab_size,
                                               int64_t ignore_index, double label_smoothing);
Tensor vocab_cross_entropy_backward(const Tensor& dloss, const Tensor& logits_shard, const Tensor& target,
                                    const Tensor& lse, int64_t vocab_start, int64_t vocab_size, int64_t ignore_index,
                                    double label_smoothing);

}  // namespace tpk
