// In place of csrc/cuda/kernels/device.cuh: the same primitives, emulated.
#pragma once

#include "core/codec/half.h"
#include "cuda/kernels/launch.h"
#include "cuda/kernels/word16.h"

namespace tpk::cuda {

using emu::Where;

inline uint32_t load_acquire_sys(const uint32_t* from, Where where = Where::current()) {
  return emu::load(from, emu::Order::Acquire, emu::Scope::System, where);
}
inline uint32_t load_relaxed_sys(const uint32_t* from, Where where = Where::current()) {
  return emu::load(from, emu::Order::Relaxed, emu::Scope::System, where);
}
inline void store_release_sys(uint32_t* to, uint32_t value, Where where = Where::current()) {
  emu::store(to, value, emu::Order::Release, emu::Scope::System, where);
}
inline void store_release_gpu(uint32_t* to, uint32_t value, Where where = Where::current()) {
  emu::store(to, value, emu::Order::Release, emu::Scope::Gpu, where);
}
inline void store_relaxed_sys(uint32_t* to, uint32_t value, Where where = Where::current()) {
  emu::store(to, value, emu::Order::Relaxed, emu::Scope::System, where);
}
inline uint32_t add_acq_rel_gpu(uint32_t* to, uint32_t value, Where where = Where::current()) {
  return emu::exchange(
      to, [=](uint32_t old) { return old + value; }, emu::Order::AcquireRelease, emu::Scope::Gpu, where);
}

inline void fence_sys() { emu::fence(emu::Scope::System); }
inline uint64_t global_time_ns() { return emu::time_ns(); }
[[noreturn]] inline void trap(Where where = Where::current()) { emu::trap(where); }

inline Word16 load16(const void* from, Where where = Where::current()) {
  emu::check_aligned(from, 16, where);
  return *static_cast<const Word16*>(from);
}
inline Word16 load16_peer(const void* from, Where where = Where::current()) { return load16(from, where); }
inline void store16(void* to, Word16 word, Where where = Where::current()) {
  emu::check_aligned(to, 16, where);
  *static_cast<Word16*>(to) = word;
}

// Of its words the race detector knows each as a flag's, relaxed.
inline void store16_relaxed_sys(void* to, Word16 word, Where where = Where::current()) {
  emu::check_aligned(to, 16, where);
  uint32_t* const words = static_cast<uint32_t*>(to);
  store_relaxed_sys(words, word.x, where), store_relaxed_sys(words + 1, word.y, where);
  store_relaxed_sys(words + 2, word.z, where), store_relaxed_sys(words + 3, word.w, where);
}

template <class T>
uint32_t rounded_pair(float low, float high) {
  return static_cast<uint32_t>(from_float<T>(low)) | static_cast<uint32_t>(from_float<T>(high)) << 16;
}

template <class T>
Word16 multicast_add16(const void* from, Where where = Where::current()) {
  constexpr size_t kValues = 16 / sizeof(T);
  const emu::Places places = emu::places_of(from, 16, where);
  float sums[kValues] = {};
  for (int i = 0; i < places.count; ++i) {
    const Word16 word = load16(places.at[i], where);
    T values[kValues];
    std::memcpy(values, &word, 16);
    for (size_t k = 0; k < kValues; ++k) sums[k] += to_float(values[k]);
  }
  T rounded[kValues];
  for (size_t k = 0; k < kValues; ++k) rounded[k] = from_float<T>(sums[k]);
  Word16 word;
  std::memcpy(&word, rounded, 16);
  return word;
}

inline void fence_alias() {}

inline void multicast_store16(void* to, Word16 word, Where where = Where::current()) {
  const emu::Places places = emu::places_of(to, 16, where);
  for (int i = 0; i < places.count; ++i) store16(places.at[i], word, where);
}

inline uint32_t warp_max(uint32_t value, Where where = Where::current()) {
  for (int offset = 16; offset > 0; offset /= 2) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, value, offset, 32, where);
    value = other > value ? other : value;
  }
  return value;
}

}  // namespace tpk::cuda
