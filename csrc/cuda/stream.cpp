#include "stream.h"

#include "device_communicator.h"

#if defined(TPK_EMU)
#include <exception>
#include <mutex>
#endif

namespace tpk {

Tensor fresh_output(const Tensor& like, const Shape& shape) { return empty_of(like, shape); }

#if !defined(TPK_EMU)

torch::stable::Device device_of(const Communicator& comm) {
  return {torch::headeronly::DeviceType::CUDA, static_cast<const cuda::DeviceCommunicator&>(comm).device()};
}

namespace cuda {

int device_index_of(const Tensor& x) { return x.get_device_index(); }

cudaStream_t torch_stream(int device) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

void set_torch_stream(int device, cudaStream_t stream) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_set_current_cuda_stream(stream, device));
}

OpScope::OpScope(const Tensor& x) : device_(device_index_of(x)), stream_(torch_stream(device_index_of(x))) {}

OpScope::~OpScope() = default;

}  // namespace cuda

#else

torch::stable::Device device_of(const Communicator&) { return {torch::headeronly::DeviceType::CPU}; }

namespace {

thread_local std::vector<Tensor> kept_tensors;

// What went wrong on a stream, for the host thread that waits for it next.
std::mutex failure_mutex;
std::exception_ptr failure;

}  // namespace

// A device that gave up is the communicator's to report.
void settle() {
  static_cast<void>(cudaStreamSynchronize(cuda::current_stream()));
  std::exception_ptr raised;
  {
    std::lock_guard<std::mutex> lock(failure_mutex);
    std::swap(raised, failure);
  }
  if (raised) std::rethrow_exception(raised);
}

Tensor kept(Tensor x) {
  kept_tensors.push_back(x);
  return x;
}

namespace cuda {

int device_index_of(const Tensor&) {
  int device = 0;
  TPK_CUDA_CHECK(cudaGetDevice(&device));
  return device;
}

cudaStream_t torch_stream(int) { return nullptr; }

void set_torch_stream(int, cudaStream_t) {}

OpScope::OpScope(const Tensor& x) : device_(device_index_of(x)), stream_(nullptr) {}

OpScope::~OpScope() {
  static_cast<void>(cudaStreamSynchronize(current_stream()));
  kept_tensors.clear();
}

void on_stream(std::function<void()> work) {
  const auto run = [](void* data) {
    const std::unique_ptr<std::function<void()> > mine(static_cast<std::function<void()>*>(data));
    try {
      aoti_torch_grad_mode_set_enabled(false);  // of the stream's thread
      (*mine)();
    } catch (...) {
      std::lock_guard<std::mutex> lock(failure_mutex);
      if (!failure) failure = std::current_exception();
    }
  };
  auto mine = std::make_unique<std::function<void()> >(std::move(work));
  TPK_CUDA_CHECK(cudaLaunchHostFunc(current_stream(), run, mine.release()));
}

}  // namespace cuda

#endif

}  // namespace tpk
