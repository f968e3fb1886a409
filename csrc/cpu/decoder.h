// One step of a whole decoder: tokens of several sequences, one of each or a prompt, through all its layers.
// Torch-free.
//
//   n = rms_norm(x) input_norm;  q, k, v = n @ w.T (+ bias), q and k rotated;  k and v into the cache of the row's slot
//   x = x + sum_r attention(q, keys, values) @ o_r.T
//   n = rms_norm(x) post_norm;   x = x + sum_r (silu(n @ gate.T) n @ up.T) @ down_r.T
//
// All weights are this rank's shards, read where they lie: nothing is copied or kept between steps. A row has the same
// bits whatever rows are beside it, so that a prompt gives what its tokens give one by one.
#pragma once

#include <functional>
#include <vector>

#include "core/communicator.h"

namespace tpk {

struct DecoderLayer {
  const void *input_norm, *post_norm;    // [width]
  const void *q, *k, *v;                 // [heads * head_dim, width]
  const void *q_bias, *k_bias, *v_bias;  // or nullptr
  const void* o;                         // [width, query_heads * head_dim]
  const void *gate, *up;                 // [inner, width]
  const void* down;                      // [width, inner]
  void *keys, *values;                   // [slots, kv_heads, max_length, head_dim]
  size_t query_heads, kv_heads, inner;
  float input_eps, post_eps, scale;
};

struct DecoderStep {
  DType dtype;
  size_t rows, width, head_dim, slots, max_length;
  // [rows], of the tokens: the cache holds what is before, or it is among the rows. No two rows have the same place.
  const int64_t *row_slots, *positions;
  const void *cos, *sin;  // [rows, head_dim]
  const void* last_norm;  // [width]
  float last_eps;
  const void* x;  // [rows, width]
  void* y;        // [rows, width]: rms_norm(x behind the last layer) last_norm
};

// Calls body(begin, end) for pieces of [0, n), on threads of this rank where it has several.
using ParallelFor = std::function<void(size_t n, size_t grain, const std::function<void(size_t, size_t)>& body)>;

void decode_step(Communicator& comm, const DecoderStep& step, const std::vector<DecoderLayer>& layers,
                 const ParallelFor& parallel_for);

}  // namespace tpk
