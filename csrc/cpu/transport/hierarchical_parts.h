// What the files of transport `hierarchical` share. Torch-free.
#pragma once

#include "hierarchical_transport.h"
#include "opening.h"

namespace tpk {

// What the ranks of a host have said, in rank order.
struct HierarchicalCommunicator::Said {
  std::vector<Opening> openings;
  bool agrees;     // whether they are of one call, so that the first call inside the host has brought its bytes
  bool is_packed;  // the input of any of them
  bool has_bytes() const { return agrees && !is_packed; }
};

// What all ranks have said, in rank order.
struct HierarchicalCommunicator::Opened {
  std::vector<CallSpec> specs;
  bool is_packed = false;  // the input of any rank
};

}  // namespace tpk
