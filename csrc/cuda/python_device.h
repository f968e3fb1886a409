// What the Python modules of the CUDA backend have in common: the real one and the emulated one of the tests.
#pragma once

#include "python/bindings.h"

namespace tpk::cuda {

// Adds Communicator, open_peer, open_group, open_local and explain.
void add_device_groups(py::module_& m);
// The limits of kernels over peers, into the dict that `limits()` returns.
void add_device_limits(py::dict& limits);

}  // namespace tpk::cuda
