// CUDA C++ as ordinary C++20: what a kernel file sees in place of nvcc's built-ins.
//
// A block is an OS thread, so __shared__ is a thread-local static; a CUDA thread is a fiber of it. Barriers, shuffles
// and atomics take the place where they were called (std::source_location) for the emulator's reports.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <source_location>
#include <tuple>
#include <type_traits>
#include <utility>

#undef __shared__
#define __shared__ static thread_local
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __forceinline__
#define __forceinline__ inline  // once in a file instead of once in each of its kernels

#define TPK_KERNEL
#define TPK_DYNAMIC_SHARED(T, name) T* const name = reinterpret_cast<T*>(::tpk::emu::dynamic_shared())
#define TPK_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::tpk::emu::launch(#kernel, kernel, grid, block, shared_bytes, stream, __VA_ARGS__)

#define threadIdx (::tpk::emu::thread_index())
#define blockIdx (::tpk::emu::block_index())
#define blockDim (::tpk::emu::block_size())
#define gridDim (::tpk::emu::grid_size())

namespace tpk::emu {

using Where = std::source_location;

// ---- the calling thread ---------------------------------------------------------------------------------------------

const uint3& thread_index();
const uint3& block_index();
const dim3& block_size();
const dim3& grid_size();
char* dynamic_shared();

// ---- launches -------------------------------------------------------------------------------------------------------

struct LaunchRequest {
  const char* name;
  const void* kernel;
  dim3 grid, block;
  size_t shared_bytes;
  std::function<void()> body;  // what one thread runs
};
cudaError_t enqueue_launch(LaunchRequest request, cudaStream_t stream);

template <class... Params, class... Args>
cudaError_t launch(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, Args&&... args) {
  static_assert((!std::is_reference_v<Params> && ...), "kernels take their arguments by value");
  static_assert((sizeof(Params) + ... + 0) <= 4096, "the arguments of a kernel are at most 4096 bytes");
  auto values = std::make_shared<std::tuple<std::decay_t<Params>...>>(static_cast<Params>(args)...);
  return enqueue_launch({name, reinterpret_cast<const void*>(kernel), grid, block, shared_bytes,
                         [kernel, values] { std::apply(kernel, *values); }},
                        stream);
}

// ---- barriers of blocks and warps -----------------------------------------------------------------------------------

enum class Vote : uint8_t { None, Or, And, Count };
int sync_block(Vote vote, bool holds, Where where);

// The input of a lane to an operation of its warp, and the function that gives each lane its result.
struct Post {
  uint64_t value;
  int argument;
};
using Finish = void (*)(uint32_t mask, const Post* posts, uint64_t* results);
uint64_t sync_warp(uint32_t mask, Post post, Finish finish, Where where);
void warp_fence(uint32_t mask, Where where);

// ---- memory that is shared ------------------------------------------------------------------------------------------

enum class Scope : uint8_t { Block, Gpu, System };
enum class Order : uint8_t { Relaxed, Acquire, Release, AcquireRelease };
enum class Space : uint8_t { Global, Shared };  // where asynchronous accesses go

// Around one atomic access: checks it, keeps the detector's order of accesses equal to the real one, lets others run.
class Atomic {
 public:
  enum class Kind : uint8_t { Load, Store, Exchange };
  Atomic(const void* address, size_t bytes, Kind kind, Order order, Scope scope, Where where);
  ~Atomic();  // yields
  Atomic(const Atomic&) = delete;
  Atomic& operator=(const Atomic&) = delete;
  void loaded(uint64_t value) { value_ = value; }

 private:
  const void* address_;
  size_t bytes_;
  Kind kind_;
  Order order_;
  Scope scope_;
  Where where_;
  uint64_t value_ = 0;
};

void fence(Scope scope);
uint64_t time_ns();
[[noreturn]] void trap(Where where);
// A 16-byte access at an address that is no multiple of 16 ends the kernel.
void check_aligned(const void* address, size_t bytes, Where where);

// The places that a multicast address stands for, in the order in which the switch takes them in this run.
struct Places {
  int count = 0;
  char* at[64];
};
Places places_of(const void* multicast_address, size_t bytes, Where where);

template <class T>
T load(const T* from, Order order, Scope scope, Where where) {
  Atomic access(from, sizeof(T), Atomic::Kind::Load, order, scope, where);
  T value;
  __atomic_load(from, &value, __ATOMIC_SEQ_CST);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  access.loaded(bits);
  return value;
}

template <class T>
void store(T* to, T value, Order order, Scope scope, Where where) {
  Atomic access(to, sizeof(T), Atomic::Kind::Store, order, scope, where);
  __atomic_store(to, &value, __ATOMIC_SEQ_CST);
}

// *to = change(*to), at once; returns what was there before.
template <class T, class Change>
T exchange(T* to, Change change, Order order, Scope scope, Where where) {
  Atomic access(to, sizeof(T), Atomic::Kind::Exchange, order, scope, where);
  T before, after;
  __atomic_load(to, &before, __ATOMIC_SEQ_CST);
  do {
    after = change(before);
  } while (!__atomic_compare_exchange(to, &before, &after, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
  return before;
}

}  // namespace tpk::emu

#include "builtins.h"
