// The functions of cuda_runtime_api.h for memory, copies and kernels; see runtime_api.cpp.
#include <cstring>
#include <map>

#include "detector.h"
#include "memory.h"
#include "runtime.h"

using namespace tpk::emu;

namespace {

std::mutex functions_mutex;
std::map<const void*, size_t>& functions() {
  static auto* const all = new std::map<const void*, size_t>;
  return *all;
}

// Whether all of [memory, memory + bytes) lies in what was allocated there, or it is memory of others.
bool is_inside(const void* memory, size_t bytes) {
  const Allocation* found = find_allocation(memory);
  return found == nullptr || static_cast<const char*>(memory) + bytes <= found->base + found->bytes;
}

// The device side of a transfer is never pageable, whatever the emulator knows of it (tensors of torch).
bool is_pageable(const void* host_side, cudaMemcpyKind kind) {
  return kind != cudaMemcpyDeviceToDevice && find_allocation(host_side) == nullptr;
}

cudaError_t copy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t handle, bool wait) {
  cudaError_t error = cudaSuccess;
  Stream* const stream = stream_to_enqueue_on(handle, error);
  if (stream == nullptr) return error;
  const bool pageable = (kind != cudaMemcpyHostToDevice && is_pageable(to, kind)) ||
                        (kind != cudaMemcpyDeviceToHost && is_pageable(from, kind));
  wait |= pageable;
  if (wait && (error = obstacle_to_waiting_for(*stream)) != cudaSuccess) return failed(error);
  if (bytes == 0 || outcome() != cudaSuccess) return outcome();
  if (!is_inside(to, bytes) || !is_inside(from, bytes)) return failed(cudaErrorInvalidValue);
  enqueue(*stream, [=](Stream& self) {
    if (detector() != nullptr) {
      detector()->stream_access(self.clock, from, bytes, false);
      detector()->stream_access(self.clock, to, bytes, true);
    }
    std::memmove(to, from, bytes);
  });
  if (wait) synchronize(record(*stream));
  return outcome();
}

cudaError_t fill(void* memory, int value, size_t bytes, cudaStream_t handle, bool wait) {
  cudaError_t error = cudaSuccess;
  Stream* const stream = stream_to_enqueue_on(handle, error);
  if (stream == nullptr) return error;
  if (wait && (error = obstacle_to_waiting_for(*stream)) != cudaSuccess) return failed(error);
  if (bytes == 0 || outcome() != cudaSuccess) return outcome();
  if (!is_inside(memory, bytes)) return failed(cudaErrorInvalidValue);
  enqueue(*stream, [=](Stream& self) {
    if (detector() != nullptr) detector()->stream_access(self.clock, memory, bytes, true);
    std::memset(memory, value, bytes);
  });
  if (wait) synchronize(record(*stream));
  return outcome();
}

cudaError_t give(void** memory, size_t bytes, int owner) {
  *memory = nullptr;
  if (const cudaError_t error = obstacle_to_unsafe_calls(); error != cudaSuccess) return failed(error);
  if (outcome() != cudaSuccess || bytes == 0) return outcome();
  *memory = allocate(bytes, owner);
  return failed(*memory == nullptr ? cudaErrorMemoryAllocation : cudaSuccess);
}

cudaError_t take_back(void* memory) {
  if (memory == nullptr) return outcome();
  if (const cudaError_t error = obstacle_to_unsafe_calls(); error != cudaSuccess) return failed(error);
  const Allocation* found = find_allocation(memory);
  if (found == nullptr || found->base != memory) return failed(cudaErrorInvalidValue);
  synchronize(found->owner == kHost ? current_device() : device(found->owner));
  release(memory);
  return outcome();
}

}  // namespace

size_t tpk::emu::allowed_shared_bytes(const void* kernel) {
  const std::lock_guard lock(functions_mutex);
  const auto found = functions().find(kernel);
  return found == functions().end() ? kDefaultShared : found->second;
}

extern "C" {

// ---- memory ---------------------------------------------------------------------------------------------------------

cudaError_t cudaMalloc(void** memory, size_t bytes) { return give(memory, bytes, host_thread().device); }
cudaError_t cudaMallocHost(void** memory, size_t bytes) { return give(memory, bytes, kHost); }
cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned) { return give(memory, bytes, kHost); }
cudaError_t cudaFree(void* memory) { return take_back(memory); }
cudaError_t cudaFreeHost(void* memory) { return take_back(memory); }

// Not in a capture, where it would be a node.
cudaError_t cudaMallocAsync(void** memory, size_t bytes, cudaStream_t handle) {
  Stream* const stream = stream_of(handle);
  if (stream == nullptr) return failed(cudaErrorInvalidResourceHandle);
  const cudaError_t error = obstacle_to_waiting_for(*stream);
  return error != cudaSuccess ? failed(error) : cudaMalloc(memory, bytes);
}

cudaError_t cudaFreeAsync(void* memory, cudaStream_t handle) {
  cudaError_t error = cudaSuccess;
  Stream* const stream = stream_to_enqueue_on(handle, error);
  if (stream == nullptr) return error;
  enqueue(*stream, [memory](Stream&) { release(memory); });
  return outcome();
}

cudaError_t cudaHostGetDevicePointer(void** on_device, void* on_host, unsigned) {
  const Allocation* found = find_allocation(on_host);
  if (found == nullptr || found->owner != kHost) return failed(cudaErrorInvalidValue);
  *on_device = on_host;
  return outcome();
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* memory) {
  const Allocation* found = find_allocation(memory);
  std::memset(attributes, 0, sizeof *attributes);
  attributes->type = found == nullptr        ? cudaMemoryTypeUnregistered
                     : found->owner == kHost ? cudaMemoryTypeHost
                                             : cudaMemoryTypeDevice;
  attributes->device = found == nullptr || found->owner == kHost ? host_thread().device : found->owner;
  if (found != nullptr) attributes->devicePointer = const_cast<void*>(memory);
  if (found == nullptr || found->owner == kHost) attributes->hostPointer = const_cast<void*>(memory);
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  return copy(to, from, bytes, kind, nullptr, true);
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  return copy(to, from, bytes, kind, stream, false);
}
cudaError_t cudaMemset(void* memory, int value, size_t bytes) { return fill(memory, value, bytes, nullptr, true); }
cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream) {
  return fill(memory, value, bytes, stream, false);
}

// ---- kernels --------------------------------------------------------------------------------------------------------

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return outcome();
  if (value < 0 || value > kMostShared) return failed(cudaErrorInvalidValue);
  const std::lock_guard lock(functions_mutex);
  functions()[kernel] = static_cast<size_t>(value);
  return outcome();
}

// The emulated device has as many multiprocessors as blocks that it can hold.
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int threads, size_t shared_bytes) {
  *blocks = threads <= 1024 && shared_bytes <= static_cast<size_t>(kMostShared) ? 1 : 0;
  return outcome();
}

cudaError_t cudaLaunchHostFunc(cudaStream_t handle, cudaHostFn_t function, void* data) {
  cudaError_t error = cudaSuccess;
  Stream* const stream = stream_to_enqueue_on(handle, error);
  if (stream == nullptr) return error;
  enqueue(*stream, [=](Stream&) { function(data); });
  return outcome();
}

}  // extern "C"
