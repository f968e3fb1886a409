#include "torch_side/backend.h"

#include "output_pool.h"
#include "torch_side/kernels.h"

namespace tpk {

Tensor fresh_output(const Tensor& like, const Shape& shape) {
  size_t bytes = like.element_size();
  for (int64_t size : shape) bytes *= static_cast<size_t>(size);
  if (bytes < kSmallestPooled) return empty_of(like, shape);
  Shape strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * shape[i];
  return torch::stable::from_blob(pool_allocate(bytes), shape, strides, torch::stable::Device("cpu"),
                                  like.scalar_type(), [bytes](void* memory) { pool_free(memory, bytes); });
}

torch::stable::Device device_of(const Communicator&) { return {torch::headeronly::DeviceType::CPU}; }

}  // namespace tpk

STABLE_TORCH_LIBRARY_IMPL(tpkernels, CPU, m) { tpk::register_kernels<tpk::Unscoped>(m); }
