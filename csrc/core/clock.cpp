// The clock of deadlines and counters: a file of its own, because _C_c10d links no more of the core.
#include <chrono>

#include "communicator.h"

namespace tpk {

uint64_t now_nanoseconds() {
  return static_cast<uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count());
}

}  // namespace tpk
