// In place of csrc/cuda/kernels/launch.h: the same sources as ordinary C++. A block is an OS thread, a CUDA thread is a
// fiber.
#pragma once

#include "emu.h"
