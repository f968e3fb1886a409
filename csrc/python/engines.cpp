#include "bindings.h"
#include "cpu/choose.h"
#include "cpu/gemm.h"

namespace tpk {

void add_engines(py::module_& m) {
  m.def(
      "set_onednn_available", [](bool available) { set_onednn_available(available && has_onednn_linear()); },
      py::arg("available"));
  m.def("assume_cpu", [](bool amd, bool avx512) { assume_cpu(Cpu{amd, avx512}); }, py::arg("amd"), py::arg("avx512"));
  m.def("forget_assumed_cpu", [] { assume_cpu(std::nullopt); });
}

void add_choices(py::module_& m) {
  m.def(
      "choose_engine",
      [](const Communicator& comm, const std::string& dtype, int64_t M, int64_t N, int64_t K) {
        const GemmShape shape{float_dtype("choose_engine", dtype), M, N, K};
        const EngineChoice choice = choose_engine(comm.measured_engines(), shape);
        return py::make_tuple(name_of(choice.engine), choice.reason(shape));
      },
      py::arg("communicator"), py::arg("dtype"), py::arg("M"), py::arg("N"), py::arg("K"));
  m.def(
      "engines_for",
      [](const std::string& dtype, int64_t M, int64_t N, int64_t K) {
        const GemmShape shape{float_dtype("engines_for", dtype), M, N, K};
        std::vector<std::string> names;
        for (const Engine engine : kAllEngines) {
          if (can_multiply(engine, shape)) names.emplace_back(name_of(engine));
        }
        return names;
      },
      py::arg("dtype"), py::arg("M"), py::arg("N"), py::arg("K"));
  add_explain<Communicator>(m, &explain);
}

}  // namespace tpk
