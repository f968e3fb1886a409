// The one way to launch a kernel, and the two spellings that differ between nvcc and the emulator. Torch-free.
//
//   TPK_KERNEL void name(Args args)            a __global__ function
//   TPK_LAUNCH(kernel, grid, block, shared_bytes, stream, args...)      -> cudaError_t
//   TPK_DYNAMIC_SHARED(T, name)                 the dynamic shared memory of the block, 16-byte aligned
//
// The emulated build has tests/csrc/emu/override/cuda/kernels/launch.h in place of this file; so it has of device.cuh
// and hopper.cuh, and all three are included by their path from csrc.
#pragma once

#include <cuda_runtime.h>

#define TPK_KERNEL __global__
#define TPK_DYNAMIC_SHARED(T, name)                    \
  extern __shared__ __align__(16) char tpk_dynamic_[]; \
  T* const name = reinterpret_cast<T*>(tpk_dynamic_)

namespace tpk {

template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   Args&&... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
}

}  // namespace tpk

#define TPK_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::tpk::launch(kernel, grid, block, shared_bytes, stream, __VA_ARGS__)
