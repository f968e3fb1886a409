// Outputs of the fast path.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <utility>

#include "cpu/output_pool.h"
#include "fast_path.h"

namespace tpk {

// A new tensor like another but for the size of one dimension. Through DLPack: torch.empty costs as much as a small
// collective.
class NewTensor {
 public:
  NewTensor(const dlpack::View& like, size_t dim, int64_t size, size_t bytes) {
    const size_t num_dims = static_cast<size_t>(like.ndim);
    // The sizes and strides lie behind the header.
    std::unique_ptr<Owned, void (*)(void*)> self(
        static_cast<Owned*>(std::malloc(sizeof(Owned) + 2 * num_dims * sizeof(int64_t))), &std::free);
    if (self == nullptr) throw std::bad_alloc();
    data_ = static_cast<char*>(allocate(bytes));
    self_ = self.release();
    int64_t* const shape = reinterpret_cast<int64_t*>(self_ + 1);
    int64_t* const strides = shape + num_dims;
    int64_t stride = 1;
    for (size_t i = num_dims; i-- > 0;) {
      shape[i] = i == dim ? size : like.shape[i];
      strides[i] = stride;
      stride *= std::max<int64_t>(shape[i], 1);
    }
    self_->bytes = bytes;
    self_->managed = {{dlpack::kMajor, dlpack::kMinor},
                      nullptr,
                      &free,
                      0,
                      {data_, like.device, like.ndim, like.dtype, shape, strides, 0}};
  }
  NewTensor(const NewTensor&) = delete;
  NewTensor& operator=(const NewTensor&) = delete;
  ~NewTensor() {
    if (self_ != nullptr) free(&self_->managed);
  }
  char* data() const { return data_; }
  PyObject* release() { return object_of(&std::exchange(self_, nullptr)->managed); }

 private:
  struct Owned {
    dlpack::Managed managed;  // first, so that free finds the rest
    size_t bytes;
  };
  static void free(dlpack::Managed* managed) {
    const size_t bytes = reinterpret_cast<Owned*>(managed)->bytes;
    bytes < kSmallestPooled ? std::free(managed->view.data) : pool_free(managed->view.data, bytes);
    std::free(managed);
  }
  static void* allocate(size_t bytes) {
    constexpr size_t kAlignment = 64;  // as torch's own
    if (bytes >= kSmallestPooled) return pool_allocate(bytes);
    void* const memory =
        std::aligned_alloc(kAlignment, (std::max<size_t>(bytes, 1) + kAlignment - 1) / kAlignment * kAlignment);
    if (memory == nullptr) throw std::bad_alloc();
    return memory;
  }

  Owned* self_;
  char* data_;
};

}  // namespace tpk
