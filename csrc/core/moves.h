// The inner loops of every collective on the CPU: pack, unpack, and sum R wires in the order given. Torch-free.
//
// moves.cpp is compiled for each instruction set (moves_v3.cpp, moves_v4.cpp), and each gives one table. All give the
// same bytes: those of the plain loops, which every machine has.
#pragma once

#include <cstddef>

#include "core/codec/codec.h"
#include "types.h"

namespace tpk {

// Of one codec. An n that is not a multiple of a block ends the message.
struct CodecMoves {
  void (*encode)(const float* values, char* wire, size_t n);
  // The same in one pass with: sent = the wire unpacked (it may be `values`);
  void (*encode_sent)(const float* values, char* wire, float* sent, size_t n);
  // rest = values - the wire unpacked, where that is finite.
  void (*encode_rest)(const float* values, char* wire, float* rest, size_t n);
  void (*decode)(const char* wire, float* values, size_t n);
  // sums = the wires, from `offset` bytes on, unpacked and added in order.
  void (*sum)(const char* const* wires, int num_wires, size_t offset, float* sums, size_t n);
};

// Of one dtype that codecs pack: rounded once, and exact.
struct DTypeMoves {
  void (*from_floats)(const float* values, void* to, size_t n);
  void (*to_floats)(const void* from, float* values, size_t n);
};

// Outputs may be inputs: a sum written back over what was read.
using Reduce = void (*)(const void* const* inputs, int num_inputs, void* const* outputs, int num_outputs, size_t n);

struct Moves {
  CodecMoves codecs[static_cast<size_t>(Codec::Count)];  // Codec::None has none
  DTypeMoves dtypes[static_cast<size_t>(DType::Raw1)];   // float32, bfloat16 and float16
  Reduce reduce[static_cast<size_t>(DType::Raw1)][static_cast<size_t>(ReduceOp::None)];  // avg: floating dtypes
  void (*divide)(float* values, int by, size_t n);
  // sum = scale * values + residual.
  void (*add_residual)(const float* values, float scale, const float* residual, float* sum, size_t n);
  // residual = sum - sent, where that is finite.
  void (*keep_rest)(const float* sum, const float* sent, float* residual, size_t n);
};

extern const Moves kPlainMoves;         // what the compiler makes of plain loops for any machine of this kind
extern const Moves kV3Moves, kV4Moves;  // x86-64-v3 (AVX2, F16C), x86-64-v4 (AVX-512)

// Those for this machine, selected once. While the calling thread has other than the default rounding and treatment of
// subnormal numbers, the plain ones: what those do with it is the same on every machine.
const Moves& moves();

}  // namespace tpk
