// Loops over the threads of torch.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "torch_side/tensor.h"

namespace tpk {

constexpr size_t kGrain = 16384;  // values that are worth a thread of their own

// Calls body(begin, end) for pieces of [0, n), each of `grain` items or more but the last. body must not throw.
template <class Body>
void in_parallel(size_t n, size_t grain, Body&& body) {
  if (n == 0) return;
  torch::stable::parallel_for(
      0, static_cast<int64_t>(n), static_cast<int64_t>(std::max<size_t>(grain, 1)),
      [&](int64_t begin, int64_t end) { body(static_cast<size_t>(begin), static_cast<size_t>(end)); });
}

// The same for items of `values` values each.
template <class Body>
void in_parallel_rows(size_t n, size_t values, Body&& body) {
  in_parallel(n, kGrain / std::max<size_t>(values, 1), body);
}

}  // namespace tpk
