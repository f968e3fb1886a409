// The fast path from Python into a small collective, past torch's dispatcher; tpkernels/ops/_op.py states when it is
// right.
#pragma once

#include "core/types.h"
#include "dlpack_exchange.h"
#include "pybind.h"

namespace tpk {

// Adds is_plain and fast_* to the module, and set_fast_path, which gives them the state of torch that decides.
void add_fast_path(pybind11::module_& m, void (*translate)(std::exception_ptr));

// Fills view and returns true for an ordinary dense tensor on the CPU that no layer of torch observes: no gradient to
// record, no mode, transform, profiler or tracing.
bool plain_view_of(PyObject* x, dlpack::View* view);
// Fills view and returns true for an ordinary dense tensor on the CPU, which some layer of torch may observe
// (gradients, modes): that is a property of the thread, which one tensor of a call shows (is_plain).
bool view_of(PyObject* x, dlpack::View* view);
bool records_gradient(PyObject* x);
bool is_contiguous(const dlpack::View& x);
DType dtype_of(const dlpack::DataType& type);  // DType::Count where there is none

// Takes the tensor over.
PyObject* object_of(dlpack::Managed* tensor);
// torch.nn.functional.linear, a new reference; bias may be None.
PyObject* torch_linear(PyObject* x, PyObject* w, PyObject* bias);

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
