// The CUDA runtime as the host side uses it: errors that name the call, this thread's stream, events, what a device is.
// Torch-free. The emulator (tests/csrc/emu) defines the runtime functions that are called here.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace tpk::cuda {

// A call of the runtime failed; the text names the call.
struct CudaError : std::runtime_error {
  CudaError(cudaError_t error, const char* call);
  cudaError_t code;
};

inline void check_cuda(cudaError_t error, const char* call) {
  if (error != cudaSuccess) throw CudaError(error, call);
}

#define TPK_CUDA_CHECK(call) ::tpk::cuda::check_cuda((call), #call)

// What launches of this thread go to: the stream of the innermost StreamScope. The torch side opens one with the
// current stream of the tensors' device; a pipeline opens one with the communication stream.
cudaStream_t current_stream();

class StreamScope {
 public:
  explicit StreamScope(cudaStream_t stream);
  ~StreamScope();
  StreamScope(const StreamScope&) = delete;
  StreamScope& operator=(const StreamScope&) = delete;

 private:
  cudaStream_t before_;
};

// The multiprocessors that products of this thread may take, 0: all. Those of the innermost ProductScope.
int product_multiprocessors();

class ProductScope {
 public:
  explicit ProductScope(int multiprocessors);
  ~ProductScope();
  ProductScope(const ProductScope&) = delete;
  ProductScope& operator=(const ProductScope&) = delete;

 private:
  int before_;
};

// The current device of this thread, put back at the end.
class DeviceScope {
 public:
  explicit DeviceScope(int device);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// Which capture into a CUDA graph a stream takes part in; 0: none.
constexpr uint64_t kInvalidCapture = ~uint64_t{0};
uint64_t capture_of(cudaStream_t stream);

// Orders streams and measures nothing.
class Event {
 public:
  Event();
  ~Event();
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  // What is enqueued on `later` from now on waits for what is enqueued on `earlier` now.
  void order(cudaStream_t earlier, cudaStream_t later);

 private:
  cudaEvent_t event_ = nullptr;
};

// A stream of its own, of the highest priority: transfers should not queue behind products.
class PriorityStream {
 public:
  PriorityStream();
  ~PriorityStream();
  PriorityStream(const PriorityStream&) = delete;
  PriorityStream& operator=(const PriorityStream&) = delete;
  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

// Host memory that the device reads and writes in place; zero at first.
class PinnedMemory {
 public:
  explicit PinnedMemory(size_t bytes);
  ~PinnedMemory();
  PinnedMemory(const PinnedMemory&) = delete;
  PinnedMemory& operator=(const PinnedMemory&) = delete;
  void* on_host() const { return host_; }
  void* on_device() const { return device_; }

 private:
  void* host_ = nullptr;
  void* device_ = nullptr;
};

struct DeviceInfo {
  int arch;             // 90 for compute capability 9.0
  int multiprocessors;  // SMs
};
DeviceInfo device_info(int device);

}  // namespace tpk::cuda
