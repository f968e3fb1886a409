#include "stream.h"

namespace tpk::cuda {

int device_index_of(const Tensor& x) { return x.get_device_index(); }

cudaStream_t torch_stream(int device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

void set_torch_stream(int device, cudaStream_t stream) {
  TORCH_ERROR_CODE_CHECK(torch_set_current_cuda_stream(stream, device));
}

OpScope::OpScope(const Tensor& x) : device_(device_index_of(x)), stream_(torch_stream(device_index_of(x))) {}

OpScope::~OpScope() = default;

}  // namespace tpk::cuda
