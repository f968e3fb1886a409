// The heap of an arena: tensors of group.empty and products that GEMMs write where peers can read them. Torch-free.
#pragma once

#include <cstddef>
#include <map>
#include <mutex>

namespace tpk {

// First fit over one stretch of memory, neighbours joined when they are freed. It never touches the memory itself,
// which may be a device's.
class Heap {
 public:
  static constexpr size_t kPage = 4096;

  void reset(char* base, size_t bytes);
  // nullptr when it does not fit.
  void* allocate(size_t bytes);
  void free(void* pointer);
  bool contains(const void* pointer) const;
  size_t bytes() const { return bytes_; }

 private:
  char* base_ = nullptr;
  size_t bytes_ = 0;
  std::map<size_t, size_t> free_;  // offset -> length
  std::map<size_t, size_t> used_;
  std::mutex mutex_;
};

}  // namespace tpk
