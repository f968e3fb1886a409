// What the row loops share: values are read in T, everything else is the type of its sums: float, or double for
// double. Torch-free.
#pragma once

#include <cstddef>

#include "core/codec/sum.h"
#include "core/simd.h"

namespace tpk {

template <class T>
using SumOf = typename Sum<T>::type;

constexpr size_t kLanes = 16;  // independent partial sums, so that the loops become vector code

template <class T>
TPK_INLINE SumOf<T> load(T value) {
  return Sum<T>::in(value);
}

template <class T>
TPK_INLINE void store(SumOf<T> value, T* to) {
  *to = Sum<T>::out(value);
}

template <class S>
TPK_INLINE S sum_of_lanes(S* lanes) {
  for (size_t width = kLanes / 2; width > 0; width /= 2) {
    for (size_t l = 0; l < width; ++l) lanes[l] += lanes[l + width];
  }
  return lanes[0];
}

}  // namespace tpk
