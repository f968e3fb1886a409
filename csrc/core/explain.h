// What Group.explain asks and gets back, on every device, and what no device decides. Torch-free.
#pragma once

#include <optional>
#include <string>

#include "communicator.h"

namespace tpk {

// The name of the path, one sentence, and the engine of a product on the CPU.
struct Explained {
  std::string path, reason, engine = "";
};

// A call as its caller sees it. M, N and K are this rank's sizes of a GEMM, numel the values of a collective's tensor.
struct CallShape {
  std::string op, dtype, codec;
  int64_t M, N, K;
  size_t numel;
  int64_t dim;  // that is cut or gathered

  bool is_gemm() const;
};

// How the call packs its values. Throws std::invalid_argument for a dtype or codec that the op does not take.
const Wire& wire_of(const CallShape& call);
// The path of a collective where the transport leaves no choice; nullopt: the device chooses.
std::optional<Explained> explain_transport(const Communicator& comm);

}  // namespace tpk
