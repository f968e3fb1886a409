// The pool of output memory: what is given back is used again, and only so much is kept.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <thread>

#include "cpu/output_pool.h"
#include "expect.h"

using namespace tpk;

namespace {

CASE(a_block_that_was_given_back_serves_the_next_of_its_size) {
  void* first = pool_allocate(3 << 20);
  std::memset(first, 1, 3 << 20);
  pool_free(first, 3 << 20);
  EXPECT(pool_kept() >= (3 << 20));
  void* second = pool_allocate((3 << 20) - 1000);
  EXPECT(second == first);
  EXPECT(pool_kept() == 0, pool_kept());
  pool_free(second, (3 << 20) - 1000);
}

CASE(blocks_in_use_are_never_shared) {
  char* a = static_cast<char*>(pool_allocate(kSmallestPooled));
  char* b = static_cast<char*>(pool_allocate(kSmallestPooled));
  EXPECT(a + kSmallestPooled <= b || b + kSmallestPooled <= a);
  EXPECT(reinterpret_cast<uintptr_t>(a) % 64 == 0);
  pool_free(a, kSmallestPooled);
  pool_free(b, kSmallestPooled);
}

CASE(no_more_than_the_limit_is_kept) {
  const size_t big = kKeptBytes / 2 + 1;
  void* blocks[3];
  for (void*& block : blocks) block = pool_allocate(big);
  for (void* block : blocks) pool_free(block, big);
  EXPECT(pool_kept() <= kKeptBytes, pool_kept());
}

CASE(threads_may_use_it_at_once) {
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([t] {
      for (int i = 0; i < 200; ++i) {
        const size_t bytes = kSmallestPooled + static_cast<size_t>(i % 7) * 100000;
        char* memory = static_cast<char*>(pool_allocate(bytes));
        memory[0] = memory[bytes - 1] = static_cast<char>(t);
        if (memory[0] != t || memory[bytes - 1] != t) std::abort();
        pool_free(memory, bytes);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace
