// One plain loop, compiled for several instruction sets; the loader picks the best that this machine has.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(TPK_NO_CLONES)
#define TPK_SIMD __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define TPK_SIMD
#endif

// Loop bodies are templates that must end up inside a TPK_SIMD function, so that they take its instruction set.
#define TPK_INLINE inline __attribute__((always_inline))
