// The functions of cuda_runtime_api.h that the host side uses, on emulated devices. Order, errors and handles as CUDA
// has them; what CUDA would only warn of in its documentation (a bad handle, a stream of another device) is an error
// here.
#include <cstdio>
#include <cstring>

#include "runtime.h"

using namespace tpk::emu;

namespace {

Event* event_of(cudaEvent_t handle) { return reinterpret_cast<Event*>(handle); }

}  // namespace

extern "C" {

// ---- devices --------------------------------------------------------------------------------------------------------

cudaError_t cudaGetDeviceCount(int* count) {
  *count = options().ranks;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* rank) {
  *rank = host_thread().device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int rank) {
  if (rank < 0 || rank >= options().ranks) return failed(cudaErrorInvalidDevice);
  set_current_device(rank);
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
  const cudaError_t error = obstacle_to_waiting_for(current_device());
  if (error != cudaSuccess) return failed(error);
  synchronize(current_device());
  return outcome();
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = options().resident_blocks; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; return cudaSuccess;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; return cudaSuccess;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 1024; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = static_cast<int>(kDefaultShared); return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = kMostShared; return cudaSuccess;
    case cudaDevAttrWarpSize: *value = 32; return cudaSuccess;
    case cudaDevAttrCooperativeLaunch: *value = 0; return cudaSuccess;
    default: return failed(cudaErrorNotSupported);
  }
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int rank) {
  std::memset(properties, 0, sizeof *properties);
  std::snprintf(properties->name, sizeof properties->name, "emulated rank %d", rank);
  properties->multiProcessorCount = options().resident_blocks;
  properties->major = 9;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = 1024;
  properties->maxThreadsPerMultiProcessor = 1024;
  properties->sharedMemPerBlock = kDefaultShared;
  properties->sharedMemPerBlockOptin = kMostShared;
  properties->totalGlobalMem = size_t{8} << 30;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0, *greatest = -5;
  return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) { return cudaRuntimeGetVersion(version); }

// ---- errors ---------------------------------------------------------------------------------------------------------

cudaError_t cudaPeekAtLastError() {
  const cudaError_t sticky = current_device().error.load();
  return sticky != cudaSuccess ? sticky : host_thread().last_error;
}

cudaError_t cudaGetLastError() {
  const cudaError_t last = cudaPeekAtLastError();
  host_thread().last_error = cudaSuccess;
  return last;
}

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
#define TPK_EMU_NAME(name) \
  case name: return #name;
    TPK_EMU_NAME(cudaSuccess)
    TPK_EMU_NAME(cudaErrorInvalidValue)
    TPK_EMU_NAME(cudaErrorMemoryAllocation)
    TPK_EMU_NAME(cudaErrorInvalidConfiguration)
    TPK_EMU_NAME(cudaErrorInvalidDevice)
    TPK_EMU_NAME(cudaErrorInvalidResourceHandle)
    TPK_EMU_NAME(cudaErrorNotReady)
    TPK_EMU_NAME(cudaErrorIllegalAddress)
    TPK_EMU_NAME(cudaErrorMisalignedAddress)
    TPK_EMU_NAME(cudaErrorLaunchFailure)
    TPK_EMU_NAME(cudaErrorLaunchTimeout)
    TPK_EMU_NAME(cudaErrorNotSupported)
    TPK_EMU_NAME(cudaErrorIllegalState)
    TPK_EMU_NAME(cudaErrorStreamCaptureUnsupported)
    TPK_EMU_NAME(cudaErrorStreamCaptureInvalidated)
    TPK_EMU_NAME(cudaErrorStreamCaptureMerge)
    TPK_EMU_NAME(cudaErrorStreamCaptureUnmatched)
    TPK_EMU_NAME(cudaErrorStreamCaptureUnjoined)
    TPK_EMU_NAME(cudaErrorStreamCaptureIsolation)
    TPK_EMU_NAME(cudaErrorStreamCaptureImplicit)
    TPK_EMU_NAME(cudaErrorCapturedEvent)
    TPK_EMU_NAME(cudaErrorStreamCaptureWrongThread)
#undef TPK_EMU_NAME
    default: return "cudaErrorUnknown";
  }
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorInvalidResourceHandle: return "invalid resource handle";
    case cudaErrorNotReady: return "device not ready";
    case cudaErrorIllegalAddress: return "an illegal memory access was encountered";
    case cudaErrorMisalignedAddress: return "misaligned address";
    case cudaErrorLaunchFailure: return "unspecified launch failure";
    case cudaErrorLaunchTimeout: return "the launch timed out and was terminated";
    case cudaErrorNotSupported: return "operation not supported";
    case cudaErrorIllegalState: return "the operation cannot be performed in the present state";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated: return "operation failed due to a previous error during capture";
    case cudaErrorStreamCaptureMerge: return "operation would result in a merge of separate capture sequences";
    case cudaErrorStreamCaptureUnmatched: return "capture was not ended in the same stream as it began";
    case cudaErrorStreamCaptureUnjoined: return "capturing stream has unjoined work";
    case cudaErrorStreamCaptureIsolation: return "dependency created on uncaptured work in another stream";
    case cudaErrorStreamCaptureImplicit:
      return "operation would make the legacy stream depend on a capturing blocking stream";
    case cudaErrorCapturedEvent: return "operation not permitted on an event last recorded in a capturing stream";
    case cudaErrorStreamCaptureWrongThread:
      return "attempt to terminate a thread-local capture sequence from another thread";
    default: return "unknown error";
  }
}

// ---- streams --------------------------------------------------------------------------------------------------------

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* handle, unsigned flags, int priority) {
  if ((flags & ~unsigned{cudaStreamNonBlocking}) != 0) return failed(cudaErrorInvalidValue);
  const int clamped = priority < -5 ? -5 : priority > 0 ? 0 : priority;
  *handle = reinterpret_cast<cudaStream_t>(make_stream(current_device(), flags, clamped));
  return outcome();
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* handle, unsigned flags) {
  return cudaStreamCreateWithPriority(handle, flags, 0);
}
cudaError_t cudaStreamCreate(cudaStream_t* handle) {
  return cudaStreamCreateWithPriority(handle, cudaStreamDefault, 0);
}

cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  Stream* stream = handle == nullptr ? nullptr : stream_of(handle);
  if (stream == nullptr) return failed(cudaErrorInvalidResourceHandle);
  close_stream(stream);
  return outcome();
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  Stream* stream = stream_of(handle);
  if (stream == nullptr) return failed(cudaErrorInvalidResourceHandle);
  const cudaError_t error = obstacle_to_waiting_for(*stream);
  if (error != cudaSuccess) return failed(error);
  synchronize(record(*stream));
  return outcome(*stream->device);
}

cudaError_t cudaStreamQuery(cudaStream_t handle) {
  Stream* stream = stream_of(handle);
  if (stream == nullptr) return failed(cudaErrorInvalidResourceHandle);
  const cudaError_t error = obstacle_to_waiting_for(*stream);
  if (error != cudaSuccess) return failed(error);
  {
    const std::lock_guard lock(mutex());
    if (stream->busy || !stream->queue.empty()) return cudaErrorNotReady;
  }
  synchronize(record(*stream));
  return outcome(*stream->device);
}

cudaError_t cudaStreamGetPriority(cudaStream_t handle, int* priority) {
  Stream* stream = stream_of(handle);
  if (stream == nullptr) return failed(cudaErrorInvalidResourceHandle);
  *priority = stream->priority;
  return outcome();
}

cudaError_t cudaStreamGetFlags(cudaStream_t handle, unsigned* flags) {
  Stream* stream = stream_of(handle);
  if (stream == nullptr) return failed(cudaErrorInvalidResourceHandle);
  *flags = stream->flags;
  return outcome();
}

cudaError_t cudaStreamGetDevice(cudaStream_t handle, int* rank) {
  Stream* stream = stream_of(handle);
  if (stream == nullptr) return failed(cudaErrorInvalidResourceHandle);
  *rank = stream->device->rank;
  return outcome();
}

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned) {
  Stream* stream = stream_of(handle);
  if (stream == nullptr || event == nullptr) return failed(cudaErrorInvalidResourceHandle);
  bool captured = false;
  cudaError_t error = obstacle_to_enqueueing(*stream);
  if (error == cudaSuccess) error = wait_in_capture(*stream, *event_of(event), captured);
  if (error != cudaSuccess || captured) return failed(error);
  if (event_of(event)->last != nullptr) wait_for(*stream, event_of(event)->last);
  return outcome();
}

// ---- events ---------------------------------------------------------------------------------------------------------

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  *event = reinterpret_cast<cudaEvent_t>(new Event{&current_device(), flags, nullptr, nullptr, {}});
  ++live_events;
  return outcome();
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, cudaEventDefault); }

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  if (event == nullptr) return failed(cudaErrorInvalidResourceHandle);
  delete event_of(event);
  --live_events;
  return outcome();
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t handle) {
  Stream* stream = stream_of(handle);
  if (stream == nullptr || event == nullptr || event_of(event)->device != stream->device) {
    return failed(cudaErrorInvalidResourceHandle);
  }
  if (const cudaError_t error = obstacle_to_enqueueing(*stream); error != cudaSuccess) return failed(error);
  if (record_in_capture(*stream, *event_of(event))) return outcome();
  event_of(event)->last = record(*stream);
  return outcome();
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  if (const cudaError_t error = obstacle_to_waiting_for(*event_of(event)); error != cudaSuccess) return failed(error);
  const std::shared_ptr<Marker> marker = event_of(event)->last;
  if (marker != nullptr) {
    {
      const std::lock_guard lock(mutex());
      if (!marker->done) return cudaErrorNotReady;
    }
    synchronize(marker);
  }
  return outcome(*event_of(event)->device);
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  if (const cudaError_t error = obstacle_to_waiting_for(*event_of(event)); error != cudaSuccess) return failed(error);
  if (event_of(event)->last != nullptr) synchronize(event_of(event)->last);
  return outcome(*event_of(event)->device);
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  const Event &from = *event_of(start), &to = *event_of(end);
  if (((from.flags | to.flags) & cudaEventDisableTiming) != 0 || from.last == nullptr || to.last == nullptr) {
    return failed(cudaErrorInvalidResourceHandle);
  }
  const std::lock_guard lock(mutex());
  if (!from.last->done || !to.last->done) return cudaErrorNotReady;
  *milliseconds = std::chrono::duration<float, std::milli>(to.last->time - from.last->time).count();
  return cudaSuccess;
}

}  // extern "C"
