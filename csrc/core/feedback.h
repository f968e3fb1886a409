// Packing with error feedback: what the wire could not carry is kept and added to the next message. Torch-free.
#pragma once

#include <cstddef>

#include "core/codec/codec.h"
#include "types.h"

namespace tpk {

// With v = scale * values + residual in fp32:  wire = encode(v),  residual = v - decode(wire).
//
// The difference is exact, so that residual + decode(wire) is v to the bit. Where v cannot be packed (a NaN or infinity
// in its block) the residual stays what it was: the receiver sees the NaN, and the message after it is whole again.
using EncodeWithFeedback = void (*)(const void* values, float* residual, void* wire, float scale, size_t n);

// Codec none rounds v to the dtype. Throws std::invalid_argument for other dtypes than fp32, bf16 and fp16.
EncodeWithFeedback feedback_of(DType dtype, Codec codec);

}  // namespace tpk
