// Marks in pinned memory around what a process group does on a stream, so that the host sees how far the stream is
// without asking CUDA: also in launches of a graph.
//
// Called by  transport `group`, before and after each exchange.
// Order      one thread; the calls of a group run one after the other, so nobody else writes. Counters are released at
//            system scope, after what they count.
// Waits      none. Where the host has given the exchange up, the kernel behind it traps: what should have arrived has
//            not, and nothing may go on with it.
#include "cuda/kernels/device.cuh"
#include "kernels.h"

namespace tpk::cuda {
namespace {

TPK_KERNEL void begin_travel_kernel(Travel* travel, uint32_t op, uint32_t call) {
  store_relaxed_sys(&travel->op, op);
  store_relaxed_sys(&travel->call, call);
  store_release_sys(&travel->begun, load_relaxed_sys(&travel->begun) + 1);
}

TPK_KERNEL void end_travel_kernel(Travel* travel) {
  if (load_relaxed_sys(&travel->given_up) != 0) {
    trap();
    return;
  }
  store_release_sys(&travel->ended, load_relaxed_sys(&travel->ended) + 1);
}

}  // namespace

cudaError_t launch_begin_travel(Travel* travel, Op op, uint32_t call, cudaStream_t stream) {
  return TPK_LAUNCH(begin_travel_kernel, dim3(1), dim3(1), 0, stream, travel, static_cast<uint32_t>(op), call);
}

cudaError_t launch_end_travel(Travel* travel, cudaStream_t stream) {
  return TPK_LAUNCH(end_travel_kernel, dim3(1), dim3(1), 0, stream, travel);
}

}  // namespace tpk::cuda
