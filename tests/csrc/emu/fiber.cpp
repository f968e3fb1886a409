#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes)
#endif

#if defined(__x86_64__)

// Saves what a function must preserve, and swaps stacks. A new stack looks as if it had left through here.
asm(R"(
.text
.globl tpk_emu_switch
.hidden tpk_emu_switch
.type tpk_emu_switch, @function
tpk_emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size tpk_emu_switch, .-tpk_emu_switch
.globl tpk_emu_start
.hidden tpk_emu_start
.type tpk_emu_start, @function
tpk_emu_start:
  movq %r12, %rdi
  call *%r13
  ud2
.size tpk_emu_start, .-tpk_emu_start
)");

extern "C" void tpk_emu_switch(void** save, void* to);
extern "C" void tpk_emu_start();

#else
#include <ucontext.h>
#endif

namespace tpk::emu {
namespace {

constexpr size_t kGuard = 64 << 10;                  // nobody's, below all stacks of a block
constexpr uint64_t kCanary = 0x7470'6b65'6d75'2121;  // at the far end of every stack

std::mutex pool_mutex;
std::map<size_t, std::vector<char*>>& pool() {
  static auto* const all = new std::map<size_t, std::vector<char*>>;
  return *all;
}

}  // namespace

#if defined(__x86_64__)

void Context::prepare(char* stack, size_t bytes, void (*entry)(void*), void* argument) {
  stack_ = stack, bytes_ = bytes, fake_stack_ = nullptr;
  auto* top = reinterpret_cast<uintptr_t*>(stack + bytes) - 2;
  *--top = reinterpret_cast<uintptr_t>(&tpk_emu_start);  // where `ret` goes, with the stack aligned for a call
  *--top = 0;                                            // rbp
  *--top = 0;                                            // rbx
  *--top = reinterpret_cast<uintptr_t>(argument);        // r12
  *--top = reinterpret_cast<uintptr_t>(entry);           // r13
  *--top = 0;                                            // r14
  *--top = 0;                                            // r15
  stack_pointer_ = top;
}

#define TPK_EMU_SWAP(from, to) tpk_emu_switch(&(from), (to))

#else

void Context::prepare(char* stack, size_t bytes, void (*entry)(void*), void* argument) {
  stack_ = stack, bytes_ = bytes, fake_stack_ = nullptr;
  auto* context = reinterpret_cast<ucontext_t*>(stack + bytes - sizeof(ucontext_t) - 64);
  context = reinterpret_cast<ucontext_t*>(reinterpret_cast<uintptr_t>(context) & ~uintptr_t{63});
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = static_cast<size_t>(reinterpret_cast<char*>(context) - stack);
  context->uc_link = nullptr;
  makecontext(context, reinterpret_cast<void (*)()>(entry), 1, argument);
  stack_pointer_ = context;
}

static void swap_contexts(void*& from, void* to) {
  if (from == nullptr) from = std::calloc(1, sizeof(ucontext_t));  // an OS thread's own; one or two per process
  swapcontext(static_cast<ucontext_t*>(from), static_cast<ucontext_t*>(to));
}
#define TPK_EMU_SWAP(from, to) swap_contexts(from, to)

#endif

void Context::switch_to(Context& to, [[maybe_unused]] bool done) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(done ? nullptr : &fake_stack_, to.stack_, to.bytes_);
#endif
  TPK_EMU_SWAP(stack_pointer_, to.stack_pointer_);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
}

void fiber_started([[maybe_unused]] Context& self, [[maybe_unused]] Context& from) {
#if defined(__SANITIZE_ADDRESS__)
  const void* stack = nullptr;
  __sanitizer_finish_switch_fiber(self.fake_stack_, &stack, &from.bytes_);
  from.stack_ = const_cast<char*>(static_cast<const char*>(stack));
#endif
}

size_t Stacks::bytes_of_one() {
#if defined(__SANITIZE_ADDRESS__)
  return size_t{256} << 10;
#else
  return size_t{64} << 10;
#endif
}

Stacks::Stacks(size_t count) : base_(nullptr), count_(count) {
  const size_t bytes = count * bytes_of_one();
  {
    const std::lock_guard lock(pool_mutex);
    std::vector<char*>& free = pool()[bytes];
    if (!free.empty()) base_ = free.back(), free.pop_back();
  }
  if (base_ == nullptr) {
    constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* memory = mmap(nullptr, kGuard + bytes, PROT_READ | PROT_WRITE, kFlags, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kGuard, PROT_NONE) != 0) {
      std::perror("emulator: no memory for the stacks of a block");
      std::abort();
    }
    base_ = static_cast<char*>(memory) + kGuard;
  }
  for (size_t i = 0; i < count; ++i) std::memcpy(stack(i), &kCanary, sizeof kCanary);
}

Stacks::~Stacks() {
  // Fibers that were given up have left their marks there.
  ASAN_UNPOISON_MEMORY_REGION(base_, count_ * bytes_of_one());
  const std::lock_guard lock(pool_mutex);
  pool()[count_ * bytes_of_one()].push_back(base_);
}

bool Stacks::overrun(size_t i) const { return std::memcmp(stack(i), &kCanary, sizeof kCanary) != 0; }

}  // namespace tpk::emu
