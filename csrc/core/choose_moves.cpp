#include "moves.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace tpk {
namespace {

// Every CPU with AVX2 and FMA has F16C. TPK_ONLY: one of the tables, for tests.
const Moves& best_moves() {
#if defined(TPK_ONLY)
  return TPK_ONLY;
#elif defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return kV4Moves;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("fma")) {
    return kV3Moves;
  }
  return kPlainMoves;
#else
  return kPlainMoves;
#endif
}

// Rounding to nearest, subnormal numbers kept; anything elsewhere than on x86-64, where the plain loops are all there
// is.
bool has_default_arithmetic() {
#if defined(__x86_64__)
  constexpr unsigned kDenormalsAreZero = 0x40, kRounding = 0x6000, kFlushToZero = 0x8000;
  return (_mm_getcsr() & (kDenormalsAreZero | kRounding | kFlushToZero)) == 0;
#else
  return true;
#endif
}

}  // namespace

const Moves& moves() {
  static const Moves& best = best_moves();
  return has_default_arithmetic() ? best : kPlainMoves;
}

}  // namespace tpk
