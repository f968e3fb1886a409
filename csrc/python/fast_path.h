// The fast path from Python into a small collective, past torch's dispatcher; tpkernels/ops/_op.py states when it is
// right.
#pragma once

#include "pybind.h"

namespace tpk {

// Adds is_plain and fast_* to the module, and set_fast_path, which gives them the state of torch that decides.
void add_fast_path(pybind11::module_& m, void (*translate)(std::exception_ptr));

}  // namespace tpk
