// An op with the device and the stream of its first tensor around it: set before it does anything.
#pragma once

#include <utility>

#include "stream.h"

namespace tpk::cuda {

// The first tensor among the arguments; every op has one.
template <class First, class... Rest>
const Tensor& first_tensor(const First& first, const Rest&... rest) {
  if constexpr (std::is_same_v<First, Tensor>) {
    return first;
  } else if constexpr (std::is_same_v<First, std::vector<Tensor>>) {
    TPK_CHECK(!first.empty(), "an op on a list of tensors needs one at least, got none");
    return first.front();
  } else {
    return first_tensor(rest...);
  }
}

template <auto op>
struct ScopedOp;

template <class Result, class... Args, Result (*op)(Args...)>
struct ScopedOp<op> {
  static Result call(Args... args) {
    const OpScope scope(first_tensor(args...));
    return op(std::forward<Args>(args)...);
  }
};

}  // namespace tpk::cuda
