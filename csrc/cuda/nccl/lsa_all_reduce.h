// One-shot all-reduce between peers that NCCL's device API reaches (LSA: load/store accessible). An option of the
// build, TPKERNELS_NCCL_DEVICE: compiled against NCCL's headers and connected to no communicator yet.
#pragma once

#include <nccl.h>
#include <nccl_device.h>

#include "core/types.h"

namespace tpk::cuda {

// Where the inputs of all ranks lie: a window registered with NCCL_WIN_COLL_SYMMETRIC, at the same offset on every
// rank. comm: made with lsaBarrierCount >= blocks. It must come from the very NCCL that these headers are of (its
// structs had no version before NCCL 2.29).
struct NcclInputs {
  ncclDevComm comm;
  ncclWindow_t window;
  size_t offset;
};

// out[n] = sum over the ranks of in[n], in fp32, in rank order, rounded once. fp32, bf16, fp16.
cudaError_t launch_nccl_all_reduce(const NcclInputs&, DType, void* out, size_t n, int blocks, cudaStream_t);

}  // namespace tpk::cuda
