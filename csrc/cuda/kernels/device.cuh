// The hardware beyond C++, for the kernels: inline PTX is here and in hopper.cuh alone. Torch-free.
//
// Flags between ranks go through load_acquire_sys and store_release_sys and nothing else: a rank that sees the flag
// sees what was written before it was raised. Loops that wait load through here. Each primitive has a twin in the
// emulator (tests/csrc/emu/override) that checks what it is used for: order, scope, alignment.
#pragma once

#include <cstdint>

#include "core/codec/half.h"
#include "cuda/kernels/launch.h"
#include "word16.h"

namespace tpk::cuda {

// ---- words that ranks share -----------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t load_acquire_sys(const uint32_t* from) {
  uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(__cvta_generic_to_global(from)) : "memory");
  return value;
}

__device__ __forceinline__ uint32_t load_relaxed_sys(const uint32_t* from) {
  uint32_t value;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(__cvta_generic_to_global(from)) : "memory");
  return value;
}

__device__ __forceinline__ void store_release_sys(uint32_t* to, uint32_t value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(to)), "r"(value) : "memory");
}

// For a flag between the blocks of one rank.
__device__ __forceinline__ void store_release_gpu(uint32_t* to, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(to)), "r"(value) : "memory");
}

__device__ __forceinline__ void store_relaxed_sys(uint32_t* to, uint32_t value) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(to)), "r"(value) : "memory");
}

// ---- words that the blocks of one rank share ------------------------------------------------------------------------

// Returns what was there before.
__device__ __forceinline__ uint32_t add_acq_rel_gpu(uint32_t* to, uint32_t value) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(to)), "r"(value)
               : "memory");
  return before;
}

// ---- order, time, the end -------------------------------------------------------------------------------------------

__device__ __forceinline__ void fence_sys() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }

__device__ __forceinline__ uint64_t global_time_ns() {
  uint64_t time;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time)::"memory");
  return time;
}

// Ends the kernel; the host sees a failed launch.
__device__ __forceinline__ void trap() { asm volatile("trap;" ::: "memory"); }

// ---- 16 bytes -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ Word16 load16(const void* from) {
  const uint4 word = *static_cast<const uint4*>(from);
  return {word.x, word.y, word.z, word.w};
}

// Of what another rank has written since this kernel began: not from the first-level cache, which may hold an older
// value.
__device__ __forceinline__ Word16 load16_peer(const void* from) {
  Word16 word;
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
               : "l"(__cvta_generic_to_global(from))
               : "memory");
  return word;
}

__device__ __forceinline__ void store16(void* to, Word16 word) {
  *static_cast<uint4*>(to) = make_uint4(word.x, word.y, word.z, word.w);
}

// Two of these and a flag are an announcement: with a store for each word of it the way to a peer is taken eight times.
// The words are ordered by the flag behind them, not among each other.
__device__ __forceinline__ void store16_relaxed_sys(void* to, Word16 word) {
  asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(word.x),
               "r"(word.y), "r"(word.z), "r"(word.w)
               : "memory");
}

// ---- two values, each rounded to nearest even, the first one in the low half ----------------------------------------

template <class T>
__device__ __forceinline__ uint32_t rounded_pair(float low, float high);

template <>
__device__ __forceinline__ uint32_t rounded_pair<Bfloat16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

template <>
__device__ __forceinline__ uint32_t rounded_pair<Half>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// ---- the switch: addresses of the multicast mapping stand for the same place at every rank --------------------------

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// The sum over all ranks of the 16 bytes at `from`, taken by the switch, in fp32 for the half types.
template <class T>
__device__ __forceinline__ Word16 multicast_add16(const void* from);

template <>
__device__ __forceinline__ Word16 multicast_add16<float>(const void* from) {
  Word16 word;
  asm volatile("multimem.ld_reduce.relaxed.sys.global.add.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
               : "l"(__cvta_generic_to_global(from))
               : "memory");
  return word;
}

template <>
__device__ __forceinline__ Word16 multicast_add16<Half>(const void* from) {
  Word16 word;
  asm volatile("multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4.f16x2 {%0, %1, %2, %3}, [%4];"
               : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
               : "l"(__cvta_generic_to_global(from))
               : "memory");
  return word;
}

template <>
__device__ __forceinline__ Word16 multicast_add16<Bfloat16>(const void* from) {
  Word16 word;
  asm volatile("multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4.bf16x2 {%0, %1, %2, %3}, [%4];"
               : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
               : "l"(__cvta_generic_to_global(from))
               : "memory");
  return word;
}

// Between accesses to the same memory through the multicast mapping and through a mapping of one rank: different
// virtual addresses of one place are different proxies (PTX ISA, memory consistency model), which flags do not order.
__device__ __forceinline__ void fence_alias() { asm volatile("fence.proxy.alias;" ::: "memory"); }

// The same 16 bytes to every rank.
__device__ __forceinline__ void multicast_store16(void* to, Word16 word) {
  asm volatile("multimem.st.relaxed.sys.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
               "r"(word.x), "r"(word.y), "r"(word.z), "r"(word.w)
               : "memory");
}

#else  // no switch before sm_90: the host never chooses this path there

template <class T>
__device__ __forceinline__ Word16 multicast_add16(const void*) {
  trap();
  return {};
}
__device__ __forceinline__ void multicast_store16(void*, Word16) { trap(); }
__device__ __forceinline__ void fence_alias() {}

#endif

// ---- threads that work together. All threads of the block, all lanes of the warp call -------------------------------

__device__ __forceinline__ uint32_t warp_max(uint32_t value) {
  for (int offset = 16; offset > 0; offset /= 2) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, value, offset);
    value = other > value ? other : value;
  }
  return value;
}

}  // namespace tpk::cuda
