// A tensor map as kernels take it by value: what the driver's cuTensorMapEncodeTiled writes. Torch-free.
#pragma once

namespace tpk::cuda {

struct alignas(64) TensorMap {
  char opaque[128];
};

}  // namespace tpk::cuda
