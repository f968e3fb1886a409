// Memory for large outputs, kept when an output dies. Torch-free.
//
// malloc gives large blocks back to the kernel each time, and a fresh page costs more than the collective that fills it
// (64 MiB page by page: 30 to 200 ms, against 5 to 15 ms for the all-reduce). At most kKeptBytes are kept in a process.
#pragma once

#include <cstddef>

namespace tpk {

constexpr size_t kSmallestPooled = size_t{256} << 10;
constexpr size_t kKeptBytes = size_t{256} << 20;

// At least `bytes` bytes, aligned for vectors. Throws std::bad_alloc.
void* pool_allocate(size_t bytes);
void pool_free(void* memory, size_t bytes);
// Bytes kept for later.
size_t pool_kept();

}  // namespace tpk
