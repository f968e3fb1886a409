// The one way to launch a kernel, and the two spellings that differ between nvcc and the emulator. Torch-free.
//
//   TPK_KERNEL void name(Args args)            a __global__ function
//   TPK_LAUNCH(kernel, grid, block, shared_bytes, stream, args...)      -> cudaError_t
//   TPK_DYNAMIC_SHARED(T, name)                 the dynamic shared memory of the block, 16-byte aligned
//
// With TPK_EMU the same sources are ordinary C++ (tests/csrc/emu): a block is an OS thread, a CUDA thread is a fiber.
#pragma once

#include <cuda_runtime_api.h>

#if defined(TPK_EMU)
#include "emu.h"
#else
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
#endif
