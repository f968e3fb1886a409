// The hardware of Hopper beyond device.cuh: tiles and bytes that the tensor memory accelerator moves,
// barriers that count bytes, products of a warpgroup. sm_90a alone.
//
// Each primitive has a twin in the emulator (tests/csrc/emu/override), which does what the hardware guarantees and no
// more: tiles and bytes arrive late, products are done after a wait for them.
//
//   products of a warpgroup    d[64, N] (+)= a[64, 16] @ b[N, 16].T, all 128 threads together. Of d a thread has, with
//                              its warp w of the four and its lane l:  d[4 j + 0, 1] = row 16 w + l / 4,
//                              columns 8 j + 2 (l % 4) + 0, 1, and d[4 j + 2, 3] the same of row + 8.
//   operands                   rows of 64 values of 2 bytes, 128 bytes, in shared memory as load_tile leaves them:
//                              groups of 8 rows are 1024 bytes and begin at a multiple of that; in a row the 16-byte
//                              words are permuted by the row: word c of row r lies at c ^ (r % 8). A row is one of a
//                              or b and 64 values of K; of a transposed b one value of K and 64 rows of b.
//   registers                  of d must not be touched from the first product until products_wait; ptxas would wait
//                              for every product by itself then, and warn (C7510).
#pragma once

#include "cuda/kernels/device.cuh"
#include "tensor_map_type.h"

namespace tpk::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void transaction_init(uint64_t* bar, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void transaction_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async;" ::: "memory");
}
__device__ __forceinline__ void transaction_expect(uint64_t* bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void transaction_arrive(uint64_t* bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory");
}
__device__ __forceinline__ bool transaction_done(const uint64_t* bar, uint32_t parity) {
  uint32_t done;
  asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, p; }"
               : "=r"(done)
               : "r"(shared_address(bar)), "r"(parity)
               : "memory");
  return done != 0;
}

__device__ __forceinline__ void prefetch(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
__device__ __forceinline__ void load_tile(void* to, const TensorMap* map, uint64_t* bar, int32_t column, int32_t row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(to)),
      "l"(map), "r"(shared_address(bar)), "r"(column), "r"(row)
      : "memory");
}

// Bulk copies: a multiple of 16 bytes, from and to multiples of 16, by the asynchronous proxy. Bytes from global
// memory, a peer's too, arrive at a barrier as tiles do.
__device__ __forceinline__ void load_bytes(void* to, const void* from, uint32_t bytes, uint64_t* bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(bar))
               : "memory");
}
// Stores to global memory belong to groups of the thread that asked for them, which alone can wait for them.
__device__ __forceinline__ void store_bytes(void* to, const void* from, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(__cvta_generic_to_global(to)),
               "r"(shared_address(from)), "r"(bytes)
               : "memory");
}
// The same of a tile, which lies in shared memory as load_tile would leave it. What is outside of the map's matrix is
// not written.
__device__ __forceinline__ void store_tile(const TensorMap* map, const void* from, int32_t column, int32_t row) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
               "r"(shared_address(from)), "r"(column), "r"(row)
               : "memory");
}
__device__ __forceinline__ void stores_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// All but the n latest groups have read their shared memory, which may be written again.
template <int n>
__device__ __forceinline__ void stores_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(n) : "memory");
}
// All but the n latest groups have written: this thread sees it as if it had written itself (the end of a bulk copy is
// followed by a fence between the proxies), so that it may raise a flag.
template <int n>
__device__ __forceinline__ void stores_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(n) : "memory");
}
// Between what threads write to global memory and tiles or bytes that are loaded from there: by the writer before it
// raises its flag, by the reader after it has seen it. For PTX one of them suffices, at the reader.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.global;" ::: "memory"); }
// Between what threads write to shared memory and what products or stores of tiles and bytes read there: by the writer.
__device__ __forceinline__ void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int n>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(n) : "memory");
}

template <int n>
__device__ __forceinline__ void registers_raise() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(n));
}
template <int n>
__device__ __forceinline__ void registers_lower() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(n));
}
__device__ __forceinline__ void sync_named(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ bool one_of_warp() {
  uint32_t chosen;
  asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.b32 %0, 1, 0, p; }" : "=r"(chosen));
  return chosen != 0;
}

template <class T, int N, bool b_transposed = false>
__device__ __forceinline__ void product(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate);

// The registers of d, which are operands 0 .. N / 2 - 1 of the instruction: their places in its text, and themselves.
#define TPK_PLACES_64                                                                \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define TPK_PLACES_128                                                                           \
  TPK_PLACES_64                                                                                  \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "           \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define TPK_REGISTERS_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define TPK_REGISTERS_16(i) TPK_REGISTERS_4(i), TPK_REGISTERS_4(i + 4), TPK_REGISTERS_4(i + 8), TPK_REGISTERS_4(i + 12)
#define TPK_REGISTERS_64(i) \
  TPK_REGISTERS_16(i), TPK_REGISTERS_16(i + 16), TPK_REGISTERS_16(i + 32), TPK_REGISTERS_16(i + 48)
#define TPK_REGISTERS_128(i) TPK_REGISTERS_64(i), TPK_REGISTERS_64(i + 64)

// half: N / 2; transposed: of b; a_place, b_place, accumulate_place: the operands behind d.
#define TPK_PRODUCT(T, type, N, half, transposed, a_place, b_place, accumulate_place)                           \
  template <>                                                                                                   \
  __device__ __forceinline__ void product<T, N, transposed == 1>(float (&d)[half], uint64_t a, uint64_t b,      \
                                                                 bool accumulate) {                             \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, " accumulate_place ", 0; wgmma.mma_async.sync.aligned.m64n" #N \
                 "k16.f32." type "." type " {" TPK_PLACES_##half "}, " a_place ", " b_place                     \
                                                                 ", p, 1, 1, 0, " #transposed "; }"             \
                 : TPK_REGISTERS_##half(0)                                                                      \
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                                          \
  }
#define TPK_PRODUCTS(T, type)                               \
  TPK_PRODUCT(T, type, 128, 64, 0, "%64", "%65", "%66")     \
  TPK_PRODUCT(T, type, 128, 64, 1, "%64", "%65", "%66")     \
  TPK_PRODUCT(T, type, 256, 128, 0, "%128", "%129", "%130") \
  TPK_PRODUCT(T, type, 256, 128, 1, "%128", "%129", "%130")
TPK_PRODUCTS(Half, "f16")
TPK_PRODUCTS(Bfloat16, "bf16")
#undef TPK_PRODUCTS
#undef TPK_PRODUCT
#undef TPK_REGISTERS_128
#undef TPK_REGISTERS_64
#undef TPK_REGISTERS_16
#undef TPK_REGISTERS_4
#undef TPK_PLACES_128
#undef TPK_PLACES_64

}  // namespace tpk::cuda
