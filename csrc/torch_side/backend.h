// What the torch side asks of the backend that it is compiled into: cpu/backend.cpp or cuda/stream.cpp.
#pragma once

#include "tensor.h"

namespace tpk {

// An output that will be written whole. On the CPU a large one comes from the pool.
Tensor fresh_output(const Tensor& like, const Shape& shape);

// Where the tensors of this group are.
torch::stable::Device device_of(const Communicator&);

}  // namespace tpk
