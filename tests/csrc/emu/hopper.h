// What Hopper does beside its threads, emulated: barriers that count bytes, tiles that come by themselves, products of
// a warpgroup, barriers of some threads. For hopper_emu.h.
//
// Late      Nothing happens when it is asked for. A tile comes while somebody waits for a barrier, in any order; a
// product
//           is made, and reads its operands, when it is waited for, and until then its sums are NaN. So a stage that is
//           given back too early, or a sum that is read too early, is a wrong value.
// Bits      of descriptors, of the swizzle and of fragments are those of the PTX ISA (warpgroup-level matrix
// instructions,
//           tensor copies), decoded from what a kernel passes and never from how it made that.
#pragma once

#include "emu.h"

namespace tpk::emu {

// In bytes from where the dynamic shared memory of a block can begin at a multiple of 1024.
uint32_t shared_address(const void* shared, Where where);

void transaction_init(uint64_t* bar, uint32_t arrivals, Where where);
void transaction_arrive(uint64_t* bar, uint32_t expected_bytes, Where where);
bool transaction_done(const uint64_t* bar, uint32_t parity, Where where);

void load_tile(void* to, const void* map, uint64_t* bar, int32_t column, int32_t row, Where where);
// What this thread has acquired comes before what it makes others load.
void fence_async(Where where);

// d (+)= a[64, 16] @ b[columns, 16].T: this thread's share of it.
struct Product {
  float* d;
  int columns;
  uint64_t a, b;  // descriptors
  bool accumulate;
  float (*value)(uint16_t bits);
};
void products_begin();
void product(const Product& asked, Where where);
void products_commit();
void products_wait(int groups_left, Where where);

// All of so many threads, whole warps, that name the same barrier.
void meet_some(int id, int threads, Where where);

}  // namespace tpk::emu
