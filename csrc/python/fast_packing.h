// The fast path from Python into packing (see fast_path.h).
#pragma once

#include "pybind.h"

namespace tpk {

// Adds fast_compress, fast_decompress, fast_compress_with_feedback and average_with_feedback to the module.
void add_fast_packing(pybind11::module_& m);

}  // namespace tpk
