// What the files of transport `hierarchical` share. Torch-free.
#pragma once

#include <utility>

#include "hierarchical_transport.h"
#include "opening.h"

namespace tpk {

// The openings of the ranks of a host, in rank order.
struct HierarchicalCommunicator::HostOpening {
  std::vector<Opening> openings;
  bool agrees;     // whether they are of one call, so that the first call inside the host has brought its bytes
  bool is_packed;  // the input of any of them
  bool has_bytes() const { return agrees && !is_packed; }
};

// The openings of all ranks, in rank order.
struct HierarchicalCommunicator::Opened {
  std::vector<CallSpec> specs;
  bool is_packed = false;  // the input of any rank
  bool has_come = true;    // whether the messages of all hosts were as long as expected
};

template <class Body>
void HierarchicalCommunicator::counted(Communicator& part, Body&& body) {
  const auto totals = [&] {
    uint64_t bytes = 0, waits = 0;
    for (const OpStats& stats : part.stats()) {
      bytes += stats.wire_bytes;
      waits += stats.wait_nanoseconds;
    }
    return std::pair(bytes, waits);
  };
  const auto before = totals();
  body();
  const auto after = totals();
  count(after.first - before.first);
  count_wait(after.second - before.second);
}

}  // namespace tpk
