// Planted bugs of the fused GEMMs (planted_fused.cmake): each must be found, at every seed, in the way that belongs to
// it. What was planted at nothing is silent, so it is the mistake that is found.
#include "emu/planted.h"
#include "emu_fused.h"

// A fused GEMM with one mistake, or none, in a namespace of its own.
#define PLANTED(name)                                                                                                 \
  namespace tpk::cuda::name {                                                                                         \
  cudaError_t launch_gemm_reduce_scatter(const Peers&, const Call&, const GemmOperands&, void*, const RowCut&,        \
                                         FusedGrid, cudaStream_t);                                                    \
  cudaError_t launch_gemm_all_reduce(const Peers&, const Call&, const GemmOperands&, void*, const RowCut&, FusedGrid, \
                                     cudaStream_t);                                                                   \
  cudaError_t launch_all_gather_gemm(const Peers&, const Call&, const void*, uint64_t, void*, const GemmOperands&,    \
                                     void*, const RowCut&, FusedGrid, cudaStream_t);                                  \
  constexpr testing::FusedLaunches kLaunches = {launch_gemm_reduce_scatter, launch_gemm_all_reduce,                   \
                                                launch_all_gather_gemm};                                              \
  }
PLANTED(nothing_planted)
PLANTED(flag_at_the_wrong_owner)
PLANTED(nothing_planted_in_a_wide_tile)
PLANTED(flag_before_the_tile_is_written)
PLANTED(staged_over_what_is_not_stored)
PLANTED(stored_before_it_is_staged)
PLANTED(stored_without_a_fence)
PLANTED(given_back_before_the_store_has_read)
PLANTED(given_back_before_the_store_of_a_wide_tile_has_read)
PLANTED(staged_over_what_is_multiplied_in_a_wide_tile)
PLANTED(stage_given_back_too_early)
PLANTED(transposed_w_read_as_the_other)
PLANTED(transposed_w_advances_as_the_other)
PLANTED(no_fence_after_the_gather)
PLANTED(slot_of_another_call)
PLANTED(one_rank_is_not_waited_for)
PLANTED(one_tile_of_a_scale_is_waited_for)
PLANTED(sum_announced_too_early)
PLANTED(no_fence_before_the_copy)
PLANTED(rows_announced_too_early)
PLANTED(rows_announced_before_they_are_written)
PLANTED(rows_stored_before_they_have_come)
PLANTED(rows_loaded_over_those_that_are_not_stored)
PLANTED(rows_of_a_peer_are_not_waited_for)
PLANTED(rows_are_not_waited_for)

using namespace tpk;
using namespace tpk::cuda;
using namespace tpk::testing;
using emu::Kind;

namespace {

// A call of one kind, or two where K is long enough to go round the ring; whether all outputs are right. For a rank
// that waits in vain the watchdog is faster than the deadline: a failed launch.
bool gemms_are_right(Fused kind, const FusedLaunches& launches, uint32_t K, Codec codec, bool wide) {
  constexpr int kRanks = planted::kRanks;
  EmulatedGroup group(kRanks, {.slot_bytes = size_t{256} << 10});
  std::vector<std::unique_ptr<PreparedGemm>> gemms;
  for (uint64_t seed = 0; seed < (K > 100 ? 2 : 1); ++seed) {
    Gemm gemm{.kind = kind, .codec = codec, .rows = {40, 8, 30}, .N = 24, .K = K, .grid = {1, 1}, .seed = seed};
    if (codec == Codec::Fp16) gemm.N = 512;  // which keeps small integers
    gemm.transposed = K == 32;
    if (wide) gemm.N = 200, gemm.tile_columns = 256;
    gemms.push_back(std::make_unique<PreparedGemm>(group, gemm, launches));
  }
  bool came[kRanks] = {};
  emu::run_ranks(kRanks, [&](int rank) {
    for (const auto& gemm : gemms) EXPECT(gemm->launch(rank, nullptr) == cudaSuccess);
    came[rank] = cudaDeviceSynchronize() == cudaSuccess;
  });
  if (!came[0] || !came[1] || !came[2]) return false;
  return std::all_of(gemms.begin(), gemms.end(), [](const auto& gemm) { return gemm->is_right(); });
}

planted::Body body(Fused kind, const FusedLaunches& launches, uint32_t K = 24, Codec codec = Codec::None) {
  return [=] { return gemms_are_right(kind, launches, K, codec, false); };
}
// Of tiles of 256 columns, one after the other.
planted::Body wide_body(Fused kind, const FusedLaunches& launches) {
  return [=] { return gemms_are_right(kind, launches, 328, Codec::None, true); };
}

}  // namespace

CASE(right_kernels_are_silent) {
  for (Fused kind : {Fused::ReduceScatter, Fused::AllReduce, Fused::Gather}) {
    const planted::Outcome outcome = planted::run(planted::quiet(1), body(kind, nothing_planted::kLaunches));
    EXPECT(outcome.reports.empty(), outcome.text());
    EXPECT(outcome.right && outcome.error == cudaSuccess, static_cast<int>(kind), " ", cudaGetErrorName(outcome.error));
  }
  EXPECT(planted::run(planted::quiet(1), body(Fused::Gather, nothing_planted::kLaunches, 32)).right);
  for (uint64_t seed : {1, 2}) {  // more parts of rows than the ring of copies holds
    const planted::Outcome long_k =
        planted::run(planted::quiet(seed), body(Fused::Gather, nothing_planted::kLaunches, 1096));
    EXPECT(long_k.reports.empty() && long_k.right, "seed ", seed, long_k.text());
  }
  for (Fused kind : {Fused::ReduceScatter, Fused::Gather}) {
    const planted::Outcome wide =
        planted::run(planted::quiet(1), wide_body(kind, nothing_planted_in_a_wide_tile::kLaunches));
    EXPECT(wide.reports.empty() && wide.right, wide.text());
  }
  const planted::Outcome coded =
      planted::run(planted::quiet(1), body(Fused::AllReduce, nothing_planted::kLaunches, 24, Codec::Fp16));
  EXPECT(coded.reports.empty() && coded.right, coded.text());
}

CASE(a_flag_raised_at_the_wrong_owner) {
  planted::must_be_found(Kind::Race, body(Fused::ReduceScatter, flag_at_the_wrong_owner::kLaunches));
}
CASE(a_flag_raised_when_its_tile_is_not_written_yet) {
  planted::must_report(Kind::Race, body(Fused::ReduceScatter, flag_before_the_tile_is_written::kLaunches));
}
CASE(a_tile_staged_over_one_that_is_not_stored_yet) {
  planted::must_report(Kind::Race, body(Fused::ReduceScatter, staged_over_what_is_not_stored::kLaunches));
}
CASE(a_tile_stored_before_it_is_staged) {
  planted::must_be_found(Kind::Race, body(Fused::ReduceScatter, stored_before_it_is_staged::kLaunches));
}
CASE(a_tile_stored_without_a_fence_of_those_who_staged_it) {
  for (Fused kind : {Fused::AllReduce, Fused::Gather}) {
    planted::must_report(Kind::Race, body(kind, stored_without_a_fence::kLaunches));
  }
}
CASE(a_place_given_back_before_its_store_has_read_it) {
  planted::must_report(Kind::Race, body(Fused::Gather, given_back_before_the_store_has_read::kLaunches));
  const FusedLaunches& wide = given_back_before_the_store_of_a_wide_tile_has_read::kLaunches;
  planted::must_report(Kind::Race, wide_body(Fused::ReduceScatter, wide));
}
CASE(a_tile_staged_over_a_stage_that_others_multiply) {
  const FusedLaunches& launches = staged_over_what_is_multiplied_in_a_wide_tile::kLaunches;
  planted::must_report(Kind::Race, wide_body(Fused::ReduceScatter, launches));
}
CASE(a_stage_given_back_before_its_products_are_done) {
  planted::must_be_wrong(body(Fused::ReduceScatter, stage_given_back_too_early::kLaunches, 456));
}
CASE(a_transposed_w_that_is_read_in_the_other_layout) {
  planted::must_be_wrong(body(Fused::ReduceScatter, transposed_w_read_as_the_other::kLaunches, 32));
}
CASE(a_transposed_w_that_advances_within_its_rows) {
  planted::must_report(Kind::Misuse, body(Fused::Gather, transposed_w_advances_as_the_other::kLaunches, 32));
}
CASE(no_fence_between_rows_that_were_gathered_and_their_load) {
  planted::must_report(Kind::Misuse, body(Fused::Gather, no_fence_after_the_gather::kLaunches));
}
CASE(products_in_the_slot_of_another_call) {
  planted::must_be_wrong(body(Fused::ReduceScatter, slot_of_another_call::kLaunches));
}
CASE(a_sum_that_does_not_wait_for_the_last_rank) {
  planted::must_report(Kind::Race, body(Fused::ReduceScatter, one_rank_is_not_waited_for::kLaunches));
}
CASE(a_sum_that_waits_for_one_of_the_tiles_of_its_scale) {
  const FusedLaunches& launches = one_tile_of_a_scale_is_waited_for::kLaunches;
  planted::must_report(Kind::Race, body(Fused::ReduceScatter, launches, 24, Codec::Fp16));
}
CASE(a_sum_announced_before_it_is_written) {
  planted::must_report(Kind::Race, body(Fused::AllReduce, sum_announced_too_early::kLaunches));
}
CASE(rows_announced_before_they_are_copied) {
  planted::must_report(Kind::Race, body(Fused::Gather, rows_announced_too_early::kLaunches));
}
CASE(no_fence_between_the_flag_of_a_peers_rows_and_their_copy) {
  planted::must_report(Kind::Misuse, body(Fused::Gather, no_fence_before_the_copy::kLaunches));
}
CASE(rows_announced_when_shared_memory_has_been_read_and_no_more) {
  planted::must_report(Kind::Race, body(Fused::Gather, rows_announced_before_they_are_written::kLaunches));
}
CASE(rows_stored_before_their_load_has_come) {
  planted::must_report(Kind::Race, body(Fused::Gather, rows_stored_before_they_have_come::kLaunches));
}
CASE(rows_loaded_over_those_that_are_not_stored_yet) {
  planted::must_report(Kind::Race, body(Fused::Gather, rows_loaded_over_those_that_are_not_stored::kLaunches, 1096));
}
CASE(rows_of_a_peer_that_are_copied_before_they_are_there) {
  planted::must_report(Kind::Race, body(Fused::Gather, rows_of_a_peer_are_not_waited_for::kLaunches));
}
CASE(rows_that_are_multiplied_before_they_come) {
  planted::must_report(Kind::Race, body(Fused::Gather, rows_are_not_waited_for::kLaunches));
}
