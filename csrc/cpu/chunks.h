// In which chunks a GEMM between hosts is multiplied and sent. A rule of sizes alone, so that all ranks and all
// runs have the same chunks. Torch-free.
#pragma once

#include <vector>

#include "core/communicator.h"

namespace tpk {

// Messages below this have been sent before a thread has woken up.
constexpr size_t kSmallestForThread = size_t{64} << 10;

inline bool is_for_thread(const Communicator& comm, const Wire& wire, size_t n) {
  return comm.has_thread() && wire.bytes(n) >= kSmallestForThread;
}

// Where chunks of `rows` rows of `row_values` values end, in rows; one chunk where that is as fast. The first ones are
// smaller, because nothing is sent beside the product of the first and the second should be there when that has been
// sent; so are the last ones, because nothing is multiplied beside the bytes of the last.
std::vector<size_t> chunk_ends(const Communicator& comm, const Wire& wire, size_t rows, size_t row_values);

// The chunks of a product y[rows, columns] that the ranks sum: columns where those are as many as rows and of whole
// blocks of the codec, because each chunk reads the other factor again; else rows.
struct ChunkCut {
  bool of_columns;
  std::vector<size_t> ends;
};
ChunkCut chunks_of_sum(const Communicator& comm, const Wire& wire, size_t rows, size_t columns);

}  // namespace tpk
