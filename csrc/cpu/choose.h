// The path of a call on the CPU: which engine multiplies, how a sum is sent. The ops call these functions, and
// `explain` reports what they return. Torch-free.
//
// Everything here is a rule of sizes and of the CPU, or of what was measured before the group was opened; nothing reads
// a clock, so that two runs give the same bits.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "core/communicator.h"
#include "core/engines.h"
#include "core/explain.h"
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
  const char* rule;                         // the reason where nothing was measured
  std::optional<MeasuredProduct> measured;  // the reason otherwise
  std::string reason(const GemmShape& shape) const;
};
bool can_multiply(Engine engine, const GemmShape& shape);
EngineChoice choose_engine(const MeasuredEngines& measured, const GemmShape& shape);
// Of the product by that engine: in proportion to what was measured, else as a core of Zen 4 computes.
double expected_seconds(const MeasuredEngines& measured, const GemmShape& shape);

// Between hosts, of x @ w.T whose x is gathered: where chunks of each other rank's rows end, which are multiplied when
// they are there, after this rank's own rows; none where all are gathered first. Ranks may differ in it.
std::vector<size_t> gathered_ends(const Communicator& comm, const Wire& wire, const GemmShape& shape);

// Throws std::invalid_argument for a dtype or codec that the op does not take.
Explained explain(Communicator& comm, const CallShape& call);

}  // namespace tpk
