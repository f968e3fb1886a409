// In place of csrc/cuda/stream.cpp and csrc/cuda/backend.cpp: torch's side of the emulated devices.
//
// A device is a rank (cudaSetDevice of the thread), its tensors are torch's CPU tensors, and its current stream is the
// default stream or, while a graph is captured, that of set_torch_stream in this thread.
#include <exception>
#include <mutex>

#include "cuda/stream.h"
#include "torch_side/backend.h"

namespace tpk {
namespace {

thread_local std::vector<Tensor> kept_tensors;
thread_local std::vector<std::shared_ptr<void>> captured;
thread_local cudaStream_t stream_of_torch = nullptr;
thread_local std::vector<int> product_limits;

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

Tensor fresh_output(const Tensor& like, const Shape& shape) { return empty_of(like, shape); }

torch::stable::Device device_of(const Communicator&) { return {torch::headeronly::DeviceType::CPU}; }

Tensor kept(Tensor x) {
  kept_tensors.push_back(x);
  return x;
}

void in_order(std::function<void()> work) {
  auto mine = std::make_unique<std::function<void()>>(std::move(work));
  cudaHostFn_t run = [](void* data) {
    const std::unique_ptr<std::function<void()>> once(static_cast<std::function<void()>*>(data));
    run_on_stream(*once);
  };
  if (is_capturing()) {
    run = [](void* data) { run_on_stream(*static_cast<std::function<void()>*>(data)); };
    captured.push_back(std::shared_ptr<std::function<void()>>(std::move(mine)));
    TPK_CUDA_CHECK(cudaLaunchHostFunc(cuda::current_stream(), run, captured.back().get()));
    return;
  }
  TPK_CUDA_CHECK(cudaLaunchHostFunc(cuda::current_stream(), run, mine.release()));
}

namespace emu {

// The error of a device that gave up is not thrown here: the communicator reports it.
void synchronize_stream() {
  static_cast<void>(cudaStreamSynchronize(cuda::current_stream()));
  std::exception_ptr raised;
  {
    std::lock_guard<std::mutex> lock(failure_mutex);
    std::swap(raised, failure);
  }
  if (raised) std::rethrow_exception(raised);
}

bool captures_or_synchronize() {
  if (is_capturing()) return true;
  synchronize_stream();
  return false;
}

std::vector<int> take_product_limits() { return std::exchange(product_limits, {}); }

std::vector<std::shared_ptr<void>> take_captured() { return std::exchange(captured, {}); }

}  // namespace emu

namespace cuda {

int device_index_of(const Tensor&) {
  int device = 0;
  TPK_CUDA_CHECK(cudaGetDevice(&device));
  return device;
}

cudaStream_t torch_stream(int) { return stream_of_torch; }

void set_torch_stream(int, cudaStream_t stream) { stream_of_torch = stream; }

void limit_products(int multiprocessors) { product_limits.push_back(multiprocessors); }

OpScope::OpScope(const Tensor& x) : device_(device_index_of(x)), stream_(torch_stream(device_index_of(x))) {}

OpScope::~OpScope() {
  if (is_capturing()) {
    captured.push_back(std::make_shared<std::vector<Tensor>>(kept_tensors));
  } else {
    static_cast<void>(cudaStreamSynchronize(current_stream()));
  }
  kept_tensors.clear();
}

}  // namespace cuda
}  // namespace tpk
