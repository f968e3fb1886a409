#include "torch_side/backend.h"

#include "cuda/comm/device_communicator.h"

namespace tpk {

Tensor fresh_output(const Tensor& like, const Shape& shape) { return empty_of(like, shape); }

torch::stable::Device device_of(const Communicator& comm) {
  return {torch::headeronly::DeviceType::CUDA, static_cast<const cuda::DeviceCommunicator&>(comm).device()};
}

}  // namespace tpk
