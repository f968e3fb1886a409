// The device and the stream that an op works on: those that torch has for its tensors. Torch side.
#pragma once

#include "cuda/comm/runtime.h"
#include "torch_side/tensor.h"

namespace tpk::cuda {

int device_index_of(const Tensor& x);
// torch's current stream of a device.
cudaStream_t torch_stream(int device);
// Makes a stream torch's current one of a device.
void set_torch_stream(int device, cudaStream_t stream);

// Of products that this thread asks torch for from now on: so many multiprocessors, 0: all. Only a hint for speed:
// those that cuBLAS takes; torch's cuBLASLt ways (a product with a bias) do not ask for it.
void limit_products(int multiprocessors);

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

// Calls an op that writes into its last operand, in the order of this thread's stream. Not for the host: nothing waits.
template <class... Args>
void call_on_stream(const char* name, const char* overload, const Args&... args) {
  in_order([=] {
    std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
    call_op(name, overload, stack.data());
  });
}

}  // namespace tpk::cuda
