// What the two files of transport `hierarchical` share. Torch-free.
#pragma once

#include "hierarchical_transport.h"
#include "opening.h"

namespace tpk {

// What all ranks have sent to open a call, in rank order.
struct HierarchicalCommunicator::Opened {
  std::vector<char> records;
  size_t record_bytes;
  std::vector<CallSpec> specs;
  bool is_packed;  // the input of any rank

  const char* payload(int r) const { return records.data() + static_cast<size_t>(r) * record_bytes + Opening::kBytes; }
};

}  // namespace tpk
