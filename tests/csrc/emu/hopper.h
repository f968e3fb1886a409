// What Hopper does beside its threads, emulated: barriers that count bytes, tiles and bytes that move by themselves,
// products of a warpgroup, barriers of some threads. For override/cuda/kernels/hopper.cuh.
//
// Late      Nothing happens when it is asked for. A tile is known to have come only while somebody waits for a barrier,
//           in any order; a product is made, and reads its operands, when it is waited for, and until then its sums are
//           NaN. So a stage that is given back too early, or a sum that is read too early, is a wrong value. Under odd
//           seeds a tile overwrites its place at once: so is one that is loaded too early. Bytes that are stored leave
//           shared memory, and come, when a wait asks for either; under odd seeds at once.
// Bits      of descriptors, of the swizzle and of fragments are those of the PTX ISA (warpgroup-level matrix
//           instructions, tensor copies), decoded from what a kernel passes and never from how it made that.
// Order     For the race detector, tiles and products read and write from when they are asked for until their barrier
//           or their wait is over; what threads wrote before, they see only behind a fence_async. Of what threads have
//           merely read nothing is asked but that it is over.
// Reported  what the hardware leaves undefined, or waits for in vain: bytes that nobody expected, one arrival too many,
//           barriers that were not initialised or published, products without begin or commit, sums that are touched on
//           the way, threads of a warpgroup that differ, tiles, stores and products left over when a block ends (the
//           hardware asks of stores only that shared memory has been read).
#pragma once

#include "emu.h"

namespace tpk::emu {

// In bytes from where the dynamic shared memory of a block can begin at a multiple of 1024.
uint32_t shared_address(const void* shared, Where where);

void transaction_init(uint64_t* bar, uint32_t arrivals, Where where);
void transaction_init_done(Where where);
void transaction_arrive(uint64_t* bar, uint32_t expected_bytes, Where where);
bool transaction_done(const uint64_t* bar, uint32_t parity, Where where);

void load_tile(void* to, const void* map, uint64_t* bar, int32_t column, int32_t row, Where where);
void prefetch(const void* map, Where where);

// Bulk copies of bytes: into shared memory as tiles come; out of it, as tiles, in groups of the thread that asks.
void load_bytes(void* to, const void* from, uint32_t bytes, uint64_t* bar, Where where);
void store_bytes(void* to, const void* from, uint32_t bytes, Where where);
void store_tile(const void* map, const void* from, int32_t column, int32_t row, Where where);
void stores_commit();
// For all groups but so many: `reads`, until shared memory has been read, else until all is written.
void stores_wait(int groups_left, bool reads, Where where);

// What this thread has acquired comes before what it makes others load from that state space, and from no other.
void fence_async(Space space, Where where);

// d (+)= a[64, 16] @ b[columns, 16].T: this thread's share of it.
struct Product {
  float* d;
  int columns;
  uint64_t a, b;  // descriptors
  bool accumulate, b_transposed;
  float (*value)(uint16_t bits);
};
void products_begin();
void product(const Product& asked, Where where);
void products_commit();
void products_wait(int groups_left, Where where);

// All of so many threads, whole warps, that name the same barrier.
void sync_named(int id, int threads, Where where);

// That each thread of the warpgroup has from now on.
void registers(int each);
bool one_of_warp(Where where);

}  // namespace tpk::emu
