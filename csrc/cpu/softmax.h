// The row loops of the vocabulary-parallel loss. Torch-free. Values are read in T, everything else is Sum: float, or
// double for double.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../codec/half.h"

namespace tpk {

template <class T>
struct LossSum {
  using type = float;
};
template <>
struct LossSum<double> {
  using type = double;
};

// What one rank knows of a row: with these four numbers of every rank the loss is known to all.
template <class Sum>
struct RowStats {
  Sum largest;    // of this rank's logits
  Sum exponents;  // sum of exp(logit - largest)
  Sum target;     // the target's logit, where this rank has it, else 0
  Sum total;      // sum of the logits, for label smoothing
};

template <class T>
void row_stats(const T* logits, size_t n, bool smoothing, RowStats<typename LossSum<T>::type>* stats);

// gradient[j] = scale * (exp(logits[j] - lse) - uniform); the target's own term is the caller's.
template <class T>
void row_gradient(const T* logits, size_t n, typename LossSum<T>::type lse, typename LossSum<T>::type uniform,
                  typename LossSum<T>::type scale, T* gradient);

}  // namespace tpk
