// The row loops of the vocabulary-parallel loss. Torch-free. Values are read in T, everything else is Sum: float, or
// double for double.
#pragma once

#include <cstddef>
#include <cstdint>

#include "lanes.h"

namespace tpk {

// The statistics of one rank of a row: the loss is a function of these four numbers of every rank.
template <class Sum>
struct RowStats {
  Sum largest;    // of this rank's logits
  Sum exponents;  // sum of exp(logit - largest)
  Sum target;     // the target's logit, where this rank has it, else 0
  Sum total;      // sum of the logits, for label smoothing
};

template <class T>
void row_stats(const T* logits, size_t n, bool smoothing, RowStats<SumOf<T>>* stats);

// log sum exp of a row as two numbers, which fp32 alone would round to the spacing of its logits.
template <class Sum>
struct LogSum {
  explicit LogSum(double lse) : near(static_cast<Sum>(lse)), rest(static_cast<Sum>(lse - near)) {}
  Sum near, rest;
};

// gradient[j] = scale * (exp(logits[j] - lse) - uniform); the target's own term is the caller's.
template <class T>
void row_gradient(const T* logits, size_t n, LogSum<SumOf<T>> lse, SumOf<T> uniform, SumOf<T> scale, T* gradient);

}  // namespace tpk
