// Atomic accesses, fences, and what ends a kernel.
#include <chrono>

#include "block.h"
#include "memory.h"
#include "report.h"

namespace tpk::emu {
namespace {

constexpr size_t kMostSeen = 1024;  // addresses that one loop may poll

// An atomic of gpu scope is one among the threads of one GPU; on another's memory it is none at all.
void check_scope(const Thread& thread, const void* address, Scope scope, const Where& where) {
  if (scope == Scope::System) return;
  const Allocation* allocation = find_allocation(address);
  if (allocation == nullptr || allocation->owner == kHost) return;
  if (allocation->owner == thread.block->launch().device->rank) return;
  report(Kind::Scope, thread.block->name() + ": an atomic of " + (scope == Scope::Gpu ? "gpu" : "block") +
                          " scope on " + describe_address(address) + " at " + text_of(where));
}

// Whether the thread has loaded the same from there since it last did something else.
bool waits(Thread& thread, const void* address, uint64_t value) {
  for (auto& [known, last] : thread.seen) {
    if (known != address) continue;
    if (last == value) return true;
    last = value;
    return false;
  }
  if (thread.seen.size() < kMostSeen) thread.seen.emplace_back(address, value);
  return false;
}

}  // namespace

Detector*& the_detector() {
  static Detector* detector = nullptr;
  return detector;
}
Detector* detector() { return the_detector(); }
void set_detector(Detector* detector) { the_detector() = detector; }
bool detects_races() { return detector() != nullptr; }

Atomic::Atomic(const void* address, size_t bytes, Kind kind, Order order, Scope scope, Where where)
    : address_(address), bytes_(bytes), kind_(kind), order_(order), scope_(scope), where_(where) {
  Thread& thread = *current_thread();
  check_aligned(address, bytes, where);
  check_scope(thread, address, scope, where);
  if (detector() != nullptr) detector()->begin_atomic(thread, address);
}

Atomic::~Atomic() {
  Thread& thread = *current_thread();
  if (detector() != nullptr) detector()->end_atomic(thread, address_, bytes_, kind_, order_, scope_, where_);
  if (kind_ == Kind::Load && order_ == Order::Acquire && scope_ != Scope::Block) thread.acquired = true;
  if (kind_ == Kind::Load) {
    after_load(thread, address_, value_, where_);
  } else {
    after_store(thread);
  }
}

void after_load(Thread& thread, const void* address, uint64_t value, const Where& where) {
  Block& block = *thread.block;
  if (waits(thread, address, value)) {
    thread.polled = address, thread.where = where;
    block.yield(Doing::Polling);
    return;
  }
  block.moved();
  block.preempt();
}

void after_store(Thread& thread) {
  thread.seen.clear();
  thread.block->moved();
  thread.block->preempt();
}

void fence(Scope scope) {
  Thread& thread = *current_thread();
  if (detector() != nullptr) detector()->fence(thread, scope);
  thread.block->preempt();
}

uint64_t time_ns() {
  return static_cast<uint64_t>(std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1));
}

void trap(Where) { current_thread()->block->die(cudaErrorLaunchFailure); }

void check_aligned(const void* address, size_t bytes, Where where) {
  if (reinterpret_cast<uintptr_t>(address) % bytes == 0) return;
  Block& block = *current_thread()->block;
  report(Kind::Misaligned, block.name() + ": an access of " + std::to_string(bytes) + " bytes to " +
                               describe_address(address) + " at " + text_of(where));
  block.die(cudaErrorMisalignedAddress);
}

}  // namespace tpk::emu
