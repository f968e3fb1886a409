#include "stream.h"

#include <dlfcn.h>

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

// cuBLAS is there where torch is, and not linked to: torch's build says which one.
void limit_products(int multiprocessors) {
  using SetTarget = int (*)(void* handle, int multiprocessors);
  static const auto set_target = reinterpret_cast<SetTarget>(dlsym(RTLD_DEFAULT, "cublasSetSmCountTarget"));
  void* handle = nullptr;
  if (set_target == nullptr || torch_get_current_cuda_blas_handle(&handle) != 0) return;
  static_cast<void>(set_target(handle, multiprocessors));
}

OpScope::OpScope(const Tensor& x) : device_(device_index_of(x)), stream_(torch_stream(device_index_of(x))) {}

OpScope::~OpScope() = default;

}  // namespace tpk::cuda
