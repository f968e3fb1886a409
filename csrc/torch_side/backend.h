// What the code of torch_side needs of the backend in whose module it is: cpu/backend.cpp or cuda/backend.cpp.
#pragma once

#include "tensor.h"

namespace tpk {

// An output that will be written whole. On the CPU a large one comes from the pool.
Tensor fresh_output(const Tensor& like, const Shape& shape);

// Where the tensors of this group are.
torch::stable::Device device_of(const Communicator&);

}  // namespace tpk
