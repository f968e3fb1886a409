// How calls of ATen are ordered with what an op enqueues itself. Torch does it, by its current stream: nothing to do
// here.
//
// The emulated build has tests/csrc/emu/override/torch_side/stream_order.h in place of this file.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace tpk {

// x, alive until everything that the op enqueues is done.
inline torch::stable::Tensor kept(torch::stable::Tensor x) { return x; }

// The result of make(), which calls ATen. make() must do the same when it is called again.
template <class Make>
auto made(Make&& make) {
  return make();
}

// Runs work(), which calls ATen, behind everything that the op has enqueued.
template <class Work>
void in_order(Work&& work) {
  work();
}

}  // namespace tpk
