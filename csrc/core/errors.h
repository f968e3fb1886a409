// Errors that cross into Python with a type of their own; python/bindings.cpp maps them.
#pragma once

#include <stdexcept>

namespace tpk {

// A rank did not come within the group's deadline: TimeoutError.
struct TimeoutFailure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A rank died, closed the group or gave up: tpkernels.PeerLostError.
struct PeerLost : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The ranks did not make the same call: tpkernels.RankMismatchError.
struct RankMismatch : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace tpk
