#include "heap.h"

#include <algorithm>

namespace tpk {

void Heap::reset(char* base, size_t bytes) {
  base_ = base;
  bytes_ = bytes;
  free_ = {{0, bytes}};
}

void* Heap::allocate(size_t bytes) {
  const size_t wanted = (std::max<size_t>(bytes, 1) + kPage - 1) / kPage * kPage;
  std::lock_guard<std::mutex> lock(mutex_);
  for (auto hole = free_.begin(); hole != free_.end(); ++hole) {
    const auto [offset, length] = *hole;
    if (length < wanted) continue;
    free_.erase(hole);
    if (length > wanted) free_[offset + wanted] = length - wanted;
    used_[offset] = wanted;
    return base_ + offset;
  }
  return nullptr;
}

void Heap::free(void* pointer) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto block = used_.find(static_cast<size_t>(static_cast<char*>(pointer) - base_));
  if (block == used_.end()) return;
  auto [offset, length] = *block;
  used_.erase(block);
  auto next = free_.lower_bound(offset);
  if (next != free_.end() && offset + length == next->first) {
    length += next->second;
    next = free_.erase(next);
  }
  if (next != free_.begin()) {
    auto previous = std::prev(next);
    if (previous->first + previous->second == offset) {
      previous->second += length;
      return;
    }
  }
  free_[offset] = length;
}

bool Heap::contains(const void* pointer) const {
  const char* p = static_cast<const char*>(pointer);
  return p >= base_ && p < base_ + bytes_;
}

}  // namespace tpk
