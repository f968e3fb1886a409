// The fast path from Python into a fused GEMM (see fast_path.h).
#pragma once

#include "pybind.h"

namespace tpk {

// Adds fast_linear and fast_gemm_all_reduce to the module.
void add_fast_gemm(pybind11::module_& m);

}  // namespace tpk
