// The fast path from Python into a small collective, past torch's dispatcher; tpkernels/ops/_op.py states when it is
// right.
#pragma once

#include "core/types.h"
#include "dlpack_exchange.h"
#include "pybind.h"

namespace tpk {

// Adds is_plain and fast_* to the module, and set_fast_path, which gives them the state of torch that decides.
void add_fast_path(pybind11::module_& m, void (*translate)(std::exception_ptr));

// Fills view and returns true for an ordinary dense tensor on the CPU, which some layer of torch may observe
// (gradients, modes): that is a property of the thread, which one tensor of a call shows (is_plain).
bool view_of(PyObject* x, dlpack::View* view);
bool is_contiguous(const dlpack::View& x);
DType dtype_of(const dlpack::DataType& type);  // DType::Count where there is none

}  // namespace tpk
