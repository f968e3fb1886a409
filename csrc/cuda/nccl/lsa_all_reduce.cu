// Every rank reads the inputs of all ranks through NCCL's windows and sums them.
//
// Needs    ranks that reach each other's memory (NVLink or PCIe P2P); blocks that are resident on all ranks at once.
// Order    the barrier before the reads acquires what peers wrote into their windows; the one behind them lets a rank
//          write its input again. Both are between blocks of one number.
// Waits    are NCCL's: without a deadline.
// Traffic  (R - 1) n values into each rank.
#include "lsa_all_reduce.h"

#include "core/codec/half.h"
#include "cuda/kernels/launch.h"

namespace tpk::cuda {
namespace {

constexpr int kThreads = 512;

template <class T>
TPK_KERNEL void __launch_bounds__(kThreads, 1) lsa_all_reduce_kernel(NcclInputs inputs, T* out, size_t n) {
  const ncclCoopCta block;
  ncclLsaBarrierSession<ncclCoopCta> barrier(block, inputs.comm, ncclTeamTagLsa(), blockIdx.x);
  barrier.sync(block, ::cuda::memory_order_acquire);
  const int ranks = ncclTeamLsa(inputs.comm).nRanks;
  const size_t stride = size_t{gridDim.x} * blockDim.x;
  for (size_t i = size_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n; i += stride) {
    float sum = 0.0f;
    for (int r = 0; r < ranks; ++r) {
      sum += to_float(static_cast<const T*>(ncclGetLsaPointer(inputs.window, inputs.offset, r))[i]);
    }
    out[i] = from_float<T>(sum);
  }
  barrier.sync(block, ::cuda::memory_order_release);
}

template <class T>
cudaError_t launch_sum(const NcclInputs& inputs, void* out, size_t n, int blocks, cudaStream_t stream) {
  return TPK_LAUNCH(lsa_all_reduce_kernel<T>, blocks, kThreads, 0, stream, inputs, static_cast<T*>(out), n);
}

}  // namespace

cudaError_t launch_nccl_all_reduce(const NcclInputs& inputs, DType dtype, void* out, size_t n, int blocks,
                                   cudaStream_t stream) {
  switch (dtype) {
    case DType::F32: return launch_sum<float>(inputs, out, n, blocks, stream);
    case DType::BF16: return launch_sum<Bfloat16>(inputs, out, n, blocks, stream);
    case DType::F16: return launch_sum<Half>(inputs, out, n, blocks, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace tpk::cuda
