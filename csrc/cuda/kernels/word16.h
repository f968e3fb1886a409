// The widest access of a thread: 16 bytes, at an address that is a multiple of 16. Torch-free.
#pragma once

#include <cstdint>

namespace tpk::cuda {

struct alignas(16) Word16 {
  uint32_t x, y, z, w;
};

}  // namespace tpk::cuda
