// Planted bugs: what one rank writes and another reads, and nothing orders the two. Values are right on most machines.
#include "planted_two_shot.cuh"

using namespace tpk;
using namespace tpk::planted;
using emu::Kind;

CASE(right_two_shot_is_silent) { must_be_silent(all_reduce<Bug::None>); }
CASE(right_two_shot_with_fences_around_relaxed_flags_is_silent) {
  must_be_silent(all_reduce<Bug::FencesAroundRelaxed>);
}
CASE(right_two_shot_with_pulled_flags_is_silent) { must_be_silent(all_reduce<Bug::FlagsArePulled>); }

CASE(right_one_shot_with_two_slots_is_silent) {
  must_be_silent([] { return all_reduce_by(one_shot<false>); });
}

CASE(no_barrier_before_the_flag) { must_report(Kind::Race, all_reduce<Bug::NoBarrierBeforeFlag>); }
CASE(no_barrier_after_the_flag) { must_report(Kind::Race, all_reduce<Bug::NoBarrierAfterFlag>); }
CASE(relaxed_store_where_a_release_is_needed) { must_report(Kind::Race, all_reduce<Bug::RelaxedStore>); }
CASE(relaxed_load_where_an_acquire_is_needed) { must_report(Kind::Race, all_reduce<Bug::RelaxedLoad>); }
CASE(relaxed_flags_without_fences) { must_report(Kind::Race, all_reduce<Bug::NoFenceAroundRelaxed>); }
CASE(gpu_fence_where_a_system_fence_is_needed) { must_report(Kind::Race, all_reduce<Bug::GpuFenceAroundRelaxed>); }
CASE(gpu_scope_on_a_flag_that_peers_pull) { must_report(Kind::Race, all_reduce<Bug::GpuScopeOnPulledFlag>); }
CASE(one_slot_for_all_calls) {
  must_report(Kind::Race, [] { return all_reduce_by(one_shot<true>); });
}
CASE(sums_read_without_waiting_for_them) { must_report(Kind::Race, all_reduce<Bug::NoSecondWait>); }
CASE(waits_for_the_flag_of_another_block) { must_report(Kind::Race, all_reduce<Bug::FlagOfAnotherBlock>); }
CASE(sum_written_to_another_owner) { must_report(Kind::Race, all_reduce<Bug::WrongOwner>); }

CASE(a_report_names_ranks_kernels_and_lines) {
  const Outcome outcome = run(quiet(0), all_reduce<Bug::NoBarrierBeforeFlag>);
  EXPECT(outcome.text().find("memory of rank") != std::string::npos, outcome.text());
  const std::string kernel = "tpk::planted::two_shot<(tpk::planted::Bug)3> block ";  // whichever block was seen first
  EXPECT(outcome.text().find(kernel + "0 of 2 thread") != std::string::npos ||
             outcome.text().find(kernel + "1 of 2 thread") != std::string::npos,
         outcome.text());
  EXPECT(outcome.text().find("planted_two_shot.cuh:") != std::string::npos, outcome.text());
}

// ---- streams of one rank --------------------------------------------------------------------------------------------

TPK_KERNEL void write_one(float* to) { to[threadIdx.x] = 1; }
TPK_KERNEL void read_one(const float* from, float* to) { to[threadIdx.x] = from[threadIdx.x]; }

static bool two_streams(bool with_event) {
  float *a = filled<float>(32), *b = filled<float>(32);
  const cudaStream_t first = new_stream(), second = new_stream();
  cudaEvent_t event;
  EXPECT(cudaEventCreateWithFlags(&event, cudaEventDisableTiming) == cudaSuccess);
  TPK_LAUNCH(write_one, dim3(1), dim3(32), 0, first, a);
  cudaEventRecord(event, first);
  if (with_event) cudaStreamWaitEvent(second, event, 0);
  TPK_LAUNCH(read_one, dim3(1), dim3(32), 0, second, a, b);
  EXPECT(cudaStreamSynchronize(second) == cudaSuccess && cudaStreamSynchronize(first) == cudaSuccess);
  cudaEventDestroy(event);
  return !with_event || values_of(b, 32) == std::vector<float>(32, 1.0f);
}
CASE(two_streams_with_an_event_between_are_silent) {
  must_be_silent([] { return two_streams(true); });
}
CASE(two_streams_without_an_event) {
  must_report(Kind::Race, [] { return two_streams(false); });
}

static bool copy_after_kernel(bool on_its_stream) {
  float* a = filled<float>(32);
  float* pinned;
  EXPECT(cudaMallocHost(reinterpret_cast<void**>(&pinned), 32 * sizeof(float)) == cudaSuccess);
  const cudaStream_t first = new_stream(), second = new_stream();
  TPK_LAUNCH(write_one, dim3(1), dim3(32), 0, first, a);
  cudaMemcpyAsync(pinned, a, 32 * sizeof(float), cudaMemcpyDeviceToHost, on_its_stream ? first : second);
  EXPECT(cudaStreamSynchronize(second) == cudaSuccess && cudaStreamSynchronize(first) == cudaSuccess);
  return !on_its_stream || pinned[31] == 1.0f;
}
CASE(a_copy_behind_the_kernel_is_silent) {
  must_be_silent([] { return copy_after_kernel(true); });
}
CASE(a_copy_beside_the_kernel) {
  must_report(Kind::Race, [] { return copy_after_kernel(false); });
}

// ---- bytes ----------------------------------------------------------------------------------------------------------

TPK_KERNEL void write_bytes(uint8_t* to, uint32_t first, uint32_t stride) {
  to[first + stride * threadIdx.x] = static_cast<uint8_t>(first);
}

static bool neighbouring_bytes(uint32_t second) {
  uint8_t* bytes = filled<uint8_t>(64);
  emu::run_ranks(2, [&](int rank) {
    TPK_LAUNCH(write_bytes, dim3(1), dim3(16), 0, nullptr, bytes, rank == 0 ? 0u : second, 2u);
    EXPECT(cudaDeviceSynchronize() == cudaSuccess);
  });
  return second != 1 || values_of(bytes, 64)[31] == 1;
}
CASE(ranks_that_write_neighbouring_bytes_are_silent) {
  must_be_silent([] { return neighbouring_bytes(1); });
}
CASE(ranks_that_write_one_byte) {
  must_report(Kind::Race, [] { return neighbouring_bytes(30); });
}
