// The row loops of a decoding step beside its products: rotation, attention of one token, the gate. Torch-free. Values
// are read in T, sums are float, results are rounded to T once.
#pragma once

#include <cstddef>

#include "lanes.h"

namespace tpk {

// heads[h][head_dim] in place: y[j] = x[j] cos[j] - x[j + d/2] sin[j] in the first half, and
// y[j] = x[j] cos[j] + x[j - d/2] sin[j] in the second.
template <class T>
void rotate_heads(T* heads, size_t count, size_t head_dim, const T* cos, const T* sin);

// The keys and values of one head of a sequence, [tokens, head_dim] each.
template <class T>
struct CachedHead {
  const T *keys, *values;
  size_t tokens, head_dim;
};
// y = sum_t softmax_t(scale q . keys[t]) values[t];  scores and sums have room for `tokens` and head_dim floats.
template <class T>
void attend(const T* q, const CachedHead<T>& head, float scale, float* scores, float* sums, T* y);

// y[j] = gate[j] / (1 + exp(-gate[j])) up[j]
template <class T>
void gate_rows(const T* gate, const T* up, size_t n, T* y);

}  // namespace tpk
