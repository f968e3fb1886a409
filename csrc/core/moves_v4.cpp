// The inner loops for x86-64-v4; CMake sets the instruction set.
#if defined(__x86_64__)
#define TPK_MOVES kV4Moves
#include "moves.cpp"
#endif
