// The Python module of the CPU backend: opening communicators, the codec list, the engine choice. Ops go through torch
// instead.
#include "bindings.h"
#include "core/arena.h"
#include "cpu/transport/group_transport.h"
#include "cpu/transport/hierarchical_transport.h"
#include "cpu/transport/shm.h"
#include "cpu/transport/socket_transport.h"
#include "decode_step.h"
#include "fast_gemm.h"
#include "fast_packing.h"
#include "fast_path.h"
#include "kernels.h"

namespace tpk {
namespace {

std::shared_ptr<Communicator> registered(std::shared_ptr<Communicator> comm) {
  register_communicator(comm);
  return comm;
}

std::shared_ptr<Communicator> open_shm(const std::string& name, const std::string& label, int rank, int world_size,
                                       double timeout_s, int fd, size_t arena_bytes, const std::vector<int>& pids,
                                       int cores) {
  return registered(
      std::make_shared<ShmCommunicator>(name, label, rank, world_size, timeout_s, fd, arena_bytes, pids, cores));
}

// Nanoseconds of so many all_reduces of a message of floats.
uint64_t time_all_reduce(Communicator& comm, size_t bytes, int calls) {
  const Wire& wire = wire_of(DType::F32, Codec::None, ReduceOp::Sum);
  std::vector<float> data(bytes / sizeof(float));
  const CallSpec spec{Op::AllReduceInplace, DType::F32, ReduceOp::Sum, Codec::None, data.size(), 0, 0};
  const uint64_t started = now_nanoseconds();
  for (int i = 0; i < calls; ++i) comm.all_reduce(spec, wire, data.data(), data.data(), data.size());
  return now_nanoseconds() - started;
}

std::shared_ptr<Communicator> open_group(const std::string& name, const std::string& label, int rank, int world_size,
                                         double timeout_s, py::object exchange) {
  return registered(std::make_shared<GroupCommunicator>(
      name, label, rank, world_size, timeout_s, std::make_unique<PythonExchange<Exchange>>(std::move(exchange))));
}

// The state of the other ranks, by a Python object: Watch in tpkernels/comm/watch.py.
class PythonWatch final : public SocketExchange::Watch {
 public:
  explicit PythonWatch(py::object watch) : kept_(std::move(watch)) {}
  void look(uint64_t call, bool late, bool ended, const std::string& what) override {
    in_python_undisturbed(kept_.get(), [&](py::object& watch) { watch.attr("look")(call, late, ended, what); });
  }
  void leave(uint64_t last_call) noexcept override {
    try {
      in_python_undisturbed(kept_.get(), [&](py::object& watch) { watch.attr("close")(last_call); });
    } catch (...) {  // leaving must not fail
    }
  }

 private:
  OwnedObject kept_;
};

std::shared_ptr<Communicator> open_sockets(const std::string& name, const std::string& label, int rank, int world_size,
                                           double timeout_s, size_t capacity, const std::vector<int>& sockets,
                                           py::object watch) {
  auto link = std::make_unique<SocketExchange>(sockets, rank, capacity, timeout_s,
                                               std::make_unique<PythonWatch>(std::move(watch)));
  return registered(std::make_shared<SocketCommunicator>(name, label, rank, world_size, timeout_s, std::move(link)));
}

// inner: no op finds it by its name any more.
std::shared_ptr<Communicator> open_hierarchical(const std::string& name, const std::string& label, int rank,
                                                double timeout_s, HierarchicalCommunicator::Hosts hosts,
                                                std::shared_ptr<Communicator> inner, const std::vector<int>& sockets,
                                                size_t capacity, py::object watch) {
  size_t world_size = 0;
  for (const std::vector<int>& ranks : hosts) world_size += ranks.size();
  unregister_communicator(inner->name());
  return registered(std::make_shared<HierarchicalCommunicator>(
      name, label, rank, static_cast<int>(world_size), timeout_s, std::move(hosts), std::move(inner), sockets, capacity,
      std::make_unique<PythonWatch>(std::move(watch))));
}

std::shared_ptr<Communicator> open_local(const std::string& name, const std::string& label) {
  return registered(make_local(name, label));
}

}  // namespace
}  // namespace tpk

PYBIND11_MODULE(_C, m) {
  using namespace tpk;
  m.doc() = "Runtime objects of tpkernels; importing this module registers torch.ops.tpkernels.";
  add_basics(m);
  add_engines(m);
  add_fast_path(m, &translate_errors);
  add_fast_gemm(m);
  add_fast_packing(m);
  add_kernels<Unscoped>(m);
  add_decode_step(m);
  add_communicator<Communicator>(m)
      .def_property_readonly("address", [](Communicator& comm) { return reinterpret_cast<uintptr_t>(&comm); })
      .def(
          "force_chunks", [](Communicator& comm, int chunks) { comm.forced_chunks = chunks; }, py::arg("chunks"),
          "For tests: the number of chunks of every fused GEMM over connections; 0: the rule's.")
      .def(
          "set_link",
          [](Communicator& comm, double rate, double hop) {
            comm.link_bytes_per_s = rate;
            comm.link_hop_s = hop;
          },
          py::arg("bytes_per_s"), py::arg("hop_s") = 0.0)
      .def(
          "set_one_shot",
          [](Communicator& comm, size_t bytes, bool is_measured) {
            TPK_CHECK(bytes <= kMostOneShotBytes, "set_one_shot: expected ", kMostOneShotBytes, " bytes at most, got ",
                      bytes);
            comm.one_shot_bytes = bytes;
            comm.is_one_shot_measured = is_measured;
          },
          py::arg("bytes"), py::arg("is_measured") = false)
      .def("time_all_reduce", &time_all_reduce, py::arg("bytes"), py::arg("calls"),
           py::call_guard<py::gil_scoped_release>());

  add_choices(m);
  m.def("open_shm", &open_shm, py::arg("name"), py::arg("label"), py::arg("rank"), py::arg("world_size"),
        py::arg("timeout_s"), py::arg("fd"), py::arg("arena_bytes"), py::arg("pids"), py::arg("cores"));
  m.def("open_group", &open_group, py::arg("name"), py::arg("label"), py::arg("rank"), py::arg("world_size"),
        py::arg("timeout_s"), py::arg("exchange"));
  m.def("open_sockets", &open_sockets, py::arg("name"), py::arg("label"), py::arg("rank"), py::arg("world_size"),
        py::arg("timeout_s"), py::arg("capacity"), py::arg("sockets"), py::arg("watch"));
  m.def("open_hierarchical", &open_hierarchical, py::arg("name"), py::arg("label"), py::arg("rank"),
        py::arg("timeout_s"), py::arg("hosts"), py::arg("inner"), py::arg("sockets"), py::arg("capacity"),
        py::arg("watch"));
  m.def("open_local", &open_local, py::arg("name"), py::arg("label"));
  m.def("limits", [] {
    py::dict limits;
    limits["arena_layout"] = kArenaLayout;
    limits["one_shot_bytes"] = kOneShotBytes;
    limits["piece_bytes"] = kPieceBytes;
    return limits;
  });
}
