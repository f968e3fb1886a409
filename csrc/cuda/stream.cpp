#include "stream.h"

#include "cuda/comm/device_communicator.h"

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
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

void set_torch_stream(int device, cudaStream_t stream) {
  TORCH_ERROR_CODE_CHECK(torch_set_current_cuda_stream(stream, device));
}

OpScope::OpScope(const Tensor& x) : device_(device_index_of(x)), stream_(torch_stream(device_index_of(x))) {}

OpScope::~OpScope() = default;

}  // namespace cuda

#else

torch::stable::Device device_of(const Communicator&) { return {torch::headeronly::DeviceType::CPU}; }

namespace {

thread_local std::vector<Tensor> kept_tensors;
thread_local std::vector<std::shared_ptr<void> > captured;
thread_local cudaStream_t stream_of_torch = nullptr;

// What went wrong on a stream, for the host thread that waits for it next.
std::mutex failure_mutex;
std::exception_ptr failure;

bool is_capturing() { return cuda::capture_of(cuda::current_stream()) != 0; }

void run_on_stream(const std::function<void()>& work) {
  try {
    aoti_torch_grad_mode_set_enabled(false);  // of the stream's thread
    work();
  } catch (...) {
    std::lock_guard<std::mutex> lock(failure_mutex);
    if (!failure) failure = std::current_exception();
  }
}

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

bool settle_or_capture() {
  if (is_capturing()) return true;
  settle();
  return false;
}

Tensor kept(Tensor x) {
  kept_tensors.push_back(x);
  return x;
}

// Runs `work` when this thread's stream gets there; of a captured one, at every launch.
void on_stream(std::function<void()> work) {
  auto mine = std::make_unique<std::function<void()> >(std::move(work));
  cudaHostFn_t run = [](void* data) {
    const std::unique_ptr<std::function<void()> > once(static_cast<std::function<void()>*>(data));
    run_on_stream(*once);
  };
  if (is_capturing()) {
    run = [](void* data) { run_on_stream(*static_cast<std::function<void()>*>(data)); };
    captured.push_back(std::shared_ptr<std::function<void()> >(std::move(mine)));
    TPK_CUDA_CHECK(cudaLaunchHostFunc(cuda::current_stream(), run, captured.back().get()));
    return;
  }
  TPK_CUDA_CHECK(cudaLaunchHostFunc(cuda::current_stream(), run, mine.release()));
}

void copy_into(Tensor to, const Tensor& from) {
  on_stream([to, from] { make_again(to, from); });
}

namespace cuda {

int device_index_of(const Tensor&) {
  int device = 0;
  TPK_CUDA_CHECK(cudaGetDevice(&device));
  return device;
}

cudaStream_t torch_stream(int) { return stream_of_torch; }

void set_torch_stream(int, cudaStream_t stream) { stream_of_torch = stream; }

OpScope::OpScope(const Tensor& x) : device_(device_index_of(x)), stream_(torch_stream(device_index_of(x))) {}

OpScope::~OpScope() {
  if (is_capturing()) {
    captured.push_back(std::make_shared<std::vector<Tensor> >(kept_tensors));
  } else {
    static_cast<void>(cudaStreamSynchronize(current_stream()));
  }
  kept_tensors.clear();
}

std::vector<std::shared_ptr<void> > take_captured() { return std::exchange(captured, {}); }

}  // namespace cuda

#endif

}  // namespace tpk
