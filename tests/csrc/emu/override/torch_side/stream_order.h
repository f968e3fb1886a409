// In place of csrc/torch_side/stream_order.h. An emulated device works on tensors of the host, which ATen reads, writes
// and frees at once: so ATen is called when this thread's stream is empty, and what an op makes is kept until the op
// has ended. While a graph is captured, what ATen makes is made again whenever the graph is launched, in the same
// memory.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <functional>
#include <memory>
#include <utility>
#include <vector>

namespace tpk {

using torch::stable::Tensor;

Tensor kept(Tensor x);
// Runs `work` when this thread's stream is there; of a captured stream, at every launch.
void in_order(std::function<void()> work);

namespace emu {

// Waits for this thread's stream; throws what went wrong there.
void synchronize_stream();
// The same but in a capture, where nothing runs. Returns whether it is one.
bool captures_or_synchronize();
// What this thread's captured ops made and call; it must live as long as their graph.
std::vector<std::shared_ptr<void>> take_captured();
// What this thread's products were limited to, call by call, since this was last asked.
std::vector<int> take_product_limits();

inline void keep(const Tensor& x) { kept(x); }
inline void keep(const std::pair<Tensor, Tensor>& xs) { kept(xs.first), kept(xs.second); }
inline void copy(const Tensor& from, Tensor to) { torch::stable::copy_(to, from); }
inline void copy(const std::pair<Tensor, Tensor>& from, const std::pair<Tensor, Tensor>& to) {
  copy(from.first, to.first), copy(from.second, to.second);
}

}  // namespace emu

template <class Make>
auto made(Make make) {
  const bool captures = emu::captures_or_synchronize();
  const auto out = make();
  emu::keep(out);
  if (captures) in_order([=] { emu::copy(make(), out); });
  return out;
}

}  // namespace tpk
