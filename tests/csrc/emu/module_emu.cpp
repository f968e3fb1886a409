// The Python module of the emulated backend, for tests: the CUDA backend on emulated devices in place of tpkernels._C.
// Its ops take CPU tensors. A rank is a Python thread that has called set_device.
#include "control.h"
#include "core/arena.h"
#include "cuda/python_device.h"
#include "cuda/scoped_op.h"
#include "python/fast_gemm.h"
#include "python/fast_path.h"
#include "python/kernels.h"

STABLE_TORCH_LIBRARY_IMPL(tpkernels, CPU, m) { tpk::register_kernels<tpk::cuda::ScopedOp>(m); }

STABLE_TORCH_LIBRARY_IMPL(tpkernels, CompositeExplicitAutograd, m) {
  m.impl("device_arena_empty", TORCH_BOX(&tpk::device_arena_empty));
}

namespace tpk {
namespace {

// Once and with no stream of the emulator alive.
void configure(int ranks, int resident_blocks, uint64_t seed, double timeout_s, bool loud) {
  emu::configure({ranks, resident_blocks, seed, timeout_s, loud});
}

std::vector<std::string> take_reports() {
  std::vector<std::string> texts;
  for (const emu::Report& report : emu::take_reports()) {
    texts.push_back(std::string(emu::name_of(report.kind)) + ": " + report.text);
  }
  return texts;
}

uintptr_t allocate(int device, size_t bytes) {
  const cuda::DeviceScope scope(device);
  void* memory = nullptr;
  TPK_CUDA_CHECK(cudaMalloc(&memory, bytes));
  return reinterpret_cast<uintptr_t>(memory);
}

void release(uintptr_t memory) { TPK_CUDA_CHECK(cudaFree(reinterpret_cast<void*>(memory))); }

uintptr_t multicast(const std::vector<uintptr_t>& arenas, size_t bytes) {
  std::vector<void*> memory;
  for (uintptr_t arena : arenas) memory.push_back(reinterpret_cast<void*>(arena));
  return reinterpret_cast<uintptr_t>(emu::multicast(memory, bytes));
}

// What this thread's ops enqueue between capture_begin() and capture_end(), launched in the default stream.
class CapturedGraph {
 public:
  explicit CapturedGraph(cudaStream_t stream) : stream_(stream) {
    kept_ = emu::take_captured();
    cudaGraph_t graph = nullptr;
    TPK_CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
    TPK_CUDA_CHECK(cudaGraphGetNodes(graph, nullptr, &nodes_));
    TPK_CUDA_CHECK(cudaGraphInstantiate(&exec_, graph, 0));
    TPK_CUDA_CHECK(cudaGraphDestroy(graph));
  }
  ~CapturedGraph() {
    cudaGraphExecDestroy(exec_);
    cudaStreamDestroy(stream_);
  }
  CapturedGraph(const CapturedGraph&) = delete;
  CapturedGraph& operator=(const CapturedGraph&) = delete;
  size_t nodes() const { return nodes_; }
  void replay() {
    TPK_CUDA_CHECK(cudaGraphLaunch(exec_, nullptr));
    emu::synchronize_stream();
  }

 private:
  const cudaStream_t stream_;
  std::vector<std::shared_ptr<void>> kept_;
  size_t nodes_ = 0;
  cudaGraphExec_t exec_ = nullptr;
};

void capture_begin() {
  cudaStream_t stream = nullptr;
  TPK_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  TPK_CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  cuda::set_torch_stream(0, stream);
}

std::unique_ptr<CapturedGraph> capture_end() {
  const cudaStream_t stream = cuda::torch_stream(0);
  cuda::set_torch_stream(0, nullptr);
  return std::make_unique<CapturedGraph>(stream);
}

void add_emulator(py::module_& m) {
  py::class_<CapturedGraph>(m, "CapturedGraph")
      .def_property_readonly("nodes", &CapturedGraph::nodes)
      .def("replay", &CapturedGraph::replay, py::call_guard<py::gil_scoped_release>());
  m.def("capture_begin", &capture_begin);
  m.def("capture_end", &capture_end);
  const emu::Options usual;
  m.def("configure", &configure, py::arg("ranks") = usual.ranks, py::arg("resident_blocks") = usual.resident_blocks,
        py::arg("seed") = usual.seed, py::arg("timeout_s") = usual.timeout_s, py::arg("loud") = usual.loud);
  m.def("set_device", [](int device) { TPK_CUDA_CHECK(cudaSetDevice(device)); }, py::arg("device"));
  m.def("synchronize", [] { emu::synchronize_stream(); }, py::call_guard<py::gil_scoped_release>());
  m.def("allocate", &allocate, py::arg("device"), py::arg("bytes"));
  m.def("release", &release, py::arg("memory"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "own", [](uintptr_t memory, size_t bytes, int rank) { emu::own(reinterpret_cast<void*>(memory), bytes, rank); },
      py::arg("memory"), py::arg("bytes"), py::arg("rank"));
  m.def("disown", [](uintptr_t memory) { emu::disown(reinterpret_cast<void*>(memory)); }, py::arg("memory"));
  m.def("multicast", &multicast, py::arg("arenas"), py::arg("bytes"));
  m.def("take_product_limits", &emu::take_product_limits);
  m.def("encoded_maps", &emu::encoded_maps);
  m.def("take_reports", &take_reports);
  m.def("races", &emu::races);
  m.def("detects_races", &emu::detects_races);
  m.def("host_threads_met", &emu::host_threads_met);
  m.def("reset", &emu::reset, py::call_guard<py::gil_scoped_release>());
}

}  // namespace
}  // namespace tpk

PYBIND11_MODULE(_C_emu, m) {
  using namespace tpk;
  m.doc() = "The CUDA backend of tpkernels on emulated devices, for tests.";
  add_basics(m);
  add_engines(m);
  add_fast_path(m, &translate_errors);
  add_fast_gemm(m);
  add_kernels<cuda::ScopedOp>(m);
  cuda::add_device_groups(m);
  m.def("limits", [] {
    py::dict limits;
    limits["one_shot_bytes"] = kOneShotBytes;
    limits["piece_bytes"] = kPieceBytes;
    cuda::add_device_limits(limits);
    return limits;
  });
  add_emulator(m);
}
