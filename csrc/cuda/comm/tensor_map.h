// Tensor maps: the description of a matrix by which the tensor memory accelerator loads and stores tiles of it.
// Torch-free.
#pragma once

#include <array>
#include <cstdint>

#include "core/types.h"
#include "cuda/kernels/tensor_map_type.h"

namespace tpk::cuda {

// Of a matrix of bf16, fp16 or uint8 in device memory, a peer's too, whose tiles are box_rows rows by 128 bytes (64 or
// 128 columns, swizzled as hopper.cuh has it); values outside are loaded as zeros, and not stored. Throws
// std::invalid_argument for what the hardware cannot do: a base or a row stride that is no multiple of 16 bytes, a size
// of 0 or of 2^32 and more, more than 256 box rows.
TensorMap tensor_map_of(DType dtype, const void* base, uint64_t rows, uint64_t columns, uint64_t row_stride_bytes,
                        uint32_t box_rows);

// Those that were asked for last. A map has nothing but its arguments in it, so that it serves again where a program
// gets the same memory again, step after step; the driver takes 1 to 2 us of the host to make one.
class TensorMaps {
 public:
  const TensorMap& of(DType dtype, const void* base, uint64_t rows, uint64_t columns, uint64_t row_stride_bytes,
                      uint32_t box_rows);

 private:
  struct Made {
    DType dtype;
    uint32_t box_rows = 0;  // 0: none yet
    const void* base;
    uint64_t rows, columns, row_stride_bytes;
    TensorMap map;
  };
  std::array<Made, 256> made_{};  // of the weights, the inputs and the outputs of a few layers over 8 ranks
};

}  // namespace tpk::cuda
