// How a product of a warpgroup (hopper.cuh) is given an operand in shared memory. Torch-free.
#pragma once

#include "cuda/kernels/hopper.cuh"
#include "tiles.h"

namespace tpk::cuda {

// The descriptor of an operand whose first row is there: bits 0-13 the address, 32-45 the distance from one group of 8
// rows to the next, both in units of 16 bytes; bits 62-63: 1 is the 128-byte swizzle. (Bits 16-29, the distance
// of other layouts, are not used by this one; 1 by convention.) Values 16 j and on of the rows: operand + 2 j, 32
// bytes.
__device__ __forceinline__ uint64_t operand(const void* shared) {
  constexpr uint64_t kLayout = uint64_t{1} << 16 | uint64_t{1024 / 16} << 32 | uint64_t{1} << 62;
  return kLayout | (shared_address(shared) & 0x3ffff) >> 4;
}

// The same of a transposed operand (MN-major in the PTX ISA), tiles of kTileDepth rows, one behind the other, each with
// 64 of its rows: bits 16-29 the distance from one tile to the next, 32-45 that from 8 values of K to the next 8.
// Values 16 j and on of K: operand + 128 j, 2048 bytes.
__device__ __forceinline__ uint64_t transposed_operand(const void* shared) {
  constexpr uint64_t kLayout = uint64_t{kTileDepth * 128 / 16} << 16 | uint64_t{1024 / 16} << 32 | uint64_t{1} << 62;
  return kLayout | (shared_address(shared) & 0x3ffff) >> 4;
}

}  // namespace tpk::cuda
