#include "bindings.h"
#include "cpu/gemm.h"

namespace tpk {

void add_engines(py::module_& m) {
  m.def("set_onednn_available", &set_onednn_available, py::arg("available"));
  m.def("assume_cpu", [](bool amd, bool avx512) { assume_cpu(Cpu{amd, avx512}); }, py::arg("amd"), py::arg("avx512"));
  m.def("forget_assumed_cpu", [] { assume_cpu(std::nullopt); });
  m.def(
      "set_measured_engine",
      [](const std::string& dtype, int64_t M, int64_t N, int64_t K, const std::string& engine) {
        set_measured_engine(float_dtype(dtype), M, N, K, engine_of(engine));
      },
      py::arg("dtype"), py::arg("M"), py::arg("N"), py::arg("K"), py::arg("engine"));
  m.def("forget_measured_engines", &forget_measured_engines);
  m.def(
      "choose_engine",
      [](const std::string& dtype, int64_t M, int64_t N, int64_t K) {
        const EngineChoice choice = choose_engine(float_dtype(dtype), M, N, K);
        return py::make_tuple(name_of(choice.engine), choice.reason);
      },
      py::arg("dtype"), py::arg("M"), py::arg("N"), py::arg("K"));
}

}  // namespace tpk
