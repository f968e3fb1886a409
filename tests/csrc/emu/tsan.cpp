// What the compiler calls under -fsanitize=thread, instead of libtsan's. Host threads pass through at once.
#include <cstring>

#include "block.h"

namespace {

inline void plain(const void* address, size_t bytes, bool writes, void* code) {
  tpk::emu::Thread* thread = tpk::emu::current_thread();
  if (thread == nullptr || bytes == 0) return;
  tpk::emu::detector()->access(*thread, reinterpret_cast<uintptr_t>(address), bytes, writes,
                               reinterpret_cast<uintptr_t>(code));
}

}  // namespace

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

#define TPK_EMU_ACCESS(bytes)                                                                           \
  void __tsan_read##bytes(void* at) { plain(at, bytes, false, __builtin_return_address(0)); }           \
  void __tsan_write##bytes(void* at) { plain(at, bytes, true, __builtin_return_address(0)); }           \
  void __tsan_unaligned_read##bytes(void* at) { plain(at, bytes, false, __builtin_return_address(0)); } \
  void __tsan_unaligned_write##bytes(void* at) { plain(at, bytes, true, __builtin_return_address(0)); }
TPK_EMU_ACCESS(1)
TPK_EMU_ACCESS(2)
TPK_EMU_ACCESS(4)
TPK_EMU_ACCESS(8)
TPK_EMU_ACCESS(16)
#undef TPK_EMU_ACCESS

void __tsan_read_range(void* at, size_t bytes) { plain(at, bytes, false, __builtin_return_address(0)); }
void __tsan_write_range(void* at, size_t bytes) { plain(at, bytes, true, __builtin_return_address(0)); }

// Kernels are compiled with memcpy and its like as calls, and linked with --wrap.
void* __real_memcpy(void*, const void*, size_t);
void* __real_memmove(void*, const void*, size_t);
void* __real_memset(void*, int, size_t);

void* __wrap_memcpy(void* to, const void* from, size_t bytes) {
  plain(from, bytes, false, __builtin_return_address(0));
  plain(to, bytes, true, __builtin_return_address(0));
  return __real_memcpy(to, from, bytes);
}
void* __wrap_memmove(void* to, const void* from, size_t bytes) {
  plain(from, bytes, false, __builtin_return_address(0));
  plain(to, bytes, true, __builtin_return_address(0));
  return __real_memmove(to, from, bytes);
}
void* __wrap_memset(void* to, int value, size_t bytes) {
  plain(to, bytes, true, __builtin_return_address(0));
  return __real_memset(to, value, bytes);
}

// Atomics of the language, in the emulator's own templates and in the host's code: done, not watched. What kernels
// share goes through tpk::emu::Atomic.
#define TPK_EMU_FETCH(bits, type, name, builtin) \
  type __tsan_atomic##bits##_##name(volatile type* at, type value, int) { return builtin(at, value, __ATOMIC_SEQ_CST); }
#define TPK_EMU_ATOMICS(bits, type)                                                                               \
  type __tsan_atomic##bits##_load(const volatile type* at, int) { return __atomic_load_n(at, __ATOMIC_SEQ_CST); } \
  void __tsan_atomic##bits##_store(volatile type* at, type value, int) {                                          \
    __atomic_store_n(at, value, __ATOMIC_SEQ_CST);                                                                \
  }                                                                                                               \
  int __tsan_atomic##bits##_compare_exchange_strong(volatile type* at, type* expected, type value, int, int) {    \
    return __atomic_compare_exchange_n(at, expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);           \
  }                                                                                                               \
  int __tsan_atomic##bits##_compare_exchange_weak(volatile type* at, type* expected, type value, int, int) {      \
    return __atomic_compare_exchange_n(at, expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);           \
  }                                                                                                               \
  TPK_EMU_FETCH(bits, type, exchange, __atomic_exchange_n)                                                        \
  TPK_EMU_FETCH(bits, type, fetch_add, __atomic_fetch_add)                                                        \
  TPK_EMU_FETCH(bits, type, fetch_sub, __atomic_fetch_sub)                                                        \
  TPK_EMU_FETCH(bits, type, fetch_and, __atomic_fetch_and)                                                        \
  TPK_EMU_FETCH(bits, type, fetch_or, __atomic_fetch_or)                                                          \
  TPK_EMU_FETCH(bits, type, fetch_xor, __atomic_fetch_xor)
TPK_EMU_ATOMICS(8, uint8_t)
TPK_EMU_ATOMICS(16, uint16_t)
TPK_EMU_ATOMICS(32, uint32_t)
TPK_EMU_ATOMICS(64, uint64_t)
#undef TPK_EMU_ATOMICS
#undef TPK_EMU_FETCH

void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
void __tsan_atomic_signal_fence(int) {}

}  // extern "C"
