// A decoding step of a whole decoder (cpu/decoder.h), called from Python with the tensors of its layers.
#pragma once

#include "pybind.h"

namespace tpk {

// Adds decode_step to the module.
void add_decode_step(pybind11::module_& m);

}  // namespace tpk
