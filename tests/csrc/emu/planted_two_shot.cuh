// A small two-shot all-reduce with flags, right or with one mistake: the protocol of the project, without its details.
#pragma once

#include "planted.h"

namespace tpk::planted {

using namespace tpk::cuda;

constexpr uint32_t kBlocks = 2, kThreads = 64;
constexpr uint32_t kPart = 24;                // values of one chunk that one block handles
constexpr uint32_t kChunk = kPart * kBlocks;  // values that one rank sums
constexpr uint32_t kValues = kChunk * kRanks;

enum class Bug {
  None,
  // correct, in other styles
  FencesAroundRelaxed,
  FlagsArePulled,
  // mistakes
  NoBarrierBeforeFlag,
  NoBarrierAfterFlag,
  RelaxedStore,
  RelaxedLoad,
  NoFenceAroundRelaxed,
  GpuFenceAroundRelaxed,
  GpuScopeOnPeer,
  GpuScopeOnPulledFlag,
  NoSecondWait,
  FlagOfAnotherBlock,
  WrongPeer,
  WrongOwner,
  EpochOffByOne,
};

struct Arena {
  float inputs[2][kValues];
  float sums[2][kChunk];
  uint32_t flags[2][kRanks][kBlocks];  // [stage][from][block]; pulled flags use [stage][me][block] of the owner
};

struct Ranks {
  Arena* arena[kRanks];
  int rank;
};

template <Bug bug>
__device__ void raise(uint32_t* flag, uint32_t epoch) {
  if (bug == Bug::RelaxedStore || bug == Bug::NoFenceAroundRelaxed) {
    store_relaxed_sys(flag, epoch);
  } else if (bug == Bug::FencesAroundRelaxed || bug == Bug::GpuFenceAroundRelaxed) {
    bug == Bug::FencesAroundRelaxed ? fence_sys() : emu::fence_gpu();
    store_relaxed_sys(flag, epoch);
  } else if (bug == Bug::GpuScopeOnPeer || bug == Bug::GpuScopeOnPulledFlag) {
    add_acq_rel_gpu(flag, 1);
  } else {
    store_release_sys(flag, epoch);
  }
}

template <Bug bug>
__device__ void await(const uint32_t* flag, uint32_t epoch) {
  constexpr bool kRelaxed = bug == Bug::RelaxedLoad || bug == Bug::NoFenceAroundRelaxed ||
                            bug == Bug::FencesAroundRelaxed || bug == Bug::GpuFenceAroundRelaxed;
  if (bug == Bug::EpochOffByOne) ++epoch;
  while ((kRelaxed ? load_relaxed_sys(flag) : load_acquire_sys(flag)) < epoch) {
  }
  if (bug == Bug::FencesAroundRelaxed) fence_sys();
  if (bug == Bug::GpuFenceAroundRelaxed) emu::fence_gpu();
}

// All blocks of this number, on all ranks.
template <Bug bug>
__device__ void sync_ranks(const Ranks& ranks, int stage, uint32_t epoch) {
  constexpr bool kPulled = bug == Bug::FlagsArePulled || bug == Bug::GpuScopeOnPulledFlag;
  const uint32_t block = blockIdx.x, thread = threadIdx.x;
  if (bug != Bug::NoBarrierBeforeFlag) __syncthreads();
  if (kPulled && thread == 0) raise<bug>(&ranks.arena[ranks.rank]->flags[stage][ranks.rank][block], epoch);
  if (!kPulled && thread < kRanks) raise<bug>(&ranks.arena[thread]->flags[stage][ranks.rank][block], epoch);
  if (bug == Bug::NoSecondWait && stage == 1) return;
  if (thread < kRanks) {
    const Arena* holder = ranks.arena[kPulled ? static_cast<int>(thread) : ranks.rank];
    await<bug>(&holder->flags[stage][thread][bug == Bug::FlagOfAnotherBlock ? 0 : block], epoch);
  }
  if (bug != Bug::NoBarrierAfterFlag) __syncthreads();
}

template <Bug bug>
TPK_KERNEL void two_shot(Ranks ranks, const float* in, float* out, uint32_t epoch) {
  const uint32_t slot = epoch % 2, start = blockIdx.x * kPart;
  Arena& mine = *ranks.arena[ranks.rank];
  for (uint32_t i = threadIdx.x; i < kPart * kRanks; i += blockDim.x) {
    const uint32_t at = i / kPart * kChunk + start + i % kPart;
    mine.inputs[slot][at] = in[at];
  }
  sync_ranks<bug>(ranks, 0, epoch);
  const int owned = bug == Bug::WrongOwner ? 0 : ranks.rank;
  for (uint32_t i = threadIdx.x; i < kPart; i += blockDim.x) {
    float sum = 0;
    for (int r = 0; r < kRanks; ++r) {
      const int from = bug == Bug::WrongPeer && r == 2 ? 1 : r;
      sum += ranks.arena[from]->inputs[slot][static_cast<uint32_t>(owned) * kChunk + start + i];
    }
    ranks.arena[owned]->sums[slot][start + i] = sum;
  }
  sync_ranks<bug>(ranks, 1, epoch);
  for (uint32_t i = threadIdx.x; i < kPart * kRanks; i += blockDim.x) {
    out[i / kPart * kChunk + start + i % kPart] = ranks.arena[i / kPart]->sums[slot][start + i % kPart];
  }
}

// Every rank reads all inputs. Which slot a call uses is what makes it right or wrong.
template <bool one_slot>
TPK_KERNEL void one_shot(Ranks ranks, const float* in, float* out, uint32_t epoch) {
  const uint32_t slot = one_slot ? 0 : epoch % 2, start = blockIdx.x * kPart * kRanks;
  for (uint32_t i = threadIdx.x; i < kPart * kRanks; i += blockDim.x) {
    ranks.arena[ranks.rank]->inputs[slot][start + i] = in[start + i];
  }
  sync_ranks<Bug::None>(ranks, 0, epoch);
  for (uint32_t i = threadIdx.x; i < kPart * kRanks; i += blockDim.x) {
    float sum = 0;
    for (int r = 0; r < kRanks; ++r) sum += ranks.arena[r]->inputs[slot][start + i];
    out[start + i] = sum;
  }
}

// Some calls in a row on every rank; whether all sums are right.
inline bool all_reduce_by(void (*kernel)(Ranks, const float*, float*, uint32_t)) {
  constexpr uint32_t kCalls = 3;
  Ranks all{};
  for (int rank = 0; rank < kRanks; ++rank) {
    EXPECT(cudaSetDevice(rank) == cudaSuccess);
    all.arena[rank] = filled<Arena>(1);
  }
  bool right[kRanks] = {};
  emu::run_ranks(kRanks, [&](int rank) {
    Ranks ranks = all;
    ranks.rank = rank;
    const cudaStream_t stream = new_stream();
    float* outs[kCalls];
    for (uint32_t call = 0; call < kCalls; ++call) {
      const float* in =
          filled<float>(kValues, static_cast<float>((rank + 1) * (rank + 1)) * static_cast<float>(call + 1));
      outs[call] = filled<float>(kValues);
      TPK_LAUNCH(kernel, dim3(kBlocks), dim3(kThreads), 0, stream, ranks, in, outs[call], call + 1);
    }
    right[rank] = cudaStreamSynchronize(stream) == cudaSuccess;
    for (uint32_t call = 0; call < kCalls; ++call) {
      for (float value : values_of(outs[call], kValues)) right[rank] &= value == 14.0f * static_cast<float>(call + 1);
    }
  });
  return right[0] && right[1] && right[2];
}

template <Bug bug>
bool all_reduce() {
  return all_reduce_by(two_shot<bug>);
}

}  // namespace tpk::planted
