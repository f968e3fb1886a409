// Mistakes with bulk copies and with tiles that are stored: each must be found.
#include "cuda/comm/tensor_map.h"
#include "cuda/kernels/hopper.cuh"
#include "planted.h"

using namespace tpk;
using namespace tpk::cuda;
using namespace tpk::planted;

namespace {

// ---- bulk copies: block 0 writes and raises a flag, block 1 copies through shared memory and raises another

enum class Copy {
  Right,
  NoFence,
  NoFenceOfShared,
  LoadUnawaited,
  ReadUnawaited,
  WriteUnawaited,
  NotCommitted,
  LeftAtEnd,
  OffPlace,
  OddSize
};

constexpr uint32_t kPieces = 4, kPiece = 64;  // floats, one of each thread

struct CopyArgs {
  float *from, *to, *y;
  uint32_t *written, *copied;
  Copy copy;
};

__device__ __forceinline__ float value_of(uint32_t i) { return static_cast<float>(i + 1); }

__device__ __forceinline__ void copy_piece(const CopyArgs& args, float* ring, uint64_t* came, uint32_t piece) {
  const Copy copy = args.copy;
  float* const stage = ring + piece % 2 * kPiece;
  uint64_t* const bar = &came[piece % 2];
  const auto await_load = [&] {
    while (!transaction_done(bar, piece / 2 & 1)) {
    }
  };
  if (copy != Copy::ReadUnawaited) stores_wait_read<1>();
  transaction_expect(bar, kPiece * 4);
  const uint32_t off = copy == Copy::OffPlace ? 1 : 0, less = copy == Copy::OddSize ? 4 : 0;
  load_bytes(stage, args.from + piece * kPiece + off, kPiece * 4 - less, bar);
  if (copy != Copy::LoadUnawaited) {
    await_load();
    stage[0] += 1;
    if (copy != Copy::NoFenceOfShared) fence_async_shared();
  }
  store_bytes(args.to + piece * kPiece, stage, kPiece * 4);
  if (copy != Copy::NotCommitted) stores_commit();
  if (copy == Copy::LoadUnawaited) await_load();
}

TPK_KERNEL void copy_pieces(CopyArgs args) {
  TPK_DYNAMIC_SHARED(char, dynamic);
  __shared__ uint64_t came[2];
  const uint32_t t = threadIdx.x;
  if (blockIdx.x == 0) {
    for (uint32_t i = t; i < kPieces * kPiece; i += blockDim.x) args.from[i] = value_of(i);
    __syncthreads();
    if (t == 0) {
      store_release_gpu(args.written, 1);
      while (load_acquire_sys(args.copied) == 0) {
      }
    }
    __syncthreads();
    for (uint32_t i = t; i < kPieces * kPiece; i += blockDim.x) args.y[i] = args.to[i];
    return;
  }
  if (t != 0) return;
  for (uint64_t& one : came) transaction_init(&one, 1);
  transaction_init_done();
  while (load_acquire_sys(args.written) == 0) {
  }
  if (args.copy != Copy::NoFence) fence_async();
  float* const ring = reinterpret_cast<float*>(dynamic + (1024 - reinterpret_cast<uintptr_t>(dynamic) % 1024) % 1024);
  for (uint32_t piece = 0; piece < kPieces; ++piece) copy_piece(args, ring, came, piece);
  if (args.copy == Copy::WriteUnawaited) stores_wait_read<0>();
  if (args.copy != Copy::WriteUnawaited && args.copy != Copy::LeftAtEnd) stores_wait<0>();
  store_release_gpu(args.copied, 1);
  if (args.copy == Copy::WriteUnawaited) stores_wait<0>();
}

bool copies(Copy copy) {
  constexpr uint32_t kAll = kPieces * kPiece;
  float* const y = filled<float>(kAll);
  const CopyArgs args{filled<float>(kAll + 4), filled<float>(kAll), y, filled<uint32_t>(1), filled<uint32_t>(1), copy};
  EXPECT(TPK_LAUNCH(copy_pieces, 2, kPiece, 2 * kPiece * 4 + 1024, nullptr, args) == cudaSuccess);
  if (cudaDeviceSynchronize() != cudaSuccess) return false;
  const std::vector<float> got = values_of(y, kAll);
  for (uint32_t i = 0; i < kAll; ++i) {
    if (got[i] != value_of(i) + (i % kPiece == 0 ? 1 : 0)) return false;
  }
  return true;
}

// By the race detector at every seed; without it by wrong values where bytes move late.
void must_be_seen(Copy copy) {
  if (emu::detects_races()) return must_report(emu::Kind::Race, [=] { return copies(copy); });
  for (uint64_t seed : {0, 2}) EXPECT(!run(quiet(seed), [=] { return copies(copy); }).right, "seed ", seed);
}
void must_be_misuse(Copy copy) {
  must_report(emu::Kind::Misuse, [=] { return copies(copy); });
}

CASE(bytes_that_are_copied_through_shared_memory_are_silent) {
  must_be_silent([] { return copies(Copy::Right); });
}
CASE(a_bulk_load_without_a_fence) { must_be_misuse(Copy::NoFence); }
CASE(a_bulk_store_before_its_bytes_have_come) { must_be_seen(Copy::LoadUnawaited); }
CASE(a_bulk_load_over_bytes_that_are_still_read) { must_be_seen(Copy::ReadUnawaited); }
CASE(a_flag_of_bytes_that_are_read_but_not_written) {
  if (emu::detects_races()) must_be_seen(Copy::WriteUnawaited);
}
CASE(bulk_stores_that_are_not_committed) { must_be_misuse(Copy::NotCommitted); }
CASE(a_block_ends_before_its_bulk_stores) { must_be_misuse(Copy::LeftAtEnd); }
CASE(a_bulk_copy_off_a_multiple_of_16) {
  must_report(emu::Kind::Misaligned, [] { return copies(Copy::OffPlace); });
}
CASE(a_bulk_copy_of_no_multiple_of_16_bytes) { must_be_misuse(Copy::OddSize); }
CASE(a_bulk_store_of_what_a_thread_wrote_without_a_fence) {
  if (emu::detects_races()) must_be_seen(Copy::NoFenceOfShared);
}

// ---- tiles that are stored: block 0 stages two, one after the other in one place, and raises a flag

enum class Store { Right, NoFence, OtherFence, Reused, ReadUnawaited, LeftAtEnd, OffPattern };

struct StoreArgs {
  TensorMap map;  // [12, 72], box of 8 rows
  Bfloat16* y;
  uint32_t* flag;
  float* seen;
  Store store;
};

TPK_KERNEL void stage_and_store(const __grid_constant__ StoreArgs args) {
  TPK_DYNAMIC_SHARED(char, dynamic);
  char* const tile = dynamic + (1024 - reinterpret_cast<uintptr_t>(dynamic) % 1024) % 1024;
  const Store store = args.store;
  if (blockIdx.x == 1) {
    if (threadIdx.x == 0) {
      while (load_acquire_sys(args.flag) == 0) {
      }
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < 12 * 72; i += blockDim.x) args.seen[i] = to_float(args.y[i]);
    return;
  }
  for (uint32_t number = 0; number < 2; ++number) {
    if (threadIdx.x == 0 && store != Store::Reused) stores_wait_read<0>();
    __syncthreads();
    const Bfloat16 value = from_float<Bfloat16>(static_cast<float>(number + 1));
    for (uint32_t i = threadIdx.x; i < 8 * 64; i += blockDim.x) memcpy(tile + 2 * i, &value, 2);
    if (store == Store::OtherFence) fence_async();
    if (store != Store::NoFence && store != Store::OtherFence) fence_async_shared();
    __syncthreads();
    if (threadIdx.x != 0) continue;
    store_tile(&args.map, tile + (store == Store::OffPattern ? 128 : 0), static_cast<int32_t>(number * 64),
               static_cast<int32_t>(number * 8));
    stores_commit();
  }
  if (threadIdx.x != 0) return;
  if (store == Store::ReadUnawaited) stores_wait_read<0>();
  if (store != Store::ReadUnawaited && store != Store::LeftAtEnd) stores_wait<0>();
  store_release_gpu(args.flag, 1);
  if (store == Store::ReadUnawaited) stores_wait<0>();
}

// Rows 0 .. 7 of the first 64 columns are 1, rows 8 .. 11 of the others 2; what lies outside stays.
bool stores(Store store) {
  float* const seen = filled<float>(12 * 72);
  Bfloat16* const y = filled<Bfloat16>(12 * 72);
  const StoreArgs args{tensor_map_of(DType::BF16, y, 12, 72, 144, 8), y, filled<uint32_t>(1), seen, store};
  EXPECT(TPK_LAUNCH(stage_and_store, 2, 64, 3072, nullptr, args) == cudaSuccess);
  if (cudaDeviceSynchronize() != cudaSuccess) return false;
  const std::vector<float> got = values_of(seen, 12 * 72);
  for (uint32_t i = 0; i < 12 * 72; ++i) {
    const bool below = i / 72 >= 8, right = i % 72 >= 64;
    if (got[i] != (below && right ? 2.0f : below || right ? 0.0f : 1.0f)) return false;
  }
  return true;
}

CASE(tiles_that_are_staged_and_stored_are_silent) {
  must_be_silent([] { return stores(Store::Right); });
}
CASE(tiles_that_are_stored_too_early_or_staged_over) {
  if (!emu::detects_races()) return;
  for (Store store : {Store::NoFence, Store::OtherFence, Store::Reused, Store::ReadUnawaited}) {
    must_report(emu::Kind::Race, [=] { return stores(store); });
  }
}
CASE(a_tile_that_is_stored_from_within_its_pattern_or_left_over) {
  for (Store store : {Store::OffPattern, Store::LeftAtEnd}) {
    must_report(emu::Kind::Misuse, [=] { return stores(store); });
  }
}

}  // namespace
