// Primitives in the manner of device.cuh that only tests need.
#pragma once

#include "cuda/kernels/device.cuh"

namespace tpk::emu {

inline void add_release_sys(uint32_t* to, uint32_t value, Where where = Where::current()) {
  exchange(to, [=](uint32_t old) { return old + value; }, Order::Release, Scope::System, where);
}

inline void fence_gpu() { fence(Scope::Gpu); }

inline float warp_sum(float value, Where where = Where::current()) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset, 32, where);
  return value;
}

}  // namespace tpk::emu
