// The Python module _C_c10d. tpkernels/c10d.py loads it.
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include "backend.h"

namespace py = pybind11;

namespace tpk {
namespace {

// Owned by C++; leaked where the interpreter has ended.
std::shared_ptr<py::object> kept(py::object object) {
  return {new py::object(std::move(object)), [](py::object* owned) {
            if (!Py_IsInitialized()) return;
            py::gil_scoped_acquire gil;
            delete owned;
          }};
}

// A Python function that returns a back end, to be called without the GIL.
template <class... Arguments>
auto making(py::object function) {
  return [function = kept(std::move(function))](const Arguments&... arguments) {
    py::gil_scoped_acquire gil;
    return (*function)(arguments...).template cast<Backend::Base>();
  };
}

// communicator: of _C, kept as long as the back end. make_gloo: makes torch's back end `gloo` of the same ranks.
// split(store, rank, size, name, timeout_s): makes a back end of some of them.
c10::intrusive_ptr<Backend> open_backend(py::object communicator, const c10::intrusive_ptr<c10d::Store>& store,
                                         bool is_crowded, py::object make_gloo, py::object split) {
  auto& comm = *reinterpret_cast<Communicator*>(communicator.attr("address").cast<uintptr_t>());
  return c10::make_intrusive<Backend>(
      comm, kept(std::move(communicator)), store, is_crowded, making<>(std::move(make_gloo)),
      making<c10::intrusive_ptr<c10d::Store>, int, int, std::string, double>(std::move(split)));
}

}  // namespace
}  // namespace tpk

PYBIND11_MODULE(_C_c10d, m) {
  using namespace tpk;
  m.doc() = "Back end `tpk` for torch.distributed, compiled for one version of torch.";
  m.attr("torch_version") = py::make_tuple(TORCH_VERSION_MAJOR, TORCH_VERSION_MINOR);
  py::module_::import("torch.distributed");  // has the base class
  py::class_<Backend, c10::intrusive_ptr<Backend>, c10d::Backend>(m, "Backend")
      .def_property_readonly("options", &Backend::getBackendOptions)
      .def("set_codec", &Backend::set_codec, py::arg("name"), "Returns the codec before.");
  m.def("open_backend", &open_backend, py::arg("communicator"), py::arg("store"), py::arg("is_crowded"),
        py::arg("make_gloo"), py::arg("split"));
}
