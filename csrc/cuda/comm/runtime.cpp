#include "runtime.h"

#include <cstring>

#include "core/check.h"

namespace tpk::cuda {
namespace {

thread_local cudaStream_t stream_of_thread = nullptr;
thread_local int products_of_thread = 0;

// In destructors, where an error has nowhere to go: the runtime may be gone already.
void ignore(cudaError_t) {}

}  // namespace

CudaError::CudaError(cudaError_t error, const char* call)
    : std::runtime_error(concat(call, " failed: ", cudaGetErrorString(error), " (", cudaGetErrorName(error), ")")),
      code(error) {}

cudaStream_t current_stream() { return stream_of_thread; }

StreamScope::StreamScope(cudaStream_t stream) : before_(stream_of_thread) { stream_of_thread = stream; }

StreamScope::~StreamScope() { stream_of_thread = before_; }

int product_multiprocessors() { return products_of_thread; }

ProductScope::ProductScope(int multiprocessors) : before_(products_of_thread) { products_of_thread = multiprocessors; }

ProductScope::~ProductScope() { products_of_thread = before_; }

DeviceScope::DeviceScope(int device) {
  TPK_CUDA_CHECK(cudaGetDevice(&before_));
  if (before_ == device) return;
  TPK_CUDA_CHECK(cudaSetDevice(device));
  changed_ = true;
}

DeviceScope::~DeviceScope() {
  if (changed_) ignore(cudaSetDevice(before_));
}

uint64_t capture_of(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  const cudaError_t error = cudaStreamGetCaptureInfo(stream, &status, &id);
  if (error == cudaErrorStreamCaptureImplicit) {  // the legacy stream, while another one is captured
    ignore(cudaGetLastError());
    return 0;
  }
  check_cuda(error, "cudaStreamGetCaptureInfo(stream)");
  // One that an error has ended has no id any more, and still nothing can be waited for.
  return status == cudaStreamCaptureStatusNone ? 0 : status == cudaStreamCaptureStatusActive ? id : kInvalidCapture;
}

Event::Event() { TPK_CUDA_CHECK(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming)); }

Event::~Event() {
  if (event_ != nullptr) ignore(cudaEventDestroy(event_));
}

void Event::order(cudaStream_t earlier, cudaStream_t later) {
  TPK_CUDA_CHECK(cudaEventRecord(event_, earlier));
  TPK_CUDA_CHECK(cudaStreamWaitEvent(later, event_, 0));
}

PriorityStream::PriorityStream() {
  int lowest = 0, highest = 0;
  TPK_CUDA_CHECK(cudaDeviceGetStreamPriorityRange(&lowest, &highest));
  TPK_CUDA_CHECK(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, highest));
}

PriorityStream::~PriorityStream() {
  if (stream_ != nullptr) ignore(cudaStreamDestroy(stream_));
}

PinnedMemory::PinnedMemory(size_t bytes) {
  TPK_CUDA_CHECK(cudaHostAlloc(&host_, bytes, cudaHostAllocMapped | cudaHostAllocPortable));
  TPK_CUDA_CHECK(cudaHostGetDevicePointer(&device_, host_, 0));
  std::memset(host_, 0, bytes);
}

PinnedMemory::~PinnedMemory() {
  if (host_ != nullptr) ignore(cudaFreeHost(host_));
}

DeviceInfo device_info(int device) {
  int major = 0, minor = 0, multiprocessors = 0;
  TPK_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  TPK_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  TPK_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  return {major * 10 + minor, multiprocessors};
}

}  // namespace tpk::cuda
