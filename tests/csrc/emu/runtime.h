// What the run time API keeps of kernels, for launches.
#pragma once

#include <cstddef>

namespace tpk::emu {

// Dynamic shared memory that a kernel may be launched with: 48 KiB, or what cudaFuncSetAttribute said.
size_t allowed_shared_bytes(const void* kernel);

}  // namespace tpk::emu
