// Vocabulary-parallel embedding and cross-entropy (schemas and formulas in schemas.cpp).
#pragma once

#include <tuple>

#include "tensor.h"

namespace tpk {

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
