// The Python module: opening and closing communicators, the codec list, the engine choice. Ops go through torch
// instead.
//
// Here C++ calls Python (and in short_way.cpp, nowhere else): a process group cannot pass through torch's stable ABI,
// so the exchange of transport `group` is a Python object (tpkernels/exchange.py) behind the Exchange interface.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "arena.h"
#include "check.h"
#include "codec/codec.h"
#include "cpu/gemm.h"
#include "cpu/group_transport.h"
#include "cpu/shm.h"
#include "errors.h"
#include "short_way.h"

namespace py = pybind11;

namespace tpk {
namespace {

class PythonExchange final : public Exchange {
 public:
  explicit PythonExchange(py::object exchange)
      : exchange_(std::move(exchange)),
        send_(reinterpret_cast<char*>(exchange_.attr("send_pointer").cast<uintptr_t>())),
        receive_(reinterpret_cast<char*>(exchange_.attr("receive_pointer").cast<uintptr_t>())),
        capacity_(exchange_.attr("capacity").cast<size_t>()) {}
  ~PythonExchange() override {
    if (!Py_IsInitialized()) {
      exchange_.release();  // the interpreter is gone and the object with it
      return;
    }
    py::gil_scoped_acquire gil;
    exchange_ = py::object();
  }
  char* send_buffer() override { return send_; }
  const char* receive_buffer() override { return receive_; }
  size_t capacity() const override { return capacity_; }
  void start(const std::vector<size_t>& send_bytes, const std::vector<size_t>& receive_bytes) override {
    guarded([&] { exchange_.attr("start")(send_bytes, receive_bytes); });
  }
  void wait(uint64_t call) override {
    guarded([&] { exchange_.attr("wait")(call); });
  }
  void close(uint64_t last_call) override {
    py::gil_scoped_acquire gil;
    try {
      exchange_.attr("close")(last_call);
    } catch (const py::error_already_set&) {  // leaving must not fail
    }
  }

 private:
  template <class Body>
  void guarded(Body&& body) {
    py::gil_scoped_acquire gil;
    try {
      body();
    } catch (py::error_already_set& error) {
      const std::string text = py::str(error.value());
      if (error.matches(PyExc_TimeoutError)) throw TimeoutFailure(text);
      throw PeerLost(text);
    }
  }

  py::object exchange_;
  char* send_;
  char* receive_;
  size_t capacity_;
};

// Owned by Python, never freed: the interpreter may raise them until its last breath.
PyObject* rank_mismatch = nullptr;
PyObject* peer_lost = nullptr;

void translate(std::exception_ptr pointer) {
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const RankMismatch& error) {
    PyErr_SetString(rank_mismatch != nullptr ? rank_mismatch : PyExc_RuntimeError, error.what());
  } catch (const PeerLost& error) {
    PyErr_SetString(peer_lost != nullptr ? peer_lost : PyExc_RuntimeError, error.what());
  } catch (const TimeoutFailure& error) {
    PyErr_SetString(PyExc_TimeoutError, error.what());
  }
}

py::dict stats_of(const OpStats& stats) {
  py::dict row;
  row["calls"] = stats.calls;
  row["wire_bytes"] = stats.wire_bytes;
  row["seconds"] = static_cast<double>(stats.nanoseconds) * 1e-9;
  row["wait_seconds"] = static_cast<double>(stats.wait_nanoseconds) * 1e-9;
  return row;
}

py::dict stats_by_op(Communicator& comm) {
  const std::array<OpStats, kOps> all = comm.stats();
  py::dict rows;
  for (size_t i = 0; i < kOps; ++i) {
    if (all[i].calls > 0) rows[name_of(static_cast<Op>(i))] = stats_of(all[i]);
  }
  return rows;
}

std::shared_ptr<Communicator> open_shm(const std::string& name, const std::string& label, int rank, int world_size,
                                       double timeout_s, int fd, size_t arena_bytes, const std::vector<int>& pids,
                                       int cores) {
  std::shared_ptr<Communicator> comm =
      std::make_shared<ShmCommunicator>(name, label, rank, world_size, timeout_s, fd, arena_bytes, pids, cores);
  register_communicator(comm);
  return comm;
}

std::shared_ptr<Communicator> open_group(const std::string& name, const std::string& label, int rank, int world_size,
                                         double timeout_s, py::object exchange) {
  std::shared_ptr<Communicator> comm = std::make_shared<GroupCommunicator>(
      name, label, rank, world_size, timeout_s, std::make_unique<PythonExchange>(std::move(exchange)));
  register_communicator(comm);
  return comm;
}

std::shared_ptr<Communicator> open_local(const std::string& name, const std::string& label) {
  std::shared_ptr<Communicator> comm = make_local(name, label);
  register_communicator(comm);
  return comm;
}

DType float_dtype(const std::string& name) {
  for (DType dtype : {DType::F32, DType::F64, DType::BF16, DType::F16}) {
    if (name == name_of(dtype)) return dtype;
  }
  throw std::invalid_argument(concat("dtype must be float32, float64, bfloat16 or float16, got ", name));
}

py::list codec_list() {
  py::list rows;
#define TPK_CODEC_ROW(name, id, type) rows.append(py::make_tuple(name, type::kBlockValues, type::kBlockBytes));
  TPK_CODECS(TPK_CODEC_ROW)
#undef TPK_CODEC_ROW
  return rows;
}

}  // namespace
}  // namespace tpk

PYBIND11_MODULE(_C, m) {
  using namespace tpk;
  m.doc() = "Runtime objects of tpkernels; importing this module registers torch.ops.tpkernels.";
  // Registered globally, so that errors of torch.ops calls, which run through torch's own bindings, are translated too.
  py::register_exception_translator(&translate);
  add_short_way(m, &translate);

  py::class_<Communicator, std::shared_ptr<Communicator>>(m, "Communicator", "A group on one device.")
      .def_property_readonly("name", &Communicator::name)
      .def_property_readonly("label", &Communicator::label)
      .def_property_readonly("rank", &Communicator::rank)
      .def_property_readonly("world_size", &Communicator::world_size)
      .def_property_readonly("transport", &Communicator::transport)
      .def_property_readonly("heap_bytes", &Communicator::heap_bytes)
      .def_property_readonly("address", [](Communicator& comm) { return reinterpret_cast<uintptr_t>(&comm); })
      .def("stats_by_op", &stats_by_op)
      .def("reset_stats", &Communicator::reset_stats)
      .def(
          "barrier", [](Communicator& comm) { comm.exchange(Op::Barrier, 0); },
          py::call_guard<py::gil_scoped_release>())
      .def(
          "exchange", [](Communicator& comm, int64_t mine) { return comm.exchange(Op::Sizes, mine); }, py::arg("mine"),
          py::call_guard<py::gil_scoped_release>())
      .def(
          "close",
          [](Communicator& comm) {
            comm.close();
            unregister_communicator(comm.name());
          },
          py::call_guard<py::gil_scoped_release>());

  m.def("open_shm", &open_shm, py::arg("name"), py::arg("label"), py::arg("rank"), py::arg("world_size"),
        py::arg("timeout_s"), py::arg("fd"), py::arg("arena_bytes"), py::arg("pids"), py::arg("cores"));
  m.def("open_group", &open_group, py::arg("name"), py::arg("label"), py::arg("rank"), py::arg("world_size"),
        py::arg("timeout_s"), py::arg("exchange"));
  m.def("open_local", &open_local, py::arg("name"), py::arg("label"));
  m.def("set_error_types", [](py::object mismatch, py::object lost) {
    rank_mismatch = mismatch.release().ptr();
    peer_lost = lost.release().ptr();
  });
  m.def("codecs", &codec_list, "(name, values a block, bytes a block) of every codec but none.");

  m.def("limits", [] {
    py::dict limits;
    limits["one_shot_bytes"] = kOneShotBytes;
    limits["piece_bytes"] = kPieceBytes;
    limits["smallest_in_arena"] = kSmallestInArena;
    return limits;
  });
  m.def("set_onednn_available", &set_onednn_available, py::arg("available"));
  m.def(
      "set_measured_engine",
      [](const std::string& dtype, int64_t M, int64_t N, int64_t K, bool onednn) {
        set_measured_engine(float_dtype(dtype), M, N, K, onednn ? Engine::OneDnn : Engine::Aten);
      },
      py::arg("dtype"), py::arg("M"), py::arg("N"), py::arg("K"), py::arg("onednn"));
  m.def("forget_measured_engines", &forget_measured_engines);
  m.def(
      "choose_engine",
      [](const std::string& dtype, int64_t M, int64_t N, int64_t K) {
        const EngineChoice choice = choose_engine(float_dtype(dtype), M, N, K);
        return py::make_tuple(name_of(choice.engine), choice.reason);
      },
      py::arg("dtype"), py::arg("M"), py::arg("N"), py::arg("K"));
}
