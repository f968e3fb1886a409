// Marks in pinned memory around the exchanges of a process group on a stream: the host reads the progress of the stream
// without a call of CUDA, also in launches of a graph.
//
// Called by  transport `group`, before and after each exchange.
// Order      one thread; the calls of a group run one after the other, so there is one writer. Counters are released at
//            system scope, after the work that they count.
// Waits      none. Where the host has given the exchange up, the kernel behind it traps: the data has not arrived, and
//            no later kernel of the stream may use it.
#include "cuda/kernels/device.cuh"
#include "kernels.h"

namespace tpk::cuda {
namespace {

TPK_KERNEL void mark_begin_kernel(ExchangeMarks* marks, uint32_t op, uint32_t call) {
  store_relaxed_sys(&marks->op, op);
  store_relaxed_sys(&marks->call, call);
  store_release_sys(&marks->begun, load_relaxed_sys(&marks->begun) + 1);
}

TPK_KERNEL void mark_end_kernel(ExchangeMarks* marks) {
  if (load_relaxed_sys(&marks->given_up) != 0) {
    trap();
    return;
  }
  store_release_sys(&marks->ended, load_relaxed_sys(&marks->ended) + 1);
}

}  // namespace

cudaError_t launch_mark_begin(ExchangeMarks* marks, Op op, uint32_t call, cudaStream_t stream) {
  return TPK_LAUNCH(mark_begin_kernel, dim3(1), dim3(1), 0, stream, marks, static_cast<uint32_t>(op), call);
}

cudaError_t launch_mark_end(ExchangeMarks* marks, cudaStream_t stream) {
  return TPK_LAUNCH(mark_end_kernel, dim3(1), dim3(1), 0, stream, marks);
}

}  // namespace tpk::cuda
