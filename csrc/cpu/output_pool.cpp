#include "output_pool.h"

#include <pthread.h>
#include <sys/mman.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <new>

namespace tpk {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

struct Pool {
  std::mutex mutex;
  std::multimap<size_t, void*> blocks;
  size_t kept = 0;
};

// Never destroyed: outputs may die after static objects.
Pool& pool() {
  static Pool* instance = new Pool;
  return *instance;
}
// A fork waits for the lock, so that the child can use the pool.
[[maybe_unused]] const int pool_at_fork =
    pthread_atfork([] { pool().mutex.lock(); }, [] { pool().mutex.unlock(); }, [] { pool().mutex.unlock(); });

// Sizes in steps of an eighth of their power of two, so that a block serves sizes near its own.
size_t rounded(size_t bytes) {
  size_t step = size_t{64} << 10;
  while (step * 16 < bytes) step *= 2;
  return (bytes + step - 1) / step * step;
}

}  // namespace

void* pool_allocate(size_t bytes) {
  const size_t size = rounded(bytes);
  {
    std::lock_guard<std::mutex> lock(pool().mutex);
    const auto block = pool().blocks.find(size);
    if (block != pool().blocks.end()) {
      void* memory = block->second;
      pool().blocks.erase(block);
      pool().kept -= size;
      return memory;
    }
  }
  void* memory = nullptr;
  const size_t alignment = size >= kHugePage ? kHugePage : 4096;
  if (posix_memalign(&memory, alignment, size) != 0) throw std::bad_alloc();
  if (size >= kHugePage) madvise(memory, size / kHugePage * kHugePage, MADV_HUGEPAGE);  // a hint
  return memory;
}

void pool_free(void* memory, size_t bytes) {
  const size_t size = rounded(bytes);
  {
    std::lock_guard<std::mutex> lock(pool().mutex);
    if (pool().kept + size <= kKeptBytes) {
      pool().blocks.emplace(size, memory);
      pool().kept += size;
      return;
    }
  }
  std::free(memory);
}

size_t pool_kept() {
  std::lock_guard<std::mutex> lock(pool().mutex);
  return pool().kept;
}

}  // namespace tpk
