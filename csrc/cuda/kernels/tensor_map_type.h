// A tensor map as kernels take it by value: what the driver's cuTensorMapEncodeTiled writes. Torch-free.
#pragma once

namespace tpk::cuda {

// The driver asks for 64, cuda.h of CUDA 13 declares 128.
struct alignas(128) TensorMap {
  char opaque[128];
};

}  // namespace tpk::cuda
