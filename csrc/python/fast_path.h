// The short way from Python into a small collective; see tpkernels/ops/_plain.py, which says when it is right.
#pragma once

#include "pybind.h"

namespace tpk {

// Adds is_plain and short_* to the module, and set_short_way, which names what they ask of torch.
void add_short_way(pybind11::module_& m, void (*translate)(std::exception_ptr));

}  // namespace tpk
