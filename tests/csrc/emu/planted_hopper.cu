// Mistakes with what Hopper does beside its threads: each must be found.
#include "hopper_tile.cuh"

using namespace tpk;
using namespace tpk::planted;

namespace {

bool multiplies_wrongly(Fault fault, bool transposed = false) {
  return multiplies<Bfloat16, 128>(128, 128, 320, fault, transposed);
}

// Reported as what it is, at every seed.
void must_report_of(Fault fault, emu::Kind kind) {
  must_report(kind, [=] { return multiplies_wrongly(fault); });
}

// By the race detector at every seed; without it by a report or by wrong values, in one order or another.
void must_be_found(Fault fault) {
  int found = 0;
  for (uint64_t seed = 1; seed <= (emu::detects_races() ? 3 : 12); ++seed) {
    const Outcome outcome = run(quiet(seed), [=] { return multiplies_wrongly(fault); });
    if (emu::detects_races()) EXPECT(!outcome.reports.empty(), "seed ", seed, ": no report");
    found += !outcome.reports.empty() || !outcome.right ? 1 : 0;
  }
  EXPECT(found > 0);
}

// ---- barriers and tiles
CASE(a_barrier_that_tiles_are_not_told_of) { must_report_of(Fault::NotPublished, emu::Kind::Misuse); }
CASE(bytes_that_nobody_expects) { must_be_found(Fault::NoExpect); }
CASE(a_stage_is_waited_for_with_the_wrong_parity) { must_be_found(Fault::WrongParity); }
CASE(a_stage_is_given_back_before_it_has_been_read) { must_be_found(Fault::EarlyRelease); }
CASE(a_block_ends_before_its_tiles_have_come) { must_report_of(Fault::LeftTile, emu::Kind::Misuse); }
CASE(a_tile_is_read_before_it_has_been_waited_for) {
  if (emu::detects_races()) must_report_of(Fault::ReadUnawaited, emu::Kind::Race);
}

// ---- the emulator itself: tiles land by a formula and are read by a table, so that neither can be wrong alone
CASE(tiles_that_land_by_another_swizzle_than_products_read) {
  for (uint64_t seed : {0, 1}) {
    emu::Options options = quiet(seed);
    options.planted_swizzle = true;
    for (bool transposed : {false, true}) {
      EXPECT(!run(options, [=] { return multiplies_wrongly(Fault::None, transposed); }).right, "seed ", seed);
      EXPECT(run(quiet(seed), [=] { return multiplies_wrongly(Fault::None, transposed); }).right, "seed ", seed);
    }
  }
}

// ---- products
CASE(an_operand_advances_by_half_a_step) {
  must_be_wrong([] { return multiplies_wrongly(Fault::WrongStep); });
}
CASE(an_operand_of_another_swizzle) { must_report_of(Fault::WrongSwizzle, emu::Kind::Misuse); }
CASE(an_operand_that_begins_within_its_pattern) { must_report_of(Fault::WrongStart, emu::Kind::Misuse); }
CASE(an_operand_that_is_read_in_the_other_layout) {
  must_be_wrong([] { return multiplies_wrongly(Fault::OtherLayout, true); });
}
CASE(a_transposed_operand_whose_next_64_rows_are_looked_for_elsewhere) {
  must_be_wrong([] { return multiplies_wrongly(Fault::WrongLeading, true); });
}
CASE(a_transposed_operand_that_advances_as_the_other_does) {
  must_report(emu::Kind::Misuse, [] { return multiplies_wrongly(Fault::WrongAdvance, true); });
}
CASE(products_without_a_beginning) { must_report_of(Fault::NoBegin, emu::Kind::Misuse); }
CASE(products_that_are_not_committed) { must_report_of(Fault::NoCommit, emu::Kind::Misuse); }
CASE(sums_are_read_before_they_are_there) {
  must_be_wrong([] { return multiplies_wrongly(Fault::NoWait); });
  must_report_of(Fault::NoWait, emu::Kind::Misuse);
}
CASE(sums_are_written_to_before_they_are_there) { must_report_of(Fault::Touched, emu::Kind::Misuse); }
CASE(threads_of_a_warpgroup_that_ask_for_different_products) {
  must_report_of(Fault::OtherOperand, emu::Kind::Divergence);
}
CASE(a_warp_that_asks_for_one_product_less) { must_report_of(Fault::OneWarpLess, emu::Kind::Divergence); }
CASE(more_registers_than_there_are) { must_report_of(Fault::TooManyRegisters, emu::Kind::Misuse); }

// ---- what threads wrote, read by tiles: block 0 writes and raises a flag, block 1 loads
// -------------------------------

enum class Fence { Right, None, NoneOfLoader, OfOtherSpace };

struct GatherArgs {
  TensorMap map;
  Bfloat16* x;
  uint32_t* flag;
  float* y;
  Fence fence;
};

TPK_KERNEL void gather_and_load(const __grid_constant__ GatherArgs args) {
  TPK_DYNAMIC_SHARED(char, dynamic);
  __shared__ uint64_t full;
  char* const tile = dynamic + (1024 - reinterpret_cast<uintptr_t>(dynamic) % 1024) % 1024;
  if (blockIdx.x == 0) {
    for (uint32_t i = threadIdx.x; i < 8 * 64; i += blockDim.x) args.x[i] = from_float<Bfloat16>(1);
    __syncthreads();
    if (threadIdx.x == 0) store_release_sys(args.flag, 1);
    return;
  }
  if (threadIdx.x == 0) transaction_init(&full, 1), transaction_init_done();
  const uint32_t listener = args.fence == Fence::None || args.fence == Fence::OfOtherSpace ? 0 : 32;
  if (threadIdx.x == listener) {
    while (load_acquire_sys(args.flag) == 0) {
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    if (args.fence == Fence::Right) fence_async();
    if (args.fence == Fence::OfOtherSpace) fence_async_shared();
    transaction_expect(&full, 8 * 128);
    load_tile(tile, &args.map, &full, 0, 0);
  }
  while (!transaction_done(&full, 0)) {
  }
  Bfloat16 value;
  memcpy(&value, tile + threadIdx.x * 2, 2);
  args.y[threadIdx.x] = to_float(value);
}

bool loads_what_was_gathered(Fence fence) {
  Bfloat16* const x = filled<Bfloat16>(8 * 64);
  float* const y = filled<float>(64);
  const GatherArgs args{tensor_map_of(DType::BF16, x, 8, 64, 128, 8), x, filled<uint32_t>(1), y, fence};
  EXPECT(TPK_LAUNCH(gather_and_load, 2, 64, 2048, nullptr, args) == cudaSuccess);
  return cudaDeviceSynchronize() == cudaSuccess && values_of(y, 64) == std::vector<float>(64, 1);
}

CASE(a_gather_that_is_fenced_is_silent) {
  must_be_silent([] { return loads_what_was_gathered(Fence::Right); });
}
CASE(a_gather_without_a_fence) {
  must_report(emu::Kind::Misuse, [] { return loads_what_was_gathered(Fence::None); });
}
CASE(a_gather_with_a_fence_of_another_state_space) {
  must_report(emu::Kind::Misuse, [] { return loads_what_was_gathered(Fence::OfOtherSpace); });
}
CASE(a_gather_that_another_thread_has_heard_of_without_a_fence) {
  if (emu::detects_races()) must_report(emu::Kind::Race, [] { return loads_what_was_gathered(Fence::NoneOfLoader); });
}

// ---- what threads wrote, read by products
// ----------------------------------------------------------------------------

enum class Staged { Fenced, FencedElsewhere, Unfenced };

struct StagedArgs {
  float* y;
  Staged staged;
};

TPK_KERNEL void write_and_multiply(StagedArgs args) {
  TPK_DYNAMIC_SHARED(char, dynamic);
  char* const rows = dynamic + (1024 - reinterpret_cast<uintptr_t>(dynamic) % 1024) % 1024;
  const Bfloat16 one = from_float<Bfloat16>(1);
  for (uint32_t i = threadIdx.x; i < 128 * 64; i += blockDim.x) memcpy(rows + 2 * i, &one, 2);
  if (args.staged == Staged::Fenced) fence_async_shared();
  if (args.staged == Staged::FencedElsewhere) fence_async();
  __syncthreads();
  float d[64];
  products_begin();
  product<Bfloat16, 128>(d, operand(rows), operand(rows), false);
  products_commit();
  products_wait<0>();
  for (uint32_t i = 0; i < 64; ++i) args.y[threadIdx.x * 64 + i] = d[i];
}

bool multiplies_what_was_written(Staged staged) {
  float* const y = filled<float>(128 * 64);
  EXPECT(TPK_LAUNCH(write_and_multiply, 1, 128, 128 * 128 + 1024, nullptr, StagedArgs{y, staged}) == cudaSuccess);
  return cudaDeviceSynchronize() == cudaSuccess && values_of(y, 128 * 64) == std::vector<float>(128 * 64, 16);
}

CASE(operands_that_threads_write_and_fence_are_silent) {
  must_be_silent([] { return multiplies_what_was_written(Staged::Fenced); });
}
CASE(operands_that_threads_write_without_a_fence) {
  if (emu::detects_races()) must_report(emu::Kind::Race, [] { return multiplies_what_was_written(Staged::Unfenced); });
}
CASE(operands_that_threads_write_with_a_fence_of_another_state_space) {
  if (!emu::detects_races()) return;
  must_report(emu::Kind::Race, [] { return multiplies_what_was_written(Staged::FencedElsewhere); });
}

// ---- a tile's flag, and barriers of some threads
// ---------------------------------------------------------------------

enum class Barrier { Right, None, PartsOfWarps, OtherCount };

struct FlagArgs {
  float* tile;
  uint32_t* flag;
  float* sums;
  Barrier barrier;
};

// Warps 1 and 2 of block 0 write a tile, one thread raises its flag, block 1 reads.
TPK_KERNEL void send_tile(FlagArgs args) {
  const Barrier barrier = args.barrier;
  if (blockIdx.x == 0) {
    if (threadIdx.x < 32) return;
    const uint32_t thread = threadIdx.x - 32;
    args.tile[thread] = 1;
    if (barrier == Barrier::Right) sync_named(1, 64);
    if (barrier == Barrier::PartsOfWarps && thread % 32 < 16) sync_named(1, 32);
    if (barrier == Barrier::OtherCount) sync_named(1, thread < 32 ? 64 : 32);
    if (thread == 0) store_release_sys(args.flag, 1);
    return;
  }
  if (threadIdx.x == 0) {
    while (load_acquire_sys(args.flag) == 0) {
    }
  }
  __syncthreads();
  if (threadIdx.x < 64) args.sums[threadIdx.x] = args.tile[threadIdx.x] + 1;
}

bool sends(Barrier barrier) {
  float* const sums = filled<float>(64);
  const FlagArgs args{filled<float>(64), filled<uint32_t>(1), sums, barrier};
  EXPECT(TPK_LAUNCH(send_tile, 2, 96, 0, nullptr, args) == cudaSuccess);
  return cudaDeviceSynchronize() == cudaSuccess && values_of(sums, 64) == std::vector<float>(64, 2);
}

CASE(a_tile_that_its_writers_have_met_for_is_silent) {
  must_be_silent([] { return sends(Barrier::Right); });
}
CASE(a_tiles_flag_before_its_writers_have_met) {
  if (emu::detects_races()) must_report(emu::Kind::Race, [] { return sends(Barrier::None); });
}
CASE(parts_of_warps_that_meet) {
  must_report(emu::Kind::Misuse, [] { return sends(Barrier::PartsOfWarps); });
}
CASE(threads_that_meet_in_different_numbers) {
  must_report(emu::Kind::Misuse, [] { return sends(Barrier::OtherCount); });
}

}  // namespace
