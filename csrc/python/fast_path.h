// The fast path from Python into a small collective, past torch's dispatcher; tpkernels/ops/_op.py states when it is
// right.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>

#include "core/codec/codec.h"
#include "core/types.h"
#include "dlpack_exchange.h"
#include "pybind.h"

namespace tpk {

using torch::stable::Tensor;

// Names of attributes and arguments, interned once: an attribute is then found by pointer.
inline PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }
struct Names {
  PyObject* requires_grad = interned("requires_grad");
  PyObject* is_neg = interned("is_neg");
  PyObject* is_conj = interned("is_conj");
  PyObject* current_level = interned("_current_level");
  PyObject* none = interned("none");
  PyObject* sum = interned("sum");
  PyObject* needs_input_grad = interned("needs_input_grad");
  PyObject* to_save = interned("to_save");
  PyObject* saved_tensors = interned("saved_tensors");
  PyObject* call = interned("call");
  PyObject* t = interned("t");
};
const Names& names();

// Adds plainness and fast_* to the module, and set_fast_path, which gives them the state of torch that decides.
void add_fast_path(pybind11::module_& m, void (*translate)(std::exception_ptr));

// Fills view and returns true for an ordinary dense tensor on the CPU that no layer of torch observes: no gradient to
// record, no mode, transform, profiler or tracing.
bool plain_view_of(PyObject* x, dlpack::View* view);
// Fills view and returns true for an ordinary dense tensor on the CPU, which some layer of torch may observe
// (gradients, modes).
bool view_of(PyObject* x, dlpack::View* view);
bool records_gradient(PyObject* x);
bool grad_is_enabled();
// No mode, no transform, no profiler, no tracing in this thread.
bool is_unobserved();
bool is_contiguous(const dlpack::View& x);
inline char* data_of(const dlpack::View& x) { return static_cast<char*>(x.data) + x.byte_offset; }
DType dtype_of(const dlpack::DataType& type);  // DType::Count where there is none
// Codec::Count where there is none: no str, or one without UTF-8 (lone surrogates), too.
Codec codec_named(PyObject* codec);
// Of a torch.dtype that codecs pack; of others one without lanes, which dtype_of does not know.
dlpack::DataType data_type_of(PyObject* dtype);
// So that a backward that saved x notices (torch passes inference tensors by, which have no versions).
void mark_modified(PyObject* x);

// Takes the tensor over.
PyObject* object_of(dlpack::Managed* tensor);
// The tensor of an object of Python, in a tenth of a microsecond, and objects of tensors.
Tensor tensor_of(PyObject* x);
pybind11::list objects_of(std::initializer_list<Tensor> tensors);
// torch.nn.functional.linear, a new reference; bias may be None.
PyObject* torch_linear(PyObject* x, PyObject* w, PyObject* bias);
pybind11::object torch_mm(PyObject* x, PyObject* w);

// A new reference that a function of Python has returned, or its error.
inline pybind11::object steal(PyObject* result) {
  if (result == nullptr) throw pybind11::error_already_set();
  return pybind11::reinterpret_steal<pybind11::object>(result);
}

// Sets the Python error of the C++ exception that is being handled.
void raise_in_python();

// Runs the body of a function of Python, with C++ errors turned into Python's.
template <class Body>
PyObject* guarded(Py_ssize_t got, Py_ssize_t expected, Body&& body) {
  if (got != expected) {
    PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", expected, got);
    return nullptr;
  }
  try {
    return body();
  } catch (...) {
    raise_in_python();
  }
  return nullptr;
}

inline PyObject* none() {
  Py_INCREF(Py_None);
  return Py_None;
}

using Arguments = PyObject* const*;

inline PyCFunction fast(PyObject* (*function)(PyObject*, Arguments, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

}  // namespace tpk
