// Ways to cut values over ranks. Torch-free.
#pragma once

#include <algorithm>

#include "communicator.h"

namespace tpk {

// n values; all parts but the last end at blocks of a codec.
inline Cut cut_at_blocks(size_t n, int world_size, size_t block) {
  Cut cut = Cut::even((n + block - 1) / block, world_size, block);
  for (size_t& start : cut.starts) start = std::min(start, n);
  return cut;
}

inline Cut cut_of(const std::vector<size_t>& sizes) {
  Cut cut{{0}};
  for (size_t size : sizes) cut.starts.push_back(cut.starts.back() + size);
  return cut;
}

}  // namespace tpk
