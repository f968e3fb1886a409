// What the Python modules of all backends share: errors, the binding of a communicator, exchanges that are Python
// objects. Only files that make Python modules include this.
#pragma once

#include <exception>
#include <optional>
#include <thread>
#include <type_traits>

#include "core/communicator.h"
#include "core/errors.h"
#include "core/exchange.h"
#include "core/explain.h"
#include "pybind.h"

namespace tpk {

namespace py = pybind11;

// Raises errors.h's types as the Python types that set_error_types named.
void translate_errors(std::exception_ptr pointer);
// Adds set_error_types, codecs and the translation of errors.
void add_basics(py::module_& m);
// Adds what the choice of the engine for CPU GEMMs depends on: oneDNN, the CPU.
void add_engines(py::module_& m);
// Adds the choices of the CPU: choose_engine, explain.
void add_choices(py::module_& m);

py::dict stats_by_op(Communicator& comm);

// A Python object that C++ owns, given back under the GIL, or left alone when the interpreter is gone.
class OwnedObject {
 public:
  explicit OwnedObject(py::object object) : object_(std::move(object)) {}
  ~OwnedObject();
  OwnedObject(const OwnedObject&) = delete;
  OwnedObject& operator=(const OwnedObject&) = delete;
  py::object& get() { return object_; }

 private:
  py::object object_;
};

// Throws the error of Python as one of errors.h, or as it is where it is none of them (KeyboardInterrupt).
[[noreturn]] void throw_as_ours(py::error_already_set& error);
// Whether Python may run handlers of signals in code that this thread calls.
bool handlers_run_here();

template <class Body>
auto in_python(py::object& object, Body&& body) {
  py::gil_scoped_acquire gil;
  try {
    return body(object);
  } catch (py::error_already_set& error) {
    throw_as_ours(error);
  }
}

// The same where no handler of a signal runs: Python runs those in its main thread, between two steps of whatever that
// thread executes, and what a handler raises (Ctrl-C) would end an exchange half-way and leave the ranks out of step.
// In another thread it cannot; the handler runs when the op has returned, as it does where an op needs no Python.
template <class Body>
void in_python_undisturbed(py::object& object, Body&& body) {
  if (!handlers_run_here()) return in_python(object, body);
  std::exception_ptr thrown;
  const auto work = [&] {
    try {
      in_python(object, body);
    } catch (...) {
      thrown = std::current_exception();
    }
  };
  {
    std::optional<py::gil_scoped_release> no_gil;
    if (PyGILState_Check() != 0) no_gil.emplace();
    std::thread(work).join();
  }
  if (thrown) std::rethrow_exception(thrown);
}

// An exchange (Exchange or DeviceExchange) whose work a Python object does: tpkernels/comm/exchange.py. A process group
// cannot pass through torch's stable ABI.
template <class Base>
class PythonExchange : public Base {
 public:
  explicit PythonExchange(py::object exchange)
      : send_(reinterpret_cast<char*>(exchange.attr("send_pointer").cast<uintptr_t>())),
        receive_(reinterpret_cast<char*>(exchange.attr("receive_pointer").cast<uintptr_t>())),
        capacity_(exchange.attr("capacity").cast<size_t>()),
        kept_(std::move(exchange)) {}
  char* send_buffer() override { return send_; }
  const char* receive_buffer() override { return receive_; }
  size_t capacity() const override { return capacity_; }
  void start(const std::vector<size_t>& send_bytes, const std::vector<size_t>& receive_bytes) override {
    undisturbed([&](py::object& exchange) { exchange.attr("start")(send_bytes, receive_bytes); });
  }
  void wait(uint64_t call) override {
    undisturbed([&](py::object& exchange) { exchange.attr("wait")(call); });
  }
  void close(uint64_t last_call) override {
    try {
      undisturbed([&](py::object& exchange) { exchange.attr("close")(last_call); });
    } catch (const std::exception&) {  // leaving must not fail
    }
  }

 protected:
  template <class Body>
  auto guarded(Body&& body) {
    return in_python(kept_.get(), body);
  }

 private:
  template <class Body>
  void undisturbed(Body&& body) {
    // A device's exchange enqueues on the stream of the thread that calls it.
    std::is_same_v<Base, Exchange> ? in_python_undisturbed(kept_.get(), body) : in_python(kept_.get(), body);
  }

  char* send_;
  char* receive_;
  size_t capacity_;
  OwnedObject kept_;
};

// The class Communicator of a module. Local to it: the modules of two backends may be loaded beside each other.
template <class Comm>
py::class_<Comm, std::shared_ptr<Comm>> add_communicator(py::module_& m) {
  py::class_<Comm, std::shared_ptr<Comm>> bound(m, "Communicator", "A group on one device.", py::module_local());
  bound.def_property_readonly("name", &Comm::name)
      .def_property_readonly("label", &Comm::label)
      .def_property_readonly("rank", &Comm::rank)
      .def_property_readonly("world_size", &Comm::world_size)
      .def_property_readonly("transport", &Comm::transport)
      .def_property_readonly("heap_bytes", &Comm::heap_bytes)
      .def("stats_by_op", [](Comm& comm) { return stats_by_op(comm); })
      .def("reset_stats", &Comm::reset_stats, py::call_guard<py::gil_scoped_release>())
      .def("check", &Comm::check, py::call_guard<py::gil_scoped_release>())
      .def(
          "barrier", [](Comm& comm) { comm.exchange(Op::Barrier, 0); }, py::call_guard<py::gil_scoped_release>())
      .def(
          "exchange", [](Comm& comm, int64_t mine) { return comm.exchange(Op::Sizes, mine); }, py::arg("mine"),
          py::call_guard<py::gil_scoped_release>())
      .def(
          "add_measured",
          [](Comm& comm, const std::string& dtype, int64_t M, int64_t N, int64_t K,
             const std::map<std::string, double>& microseconds, bool is_point) {
            MeasuredProduct measured{{float_dtype("add_measured", dtype), M, N, K}, {}};
            for (const auto& [engine, us] : microseconds) measured.times[engine_of(engine)] = us;
            MeasuredEngines& engines = comm.measured_engines();
            is_point ? engines.add_point(measured) : engines.add_shape(measured);
          },
          py::arg("dtype"), py::arg("M"), py::arg("N"), py::arg("K"), py::arg("microseconds"),
          py::arg("is_point") = false)
      .def("forget_measured", [](Comm& comm) { comm.measured_engines().clear(); })
      .def(
          "close",
          [](Comm& comm, const std::string& why) {
            comm.close(why);
            unregister_communicator(comm.name());
          },
          py::arg("why") = "this rank closed the group", py::call_guard<py::gil_scoped_release>());
  return bound;
}

// Adds explain: (communicator, call) -> (path, reason, engine).
template <class Comm>
void add_explain(py::module_& m, Explained (*explain)(Comm&, const CallShape&)) {
  m.def(
      "explain",
      [explain](Comm& comm, const std::string& op, const std::string& dtype, const std::string& codec, int64_t M,
                int64_t N, int64_t K, size_t numel, int64_t dim) {
        const Explained found = explain(comm, {op, dtype, codec, M, N, K, numel, dim});
        return py::make_tuple(found.path, found.reason, found.engine);
      },
      py::arg("communicator"), py::arg("op"), py::arg("dtype"), py::arg("codec"), py::arg("M"), py::arg("N"),
      py::arg("K"), py::arg("numel"), py::arg("dim"));
}

}  // namespace tpk
