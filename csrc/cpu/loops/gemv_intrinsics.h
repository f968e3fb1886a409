// The paths of x86-64, each compiled for its instruction set; gemv.cpp selects those that the machine has.
#pragma once

#include "gemv.h"

namespace tpk {

GemvPath gemv_avx2(DType dtype);    // needs AVX2, FMA, F16C
GemvPath gemv_avx512(DType dtype);  // needs AVX-512 F and BW
GemvPath gemv_avx512_bf16();        // and AVX512_BF16, for BF16 alone

}  // namespace tpk
