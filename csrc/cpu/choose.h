// The path of a call on the CPU: which engine multiplies, whether the product is written into the arena, how a sum
// is sent. The ops call these functions, and `explain` reports what they return. Torch-free.
//
// Everything here is a rule of sizes and of the CPU, or of what a group has measured before; nothing reads a clock, so
// that two runs give the same bits.
#pragma once

#include <optional>
#include <string>

#include "core/communicator.h"
#include "core/engines.h"
#include "core/wire.h"

namespace tpk {

// All that the rule of engines depends on beside the shape.
struct Cpu {
  bool amd = false;     // else MKL, which ATen calls in fp32, is at its best
  bool avx512 = false;  // avx512f
};
// Lets the rule decide as on another CPU; nullopt: as on this one again. For tests.
void assume_cpu(std::optional<Cpu> other);
void set_onednn_available(bool available);

struct EngineChoice {
  Engine engine;
  const char* reason;
};
EngineChoice choose_engine(const MeasuredEngines& measured, const GemmShape& shape);

// A GEMM whose partial products are summed over the ranks.
struct ReducedGemm {
  GemmShape shape;  // of this rank's product
  bool has_bias;
  int64_t dim;  // that a reduce_scatter cuts; 0 for an all_reduce
};
// Why the product is not written into the arena, there to be summed where it lies; nullptr: it is, if the heap has
// room.
const char* obstacle_to_arena(const Communicator& comm, const Wire& wire, const ReducedGemm& gemm, Engine engine);

// What Group.explain returns: the name of the path, and one sentence.
struct Explained {
  std::string path, reason;
};
// A call as its caller sees it. M, N and K are this rank's sizes of a GEMM, numel the values of a collective's tensor.
struct CallShape {
  std::string op, dtype, codec;
  int64_t M, N, K;
  size_t numel;
  bool has_bias;
  int64_t dim;
};
// Throws std::invalid_argument for a dtype or codec that the op does not take.
Explained explain(Communicator& comm, const CallShape& call);

}  // namespace tpk
