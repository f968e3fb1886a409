// In place of csrc/cuda/kernels/hopper.cuh: the same primitives, emulated.
#pragma once

#include "cuda/kernels/device.cuh"
#include "cuda/kernels/tensor_map_type.h"
#include "hopper.h"

namespace tpk::cuda {

inline uint32_t shared_address(const void* shared, Where where = Where::current()) {
  return emu::shared_address(shared, where);
}

inline void transaction_init(uint64_t* bar, uint32_t arrivals, Where where = Where::current()) {
  emu::transaction_init(bar, arrivals, where);
}
inline void transaction_init_done(Where where = Where::current()) { emu::transaction_init_done(where); }
inline void transaction_expect(uint64_t* bar, uint32_t bytes, Where where = Where::current()) {
  emu::transaction_arrive(bar, bytes, where);
}
inline void transaction_arrive(uint64_t* bar, Where where = Where::current()) {
  emu::transaction_arrive(bar, 0, where);
}
inline bool transaction_done(const uint64_t* bar, uint32_t parity, Where where = Where::current()) {
  return emu::transaction_done(bar, parity, where);
}

inline void prefetch(const TensorMap* map, Where where = Where::current()) { emu::prefetch(map, where); }
inline void load_tile(void* to, const TensorMap* map, uint64_t* bar, int32_t column, int32_t row,
                      Where where = Where::current()) {
  emu::load_tile(to, map, bar, column, row, where);
}
inline void load_bytes(void* to, const void* from, uint32_t bytes, uint64_t* bar, Where where = Where::current()) {
  emu::load_bytes(to, from, bytes, bar, where);
}
inline void store_bytes(void* to, const void* from, uint32_t bytes, Where where = Where::current()) {
  emu::store_bytes(to, from, bytes, where);
}
inline void store_tile(const TensorMap* map, const void* from, int32_t column, int32_t row,
                       Where where = Where::current()) {
  emu::store_tile(map, from, column, row, where);
}
inline void stores_commit() { emu::stores_commit(); }
template <int n>
void stores_wait_read(Where where = Where::current()) {
  emu::stores_wait(n, true, where);
}
template <int n>
void stores_wait(Where where = Where::current()) {
  emu::stores_wait(n, false, where);
}
inline void fence_async(Where where = Where::current()) { emu::fence_async(emu::Space::Global, where); }
inline void fence_async_shared(Where where = Where::current()) { emu::fence_async(emu::Space::Shared, where); }

inline void products_begin() { emu::products_begin(); }
inline void products_commit() { emu::products_commit(); }
template <int n>
void products_wait(Where where = Where::current()) {
  static_assert(n >= 0 && n <= 7, "wgmma.wait_group takes 0 .. 7");
  emu::products_wait(n, where);
}
template <class T, int N, bool b_transposed = false>
void product(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate, Where where = Where::current()) {
  static_assert(N % 8 == 0 && N >= 8 && N <= 256, "columns of a product of a warpgroup");
  const auto value = [](uint16_t bits) {
    T value;
    std::memcpy(&value, &bits, sizeof value);
    return to_float(value);
  };
  emu::product({d, N, a, b, accumulate, b_transposed, value}, where);
}

template <int n>
void registers_raise() {
  static_assert(n % 8 == 0 && n >= 24 && n <= 256, "setmaxnreg takes multiples of 8 in 24 .. 256");
  emu::registers(n);
}
template <int n>
void registers_lower() {
  static_assert(n % 8 == 0 && n >= 24 && n <= 256, "setmaxnreg takes multiples of 8 in 24 .. 256");
  emu::registers(n);
}
inline void sync_named(int id, int threads, Where where = Where::current()) { emu::sync_named(id, threads, where); }
inline bool one_of_warp(Where where = Where::current()) { return emu::one_of_warp(where); }

}  // namespace tpk::cuda
