// What the functions of the run time API share.
#pragma once

#include <cstddef>

#include "stream.h"

namespace tpk::emu {

// Dynamic shared memory that a kernel may be launched with: 48 KiB, or the size of cudaFuncSetAttribute.
size_t allowed_shared_bytes(const void* kernel);

constexpr size_t kDefaultShared = size_t{48} << 10;
constexpr int kMostShared = 227 << 10;  // bytes of a block on sm_90

inline cudaError_t failed(cudaError_t error) {
  if (error != cudaSuccess) host_thread().last_error = error;
  return error;
}

// The sticky error of a device comes out of every call.
inline cudaError_t outcome(const Device& device) { return failed(device.error.load()); }
inline cudaError_t outcome() { return outcome(current_device()); }

// The stream behind a handle on which something will be enqueued; else nullptr, and `error` says why.
inline Stream* stream_to_enqueue_on(cudaStream_t handle, cudaError_t& error) {
  Stream* const stream = stream_of(handle);
  error = failed(stream == nullptr ? cudaErrorInvalidResourceHandle : obstacle_to_enqueueing(*stream));
  return error == cudaSuccess ? stream : nullptr;
}

}  // namespace tpk::emu
