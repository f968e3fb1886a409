// Graphs of calls on emulated ranks, and values whose sums show in which order they were taken.
#pragma once

#include "emu_host.h"

namespace tpk::testing {

// A capture of what body enqueues on this thread's stream, ready to be launched.
class Graph {
 public:
  explicit Graph(const std::function<void()>& body) {
    const cudaStream_t stream = cuda::current_stream();
    TPK_CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    try {
      body();
    } catch (...) {
      end(stream);
      throw;
    }
    end(stream);
  }
  ~Graph() { static_cast<void>(cudaGraphExecDestroy(exec_)); }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  void launch() const { TPK_CUDA_CHECK(cudaGraphLaunch(exec_, cuda::current_stream())); }

 private:
  void end(cudaStream_t stream) {
    cudaGraph_t graph = nullptr;
    TPK_CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
    TPK_CUDA_CHECK(cudaGraphInstantiate(&exec_, graph, 0));
    TPK_CUDA_CHECK(cudaGraphDestroy(graph));
  }
  cudaGraphExec_t exec_ = nullptr;
};

// Sums of these are rounded.
inline float input(int rank, size_t i, int turn) {
  return 0.1f * static_cast<float>((i * 7 + static_cast<size_t>(rank) * 3 + static_cast<size_t>(turn) * 11) % 101);
}

inline void fill(const Floats& x, int rank, int turn) {
  for (size_t i = 0; i < x.size(); ++i) x.data()[i] = input(rank, i, turn);
}

inline void expect_same_bits(const Floats& got, const Floats& want, const std::string& what) {
  for (size_t i = 0; i < got.size(); ++i) {
    EXPECT(std::memcmp(got.data() + i, want.data() + i, sizeof(float)) == 0, what, ": value ", i, " is ", got[i],
           " in a replay and ", want[i], " in a call");
  }
}

inline void all_reduce(DeviceCommunicator& comm, const Floats& in, const Floats& out, Codec codec = Codec::None) {
  const Wire& wire = sum_of_floats(codec);
  comm.all_reduce(spec_of(Op::AllReduce, wire, in.size()), wire, in.data(), out.data(), in.size());
}

}  // namespace tpk::testing
