// Planted bugs: counters that many threads raise, and accesses that depend on their value.
#include <future>

#include "planted.h"

using namespace tpk;
using namespace tpk::planted;
using namespace tpk::cuda;
using emu::Kind;

// ---- the last block sums what all blocks have left ------------------------------------------------------------------

enum class Last {
  Right,
  RightWithFences,
  NoFences,
  FenceOnlyBefore,
  CountedBeforeBarrier,
  ReadWithoutBarrier,
  BlockScope,
  ResetByAnyBlock
};

template <Last bug>
__device__ uint32_t count(uint32_t* counter) {
  if (bug == Last::BlockScope) {
    __threadfence();
    const uint32_t before = atomicAdd_block(counter, 1);
    __threadfence();
    return before;
  }
  if (bug == Last::RightWithFences || bug == Last::FenceOnlyBefore || bug == Last::NoFences) {
    if (bug != Last::NoFences) __threadfence();
    const uint32_t before = atomicAdd(counter, 1);
    if (bug == Last::RightWithFences) __threadfence();
    return before;
  }
  return add_acq_rel_gpu(counter, 1);
}

template <Last bug>
TPK_KERNEL void sum_by_the_last(float* partial, uint32_t* counter, float* out) {
  __shared__ bool is_last;
  if (bug == Last::ResetByAnyBlock && threadIdx.x == 0 && blockIdx.x == 0) *counter = 0;
  if (bug == Last::CountedBeforeBarrier && threadIdx.x == 0) is_last = count<bug>(counter) + 1 == gridDim.x;
  partial[blockIdx.x * blockDim.x + threadIdx.x] = 1;
  __syncthreads();
  if (bug != Last::CountedBeforeBarrier && threadIdx.x == 0) is_last = count<bug>(counter) + 1 == gridDim.x;
  if (bug != Last::ReadWithoutBarrier) __syncthreads();
  if (!is_last || threadIdx.x != (bug == Last::ReadWithoutBarrier ? 1 : 0)) return;
  float sum = 0;
  for (uint32_t i = 0; i < gridDim.x * blockDim.x; ++i) sum += partial[i];
  *out = sum;
}

template <Last bug>
bool last_is_right() {
  float *partial = filled<float>(4 * 32), *out = filled<float>(1);
  uint32_t* counter = filled<uint32_t>(1);
  TPK_LAUNCH(sum_by_the_last<bug>, dim3(4), dim3(32), 0, nullptr, partial, counter, out);
  return values_of(out, 1)[0] == 128.0f;
}

CASE(right_sum_by_the_last_block_is_silent) { must_be_silent(last_is_right<Last::Right>); }
CASE(right_sum_by_the_last_block_with_fences_is_silent) { must_be_silent(last_is_right<Last::RightWithFences>); }
CASE(counter_without_fences) { must_report(Kind::Race, last_is_right<Last::NoFences>); }
CASE(counter_without_acquire) { must_report(Kind::Race, last_is_right<Last::FenceOnlyBefore>); }
CASE(counter_raised_before_the_barrier) { must_report(Kind::Race, last_is_right<Last::CountedBeforeBarrier>); }
CASE(verdict_on_the_counter_read_without_a_barrier) {
  must_report(Kind::Race, last_is_right<Last::ReadWithoutBarrier>);
}
CASE(counter_of_block_scope_for_many_blocks) { must_report(Kind::Race, last_is_right<Last::BlockScope>); }
CASE(counter_reset_while_others_count) { must_report(Kind::Race, last_is_right<Last::ResetByAnyBlock>); }

// ---- tiles: producers on all ranks add to the counter of the owner, who waits for all of them -----------------------

enum class Tile { Right, RelaxedAdd, RelaxedWait, NoBarrierBeforeAdd, WaitsForTooFew, NoWait, FirstThreadOnly };

template <Tile bug>
TPK_KERNEL void produce(float* tile, uint32_t* counter, int rank) {
  tile[static_cast<uint32_t>(rank) * 32 + threadIdx.x] = static_cast<float>(rank + 1);
  if (bug != Tile::NoBarrierBeforeAdd) __syncthreads();
  if (threadIdx.x != 0) return;
  if (bug == Tile::RelaxedAdd) {
    atomicAdd_system(counter, 1);
  } else {
    emu::add_release_sys(counter, 1);
  }
}

template <Tile bug>
TPK_KERNEL void consume(const float* tile, const uint32_t* counter, float* out) {
  constexpr uint32_t kExpected = bug == Tile::WaitsForTooFew ? kRanks - 1 : kRanks;
  if (bug != Tile::NoWait && threadIdx.x == 0) {
    while ((bug == Tile::RelaxedWait ? load_relaxed_sys(counter) : load_acquire_sys(counter)) < kExpected) {
    }
  }
  if (bug != Tile::FirstThreadOnly) __syncthreads();
  float sum = 0;
  for (int rank = 0; rank < kRanks; ++rank) sum += tile[rank * 32 + static_cast<int>(threadIdx.x)];
  out[threadIdx.x] = sum;
}

template <Tile bug>
bool tiles_are_right() {
  float *tile = filled<float>(32 * kRanks), *out = filled<float>(32);
  uint32_t* counter = filled<uint32_t>(1);
  std::promise<void> consumed;  // the detector knows nothing of it
  emu::run_ranks(kRanks, [&](int rank) {
    const cudaStream_t producers = new_stream(), consumers = new_stream();
    if (rank == 0) TPK_LAUNCH(consume<bug>, dim3(1), dim3(32), 0, consumers, tile, counter, out);
    // Whether too early a consumer finds everything there is luck; here it has none.
    if (bug == Tile::WaitsForTooFew && rank == kRanks - 1) consumed.get_future().wait();
    TPK_LAUNCH(produce<bug>, dim3(1), dim3(32), 0, producers, tile, counter, rank);
    EXPECT(cudaDeviceSynchronize() == cudaSuccess);
    if (rank == 0) consumed.set_value();
  });
  return values_of(out, 32) == std::vector<float>(32, 6.0f);
}

CASE(right_tiles_are_silent) { must_be_silent(tiles_are_right<Tile::Right>); }
CASE(tile_counter_raised_relaxed) { must_report(Kind::Race, tiles_are_right<Tile::RelaxedAdd>); }
CASE(tile_counter_read_relaxed) { must_report(Kind::Race, tiles_are_right<Tile::RelaxedWait>); }
CASE(tile_counter_raised_before_all_threads_have_written) {
  must_report(Kind::Race, tiles_are_right<Tile::NoBarrierBeforeAdd>);
}
CASE(consumer_waits_for_too_few_producers) { must_report(Kind::Race, tiles_are_right<Tile::WaitsForTooFew>); }
CASE(consumer_does_not_wait) { must_report(Kind::Race, tiles_are_right<Tile::NoWait>); }
CASE(one_thread_waits_for_the_whole_block) { must_report(Kind::Race, tiles_are_right<Tile::FirstThreadOnly>); }
