// The kernels of the ops as functions of Python, past torch's dispatcher, which takes two microseconds of a call.
// For plain tensors (tpkernels/ops/_op.py): nothing between the two has work to do.
#pragma once

#include <optional>
#include <tuple>
#include <utility>

#include "fast_path.h"
#include "torch_side/kernels.h"

namespace tpk {

// Arguments of ops, from Python.
template <class T>
struct FromPython;
template <>
struct FromPython<Tensor> {
  static Tensor of(PyObject* x) { return tensor_of(x); }
};
template <>
struct FromPython<OptionalTensor> {
  static OptionalTensor of(PyObject* x) { return x == Py_None ? OptionalTensor() : OptionalTensor(tensor_of(x)); }
};
template <>
struct FromPython<Text> {
  static Text of(PyObject* x) {
    Py_ssize_t size = 0;
    const char* const text = PyUnicode_AsUTF8AndSize(x, &size);
    if (text == nullptr) throw pybind11::error_already_set();
    return Text(text, static_cast<size_t>(size));
  }
};
template <>
struct FromPython<int64_t> {
  static int64_t of(PyObject* x) {
    const long long value = PyLong_AsLongLong(x);
    if (value == -1 && PyErr_Occurred() != nullptr) throw pybind11::error_already_set();
    return value;
  }
};
template <>
struct FromPython<double> {
  static double of(PyObject* x) {
    const double value = PyFloat_AsDouble(x);
    if (value == -1 && PyErr_Occurred() != nullptr) throw pybind11::error_already_set();
    return value;
  }
};
template <>
struct FromPython<bool> {
  static bool of(PyObject* x) { return x == Py_True; }
};

inline PyObject* to_python(const Tensor& result) { return pybind11::object(objects_of({result})[0]).release().ptr(); }
template <class... Results>
PyObject* to_python(const std::tuple<Results...>& results) {
  const auto objects = [](const auto&... each) { return objects_of({each...}); };
  return pybind11::tuple(std::apply(objects, results)).release().ptr();
}

// call is an op, or one in its backend's scope.
template <auto call>
struct Kernel;
template <class Result, class... Args, Result (*call)(Args...)>
struct Kernel<call> {
  static PyObject* run(PyObject*, Arguments args, Py_ssize_t count) {
    return guarded(count, sizeof...(Args), [&] { return run(args, std::index_sequence_for<Args...>()); });
  }
  template <size_t... i>
  static PyObject* run(Arguments args, std::index_sequence<i...>) {
    const std::tuple<std::decay_t<Args>...> given{FromPython<std::decay_t<Args>>::of(args[i])...};
    std::optional<Result> result;
    {
      pybind11::gil_scoped_release no_gil;
      result.emplace(std::apply(call, given));
    }
    return to_python(*result);
  }
};

// Adds kernel_OP for the ops that a step of training or decoding calls many times.
template <template <auto> class Scoped>
void add_kernels(pybind11::module_& m) {
#define TPK_KERNEL_OF(op) \
  {"kernel_" #op, fast(&Kernel<&Scoped<&op>::call>::run), METH_FASTCALL, "The kernel of the op, for plain tensors."}
  static PyMethodDef methods[] = {TPK_KERNEL_OF(all_reduce),
                                  TPK_KERNEL_OF(reduce_scatter),
                                  TPK_KERNEL_OF(all_gather),
                                  TPK_KERNEL_OF(gemm_all_reduce),
                                  TPK_KERNEL_OF(gemm_reduce_scatter),
                                  TPK_KERNEL_OF(all_gather_gemm),
                                  TPK_KERNEL_OF(replicated_gemm),
                                  TPK_KERNEL_OF(linear_backward),
                                  TPK_KERNEL_OF(replicated_gemm_backward),
                                  TPK_KERNEL_OF(gemm_reduce_scatter_backward),
                                  TPK_KERNEL_OF(all_gather_gemm_backward),
                                  TPK_KERNEL_OF(vocab_embedding),
                                  TPK_KERNEL_OF(vocab_embedding_backward),
                                  TPK_KERNEL_OF(vocab_cross_entropy),
                                  TPK_KERNEL_OF(vocab_cross_entropy_backward),
                                  TPK_KERNEL_OF(all_reduce_add_rms_norm),
                                  TPK_KERNEL_OF(rms_norm_backward),
                                  {nullptr, nullptr, 0, nullptr}};
#undef TPK_KERNEL_OF
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw pybind11::error_already_set();
}

}  // namespace tpk
