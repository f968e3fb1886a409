// The functions that nvcc knows without a header: barriers, shuffles, votes, atomics, bits and arithmetic.
// Included by emu.h alone.
#pragma once

#include <bit>
#include <cmath>

// ---- barriers, votes ------------------------------------------------------------------------------------------------

inline void __syncthreads(tpk::emu::Where where = tpk::emu::Where::current()) {
  tpk::emu::sync_block(tpk::emu::Vote::None, false, where);
}
inline int __syncthreads_or(int holds, tpk::emu::Where where = tpk::emu::Where::current()) {
  return tpk::emu::sync_block(tpk::emu::Vote::Or, holds != 0, where);
}
inline int __syncthreads_and(int holds, tpk::emu::Where where = tpk::emu::Where::current()) {
  return tpk::emu::sync_block(tpk::emu::Vote::And, holds != 0, where);
}
inline int __syncthreads_count(int holds, tpk::emu::Where where = tpk::emu::Where::current()) {
  return tpk::emu::sync_block(tpk::emu::Vote::Count, holds != 0, where);
}
inline void __syncwarp(uint32_t mask = 0xffffffffu, tpk::emu::Where where = tpk::emu::Where::current()) {
  tpk::emu::warp_fence(mask, where);
}

namespace tpk::emu {

// One pass over the lanes of a warp operation; every lane gets the same result.
template <class Fold>
void fold_lanes(uint32_t mask, const Post* posts, uint64_t* results, uint64_t start, Fold fold) {
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1) start = fold(start, posts[lane].value, lane);
  }
  for (int lane = 0; lane < 32; ++lane) results[lane] = start;
}

inline void finish_ballot(uint32_t mask, const Post* posts, uint64_t* results) {
  fold_lanes(mask, posts, results, 0, [](uint64_t bits, uint64_t holds, int lane) { return bits | holds << lane; });
}

// A shuffle's lane takes the value of lane `argument`, or of itself when that one lies outside its part of the warp.
void finish_shuffle(uint32_t mask, const Post* posts, uint64_t* results);
int lane_of_thread();

template <class T>
T shuffle(uint32_t mask, T value, int source, Where where) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>, "a lane gives at most 8 bytes");
  Post post{0, source};
  std::memcpy(&post.value, &value, sizeof value);
  const uint64_t bits = sync_warp(mask, post, finish_shuffle, where);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T, class Fold>
void finish_reduce(uint32_t mask, const Post* posts, uint64_t* results) {
  const auto start = static_cast<T>(posts[std::countr_zero(mask)].value);
  const uint32_t rest = mask & (mask - 1);
  fold_lanes(rest, posts, results, static_cast<uint64_t>(start), [](uint64_t a, uint64_t b, int) {
    return static_cast<uint64_t>(Fold()(static_cast<T>(a), static_cast<T>(b)));
  });
}

struct Smaller {
  template <class T>
  T operator()(T a, T b) const {
    return b < a ? b : a;
  }
};
struct Larger {
  template <class T>
  T operator()(T a, T b) const {
    return a < b ? b : a;
  }
};

template <class T, class Fold>
T reduce_lanes(uint32_t mask, T value, Where where) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>, "__reduce_*_sync takes 32-bit integers");
  return static_cast<T>(sync_warp(mask, {static_cast<uint64_t>(value), 0}, finish_reduce<T, Fold>, where));
}

}  // namespace tpk::emu

inline uint32_t __ballot_sync(uint32_t mask, int holds, tpk::emu::Where where = tpk::emu::Where::current()) {
  const tpk::emu::Post post{static_cast<uint64_t>(holds != 0), 0};
  return static_cast<uint32_t>(tpk::emu::sync_warp(mask, post, tpk::emu::finish_ballot, where));
}
inline int __any_sync(uint32_t mask, int holds, tpk::emu::Where where = tpk::emu::Where::current()) {
  return __ballot_sync(mask, holds, where) != 0;
}
inline int __all_sync(uint32_t mask, int holds, tpk::emu::Where where = tpk::emu::Where::current()) {
  return __ballot_sync(mask, !holds, where) == 0;
}

// ---- shuffles: parts of `width` lanes, a power of two ---------------------------------------------------------------

template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, tpk::emu::Where where = tpk::emu::Where::current()) {
  const int lane = tpk::emu::lane_of_thread();
  return tpk::emu::shuffle(mask, value, (lane & -width) + (source & (width - 1)), where);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32,
                 tpk::emu::Where where = tpk::emu::Where::current()) {
  const int lane = tpk::emu::lane_of_thread(), source = lane - static_cast<int>(delta);
  return tpk::emu::shuffle(mask, value, source < (lane & -width) ? lane : source, where);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32,
                   tpk::emu::Where where = tpk::emu::Where::current()) {
  const int lane = tpk::emu::lane_of_thread(), source = lane + static_cast<int>(delta);
  return tpk::emu::shuffle(mask, value, source >= (lane & -width) + width ? lane : source, where);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32,
                  tpk::emu::Where where = tpk::emu::Where::current()) {
  const int lane = tpk::emu::lane_of_thread(), source = lane ^ bits;
  return tpk::emu::shuffle(mask, value, source >= (lane & -width) + width ? lane : source, where);
}

// ---- reductions of a warp (sm_80) -----------------------------------------------------------------------------------

#define TPK_EMU_REDUCE(name, Fold)                                                                       \
  template <class T>                                                                                     \
  T __reduce_##name##_sync(uint32_t mask, T value, tpk::emu::Where where = tpk::emu::Where::current()) { \
    return tpk::emu::reduce_lanes<T, Fold>(mask, value, where);                                          \
  }
TPK_EMU_REDUCE(add, std::plus<T>)
TPK_EMU_REDUCE(min, tpk::emu::Smaller)
TPK_EMU_REDUCE(max, tpk::emu::Larger)
TPK_EMU_REDUCE(and, std::bit_and<T>)
TPK_EMU_REDUCE(or, std::bit_or<T>)
TPK_EMU_REDUCE(xor, std::bit_xor<T>)
#undef TPK_EMU_REDUCE

// ---- atomics: relaxed; the plain name is of gpu scope ---------------------------------------------------------------

#define TPK_EMU_ATOMIC(name, scope, ...)                                                             \
  template <class T>                                                                                 \
  T name(T* to, std::type_identity_t<T> value, tpk::emu::Where where = tpk::emu::Where::current()) { \
    return tpk::emu::exchange(                                                                       \
        to, [=]([[maybe_unused]] T old) -> T { return __VA_ARGS__; }, tpk::emu::Order::Relaxed,      \
        tpk::emu::Scope::scope, where);                                                              \
  }
#define TPK_EMU_ATOMICS(name, ...)                 \
  TPK_EMU_ATOMIC(name, Gpu, __VA_ARGS__)           \
  TPK_EMU_ATOMIC(name##_block, Block, __VA_ARGS__) \
  TPK_EMU_ATOMIC(name##_system, System, __VA_ARGS__)
TPK_EMU_ATOMICS(atomicAdd, static_cast<T>(old + value))
TPK_EMU_ATOMICS(atomicSub, static_cast<T>(old - value))
TPK_EMU_ATOMICS(atomicExch, value)
TPK_EMU_ATOMICS(atomicMin, value < old ? value : old)
TPK_EMU_ATOMICS(atomicMax, old < value ? value : old)
TPK_EMU_ATOMICS(atomicAnd, static_cast<T>(old& value))
TPK_EMU_ATOMICS(atomicOr, static_cast<T>(old | value))
TPK_EMU_ATOMICS(atomicXor, static_cast<T>(old ^ value))
TPK_EMU_ATOMICS(atomicInc, old >= value ? T{0} : static_cast<T>(old + 1))
#undef TPK_EMU_ATOMICS
#undef TPK_EMU_ATOMIC

#define TPK_EMU_CAS(name, scope)                                                                 \
  template <class T>                                                                             \
  T name(T* to, std::type_identity_t<T> expected, std::type_identity_t<T> value,                 \
         tpk::emu::Where where = tpk::emu::Where::current()) {                                   \
    return tpk::emu::exchange(                                                                   \
        to, [=](T old) -> T { return old == expected ? value : old; }, tpk::emu::Order::Relaxed, \
        tpk::emu::Scope::scope, where);                                                          \
  }
TPK_EMU_CAS(atomicCAS, Gpu)
TPK_EMU_CAS(atomicCAS_block, Block)
TPK_EMU_CAS(atomicCAS_system, System)
#undef TPK_EMU_CAS

inline void __threadfence_block() { tpk::emu::fence(tpk::emu::Scope::Block); }
inline void __threadfence() { tpk::emu::fence(tpk::emu::Scope::Gpu); }
inline void __threadfence_system() { tpk::emu::fence(tpk::emu::Scope::System); }

// ---- bits and arithmetic --------------------------------------------------------------------------------------------

inline int __clz(int value) { return std::countl_zero(static_cast<unsigned>(value)); }
inline int __popc(unsigned value) { return std::popcount(value); }
inline int __ffs(int value) { return value == 0 ? 0 : std::countr_zero(static_cast<unsigned>(value)) + 1; }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
inline long long __double_as_longlong(double value) { return std::bit_cast<long long>(value); }
inline double __longlong_as_double(long long bits) { return std::bit_cast<double>(bits); }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline int __float2int_rn(float value) { return static_cast<int>(std::nearbyintf(value)); }
inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }
inline double rsqrt(double value) { return 1.0 / std::sqrt(value); }
inline float __expf(float value) { return std::exp(value); }
inline float __logf(float value) { return std::log(value); }

template <class T>
T __ldg(const T* from) {
  return *from;
}

// min and max of two equal arithmetic types, as CUDA has them in the global namespace.
template <class T, class = std::enable_if_t<std::is_arithmetic_v<T>>>
T min(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) return std::fmin(a, b);
  return b < a ? b : a;
}
template <class T, class = std::enable_if_t<std::is_arithmetic_v<T>>>
T max(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) return std::fmax(a, b);
  return a < b ? b : a;
}
