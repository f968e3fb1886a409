// Planted bugs: shared memory, and threads of a block that depend on each other without a barrier.
#include "planted.h"

using namespace tpk;
using namespace tpk::planted;
using namespace tpk::cuda;
using emu::Kind;

// ---- a sum over the block: warps first, then their sums -------------------------------------------------------------

enum class Sum { Right, NoBarrier, ReusedTooEarly, ReadsWarpsThatAreNotThere, OnlyAVoteBetween };

template <Sum bug>
__device__ float block_sum(float value, float* sums) {
  value = emu::warp_sum(value);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
  if (bug != Sum::NoBarrier && bug != Sum::OnlyAVoteBetween) __syncthreads();
  if (bug == Sum::OnlyAVoteBetween) __any_sync(0xffffffffu, value > 0);  // a barrier that orders no memory
  float total = 0;
  const uint32_t warps = bug == Sum::ReadsWarpsThatAreNotThere ? 4 : blockDim.x / 32;
  for (uint32_t i = 0; i < warps; ++i) total += sums[i];
  if (bug != Sum::ReusedTooEarly) __syncthreads();  // sums may be used again
  return total;
}

template <Sum bug>
TPK_KERNEL void two_sums(float* out) {
  __shared__ float sums[4];
  const float first = block_sum<bug>(static_cast<float>(threadIdx.x), sums);
  const float second = block_sum<bug>(1.0f, sums);
  out[threadIdx.x] = first + 10000 * second;
}

template <Sum bug>
bool sums_are_right() {
  float* out = filled<float>(64);
  TPK_LAUNCH(two_sums<bug>, dim3(1), dim3(64), 0, nullptr, out);
  return values_of(out, 64) == std::vector<float>(64, 2016.0f + 640000.0f);
}

CASE(right_sum_over_a_block_is_silent) { must_be_silent(sums_are_right<Sum::Right>); }
CASE(no_barrier_between_writing_and_reading_shared_memory) { must_report(Kind::Race, sums_are_right<Sum::NoBarrier>); }
CASE(shared_memory_used_again_too_early) { must_report(Kind::Race, sums_are_right<Sum::ReusedTooEarly>); }
CASE(a_vote_taken_for_a_barrier) { must_report(Kind::Race, sums_are_right<Sum::OnlyAVoteBetween>); }
CASE(reads_sums_of_warps_that_are_not_there) {
  must_report(Kind::Uninitialised, sums_are_right<Sum::ReadsWarpsThatAreNotThere>);
}

// ---- dynamic shared memory: a reversal ------------------------------------------------------------------------------

template <bool barrier, uint32_t written>
TPK_KERNEL void reverse(uint32_t* out) {
  TPK_DYNAMIC_SHARED(uint32_t, values);
  if (threadIdx.x < written) values[threadIdx.x] = threadIdx.x;
  if (barrier) __syncthreads();
  out[threadIdx.x] = values[blockDim.x - 1 - threadIdx.x];
}

template <bool barrier, uint32_t written>
bool reversed() {
  uint32_t* out = filled<uint32_t>(64);
  TPK_LAUNCH((reverse<barrier, written>), dim3(2), dim3(64), 256, nullptr, out);
  const std::vector<uint32_t> values = values_of(out, 64);
  for (uint32_t i = 0; i < 64; ++i) {
    if (values[i] != 63 - i) return false;
  }
  return true;
}

// Two blocks write the same values to the same place: that alone is a race.
CASE(two_blocks_that_write_one_output) { must_report(Kind::Race, reversed<true, 64>); }
CASE(no_barrier_around_dynamic_shared_memory) { must_report(Kind::Race, reversed<false, 64>); }
CASE(dynamic_shared_memory_that_nobody_wrote) { must_report(Kind::Uninitialised, reversed<true, 60>); }

// ---- lanes of a warp ------------------------------------------------------------------------------------------------

enum class Warp { Right, NoSyncwarp, ShuffleInstead };

template <Warp bug>
TPK_KERNEL void neighbours(uint32_t* out) {
  __shared__ uint32_t values[32];
  const uint32_t lane = threadIdx.x;
  values[lane] = lane;
  if (bug == Warp::Right) __syncwarp();
  if (bug == Warp::ShuffleInstead) __shfl_sync(0xffffffffu, lane, 0);  // orders nothing
  out[lane] = values[lane ^ 1];
}

template <Warp bug>
bool neighbours_are_right() {
  uint32_t* out = filled<uint32_t>(32);
  TPK_LAUNCH(neighbours<bug>, dim3(1), dim3(32), 0, nullptr, out);
  const std::vector<uint32_t> values = values_of(out, 32);
  for (uint32_t i = 0; i < 32; ++i) {
    if (values[i] != (i ^ 1)) return false;
  }
  return true;
}

CASE(right_exchange_within_a_warp_is_silent) { must_be_silent(neighbours_are_right<Warp::Right>); }
CASE(counts_on_lanes_running_in_step) { must_report(Kind::Race, neighbours_are_right<Warp::NoSyncwarp>); }
CASE(a_shuffle_taken_for_a_fence) { must_report(Kind::Race, neighbours_are_right<Warp::ShuffleInstead>); }

// ---- pieces of values -----------------------------------------------------------------------------------------------

// Threads write the halves of one word: no race. The same half: a race.
template <uint32_t shared_by>
TPK_KERNEL void halves(uint16_t* out) {
  __shared__ uint16_t values[64];
  values[threadIdx.x / shared_by] = static_cast<uint16_t>(threadIdx.x / shared_by);
  __syncthreads();
  if (threadIdx.x < 64 / shared_by) out[threadIdx.x] = values[threadIdx.x];
}

template <uint32_t shared_by>
bool halves_are_right() {
  uint16_t* out = filled<uint16_t>(64);
  TPK_LAUNCH(halves<shared_by>, dim3(1), dim3(64), 0, nullptr, out);
  return values_of(out, 64)[31] == 31;
}

CASE(threads_that_write_halves_of_a_word_are_silent) { must_be_silent(halves_are_right<1>); }
CASE(threads_that_write_one_half_of_a_word) { must_report(Kind::Race, halves_are_right<2>); }
