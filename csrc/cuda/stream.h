// The device and the stream that an op works on: those that torch has for its tensors. Torch side.
//
// In the emulator a device is a rank (cudaSetDevice of the thread), its tensors are torch's CPU tensors, and its
// current stream is the default stream or, while a graph is captured, what set_torch_stream said in this thread.
#pragma once

#include "../torch_side/backend.h"
#include "cuda/comm/runtime.h"

namespace tpk::cuda {

int device_index_of(const Tensor& x);
// torch's current stream of a device.
cudaStream_t torch_stream(int device);
// Makes a stream torch's current one of a device.
void set_torch_stream(int device, cudaStream_t stream);

// Around every op: what it launches goes to the current stream of x's device.
class OpScope {
 public:
  explicit OpScope(const Tensor& x);
  ~OpScope();
  OpScope(const OpScope&) = delete;
  OpScope& operator=(const OpScope&) = delete;

 private:
  DeviceScope device_;
  StreamScope stream_;
};

#if defined(TPK_EMU)
// What this thread's captured ops made and call; it must live as long as their graph.
std::vector<std::shared_ptr<void>> take_captured();
#endif

// Calls an op that writes into its last operand, in the order of this thread's stream. Not for the host: nothing waits.
template <class... Args>
void call_on_stream(const char* name, const char* overload, const Args&... args) {
#if defined(TPK_EMU)
  on_stream([=] {
    std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
    call_op(name, overload, stack.data());
  });
#else
  call(name, overload, args...);
#endif
}

}  // namespace tpk::cuda
