// Packing outside collectives, by pointers, on the threads of torch: the moves of core/wire.h over n values.
#pragma once

#include "core/wire.h"

namespace tpk {

void pack(const Wire& wire, const void* values, void* packed, size_t n);
void unpack(const Wire& wire, const void* packed, void* values, size_t n);
void pack_with_feedback(const Wire& wire, const void* values, float* residual, void* packed, float scale, size_t n);

}  // namespace tpk
