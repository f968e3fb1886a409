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

// communicator: of _C, kept as long as the back end. make_gloo: makes torch's back end `gloo` of the same ranks.
c10::intrusive_ptr<Backend> open_backend(py::object communicator, const c10::intrusive_ptr<c10d::Store>& store,
                                         bool is_crowded, py::object make_gloo) {
  auto& comm = *reinterpret_cast<Communicator*>(communicator.attr("address").cast<uintptr_t>());
  const auto factory = kept(std::move(make_gloo));
  return c10::make_intrusive<Backend>(comm, kept(std::move(communicator)), store, is_crowded, [factory] {
    py::gil_scoped_acquire gil;
    return (*factory)().cast<c10::intrusive_ptr<c10d::Backend>>();
  });
}

}  // namespace
}  // namespace tpk

PYBIND11_MODULE(_C_c10d, m) {
  using namespace tpk;
  m.doc() = "Back end `tpk` for torch.distributed, compiled for one version of torch.";
  m.attr("torch_version") = py::make_tuple(TORCH_VERSION_MAJOR, TORCH_VERSION_MINOR);
  py::module_::import("torch.distributed");  // has the base class
  py::class_<Backend, c10::intrusive_ptr<Backend>, c10d::Backend>(m, "Backend")
      .def("set_codec", &Backend::set_codec, py::arg("name"), "Returns the codec before.");
  m.def("open_backend", &open_backend, py::arg("communicator"), py::arg("store"), py::arg("is_crowded"),
        py::arg("make_gloo"));
}
