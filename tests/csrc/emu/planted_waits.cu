// Planted bugs: threads, blocks and ranks that wait for somebody who never comes, and accesses that no hardware would
// take. Found in every variant of the emulator.
#include "planted_two_shot.cuh"

using namespace tpk;
using namespace tpk::planted;
using emu::Kind;

// One block of 64 threads on rank 0.
static bool launch(void (*kernel)(uint32_t*)) {
  uint32_t* out = filled<uint32_t>(256);
  TPK_LAUNCH(kernel, dim3(1), dim3(64), 0, nullptr, out);
  return cudaDeviceSynchronize() == cudaSuccess;
}

CASE(right_two_shot_is_silent) { must_be_silent(all_reduce<Bug::None>); }
CASE(right_one_shot_is_silent) {
  must_be_silent([] { return all_reduce_by(one_shot<false>); });
}

// ---- threads of a block ---------------------------------------------------------------------------------------------

TPK_KERNEL void barrier_in_both_branches(uint32_t* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
    out[0] = 1;
  } else {
    __syncthreads();
  }
}
TPK_KERNEL void barrier_in_one_branch(uint32_t* out) {
  if (threadIdx.x < 32) __syncthreads();
  out[threadIdx.x] = 1;
  __syncthreads();
}
TPK_KERNEL void barriers_in_loops_of_different_length(uint32_t* out) {
  for (uint32_t i = threadIdx.x; i < 100; i += blockDim.x) {
    out[i] = i;
    __syncthreads();
  }
  __syncthreads();
}
TPK_KERNEL void barrier_against_shuffle(uint32_t* out) {
  if (threadIdx.x % 32 == 0) __syncthreads();
  out[threadIdx.x] = __shfl_sync(0xffffffffu, threadIdx.x, 3);
  if (threadIdx.x % 32 != 0) __syncthreads();
}
TPK_KERNEL void full_mask_in_a_branch(uint32_t* out) {
  if (threadIdx.x % 32 < 16) {
    out[threadIdx.x] = __shfl_sync(0xffffffffu, threadIdx.x, 3);
  } else {
    out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, threadIdx.x, 1);
  }
}
TPK_KERNEL void mask_without_the_caller(uint32_t* out) { out[threadIdx.x] = __shfl_sync(0x0000ffffu, threadIdx.x, 3); }
TPK_KERNEL void shuffle_from_a_lane_that_is_not_there(uint32_t* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_sync(0x0000ffffu, threadIdx.x, 20);
}

CASE(a_barrier_in_both_branches) {
  must_report(Kind::Divergence, [] { return launch(barrier_in_both_branches); });
}
CASE(a_barrier_in_one_branch) {
  must_report(Kind::Divergence, [] { return launch(barrier_in_one_branch); });
}
CASE(barriers_in_loops_of_unequal_length) {
  must_report(Kind::Divergence, [] { return launch(barriers_in_loops_of_different_length); });
}
CASE(some_lanes_at_a_barrier_others_at_a_shuffle) {
  must_report(Kind::Divergence, [] { return launch(barrier_against_shuffle); });
}
CASE(a_full_mask_in_a_divergent_branch) {
  must_report(Kind::Divergence, [] { return launch(full_mask_in_a_branch); });
}
CASE(a_mask_that_does_not_name_the_caller) {
  must_report(Kind::Divergence, [] { return launch(mask_without_the_caller); });
}
CASE(a_shuffle_from_a_lane_that_takes_no_part) {
  must_report(Kind::Misuse, [] { return launch(shuffle_from_a_lane_that_is_not_there); });
}

CASE(divergence_names_both_places_and_fails_the_launch) {
  const Outcome outcome = run(quiet(0), [] { return launch(barrier_in_both_branches); });
  EXPECT(outcome.error == cudaErrorLaunchFailure && !outcome.right);
  const std::string text = outcome.text();
  const size_t first = text.find("planted_waits.cu:"), second = text.find("planted_waits.cu:", first + 1);
  EXPECT(second != std::string::npos && text.substr(first, 20) != text.substr(second, 20), text);
  EXPECT(text.find("rank 0 barrier_in_both_branches block (0,0,0)") != std::string::npos, text);
}

// ---- blocks and ranks -----------------------------------------------------------------------------------------------

// Every block waits for all blocks.
TPK_KERNEL void grid_barrier(uint32_t* counter) {
  __syncthreads();
  if (threadIdx.x == 0) {
    emu::add_release_sys(counter, 1);
    while (load_acquire_sys(counter) < gridDim.x) {
    }
  }
  __syncthreads();
}

static bool grid_of_four() {
  uint32_t* counter = filled<uint32_t>(1);
  TPK_LAUNCH(grid_barrier, dim3(4), dim3(32), 0, nullptr, counter);
  return cudaDeviceSynchronize() == cudaSuccess;
}

CASE(a_grid_that_fits_is_silent) { must_be_silent(grid_of_four); }
CASE(a_grid_larger_than_what_is_resident) { must_report(Kind::Deadlock, grid_of_four, 3); }
CASE(waits_for_the_wrong_epoch) { must_report(Kind::Deadlock, all_reduce<Bug::EpochOffByOne>); }

TPK_KERNEL void raise_and_wait(uint32_t* mine, uint32_t* theirs) {
  store_release_sys(theirs, 1);
  while (load_acquire_sys(mine) == 0) {
  }
}

static bool two_that_wait_for_each_other(int streams) {
  uint32_t* flags = filled<uint32_t>(2);
  const cudaStream_t first = new_stream(), second = streams == 2 ? new_stream() : first;
  TPK_LAUNCH(raise_and_wait, dim3(1), dim3(1), 0, first, flags, flags + 1);
  TPK_LAUNCH(raise_and_wait, dim3(1), dim3(1), 0, second, flags + 1, flags);
  return cudaDeviceSynchronize() == cudaSuccess;
}
CASE(two_kernels_that_wait_for_each_other_in_two_streams_are_silent) {
  must_be_silent([] { return two_that_wait_for_each_other(2); });
}
CASE(two_kernels_that_wait_for_each_other_in_one_stream) {
  must_report(Kind::Deadlock, [] { return two_that_wait_for_each_other(1); });
}

static bool one_rank_stays_away() {
  uint32_t* flags = filled<uint32_t>(2);
  emu::run_ranks(2, [&](int rank) {
    if (rank == 0) TPK_LAUNCH(raise_and_wait, dim3(1), dim3(1), 0, nullptr, flags, flags + 1);
    cudaDeviceSynchronize();
  });
  return true;
}
CASE(one_rank_stays_away_and_the_dump_says_who_waits_for_what) {
  must_report(Kind::Deadlock, one_rank_stays_away);
  const std::string text = run(quiet(0), one_rank_stays_away).text();
  EXPECT(text.find("rank 0 raise_and_wait") != std::string::npos, text);
  EXPECT(text.find("polls") != std::string::npos && text.find("(memory of rank 0, byte 0)") != std::string::npos, text);
  EXPECT(text.find("planted_waits.cu:") != std::string::npos, text);
}

// ---- what no hardware would take ------------------------------------------------------------------------------------

CASE(gpu_scope_on_a_flag_of_a_peer) { must_report(Kind::Scope, all_reduce<Bug::GpuScopeOnPeer>); }

TPK_KERNEL void add_at_a_peer(uint32_t* counter) { atomicAdd(counter, 1); }
TPK_KERNEL void add_at_a_peer_by_block(uint32_t* counter) { atomicAdd_block(counter, 1); }
TPK_KERNEL void add_at_a_peer_for_all(uint32_t* counter) { atomicAdd_system(counter, 1); }

static bool add_from_rank_one(void (*kernel)(uint32_t*)) {
  uint32_t* counter = filled<uint32_t>(1);
  EXPECT(cudaSetDevice(1) == cudaSuccess);
  TPK_LAUNCH(kernel, dim3(1), dim3(32), 0, nullptr, counter);
  EXPECT(cudaDeviceSynchronize() == cudaSuccess);
  return values_of(counter, 1)[0] == 32;
}
CASE(an_atomic_of_system_scope_at_a_peer_is_silent) {
  must_be_silent([] { return add_from_rank_one(add_at_a_peer_for_all); });
}
CASE(an_atomic_of_gpu_scope_at_a_peer) {
  must_report(Kind::Scope, [] { return add_from_rank_one(add_at_a_peer); });
}
CASE(an_atomic_of_block_scope_at_a_peer) {
  must_report(Kind::Scope, [] { return add_from_rank_one(add_at_a_peer_by_block); });
}

TPK_KERNEL void load_misaligned(uint32_t* out) { store16(out, load16(out + 5)); }
TPK_KERNEL void store_misaligned(uint32_t* out) { store16(out + 2, load16(out)); }
TPK_KERNEL void flag_misaligned(uint32_t* out) {
  store_release_sys(reinterpret_cast<uint32_t*>(reinterpret_cast<char*>(out) + 2), 1);
}

CASE(a_misaligned_load_of_16_bytes) {
  must_report(Kind::Misaligned, [] { return launch(load_misaligned); });
  EXPECT(run(quiet(0), [] { return launch(load_misaligned); }).error == cudaErrorMisalignedAddress);
}
CASE(a_misaligned_store_of_16_bytes) {
  must_report(Kind::Misaligned, [] { return launch(store_misaligned); });
}
CASE(a_misaligned_flag) {
  must_report(Kind::Misaligned, [] { return launch(flag_misaligned); });
}

// ---- by their values ------------------------------------------------------------------------------------------------

CASE(reads_the_wrong_peer) { must_be_wrong(all_reduce<Bug::WrongPeer>); }
CASE(writes_to_the_wrong_owner) { must_be_wrong(all_reduce<Bug::WrongOwner>); }
