// In which chunks a GEMM between hosts is multiplied and sent. A rule of sizes and of the link alone, both the same on
// all ranks, so that all ranks have the same chunks. Torch-free.
#pragma once

#include <vector>

#include "core/communicator.h"

namespace tpk {

// Messages below this have been sent before a thread has woken up.
constexpr size_t kSmallestForThread = size_t{64} << 10;

// Whether a thread of the group sends parts of a product while others are made. Not in fp64, where MKL gives values
// other bits in a part of the rows or columns than in the full product.
inline bool may_cut(const Communicator& comm, const Wire& wire) {
  return comm.has_thread() && wire.dtype != DType::F64;
}

inline bool is_for_thread(const Communicator& comm, const Wire& wire, size_t n) {
  return may_cut(comm, wire) && wire.bytes(n) >= kSmallestForThread;
}

// Where chunks of `rows` rows of `row_values` values end, in rows; one chunk where that is as fast. The first ones are
// smaller, because nothing is sent beside the product of the first and the second should be there when that has been
// sent; so are the last ones, because nothing is multiplied beside the bytes of the last.
std::vector<size_t> chunk_ends(const Communicator& comm, const Wire& wire, size_t rows, size_t row_values, int shares);

// Of x[rows, row_values] that is gathered and multiplied, in `product` seconds, by weights of so many bytes: where
// chunks of each far rank's rows end. Each takes what has arrived by then, a least number of rows at least; of such
// cuts the one that is expected to take the shortest time, none if that is to gather first.
std::vector<size_t> ends_of_gathered(const Communicator& comm, const Wire& wire, size_t rows, size_t row_values,
                                     double product, size_t weight_bytes);

// The chunks of a product y[rows, columns] that the ranks sum: panels of columns where those are as many as rows and of
// whole blocks of the codec, because each chunk reads the other factor again; else rows.
struct ChunkCut {
  bool of_columns;
  std::vector<size_t> ends;  // in columns or rows
};
ChunkCut chunks_of_sum(const Communicator& comm, const Wire& wire, size_t rows, size_t columns, int shares);

// A chunk of y. Panels of columns lie behind one another, each with its rows dense; there its values are [begin, end).
struct Block {
  size_t row, last_row, column, last_column, begin, end;
};
// Of an all_reduce: the first and the last panel are sent in blocks of rows, for the reasons above.
std::vector<Block> blocks_of_sum(const Communicator& comm, const Wire& wire, const ChunkCut& cut, size_t rows,
                                 size_t columns);

}  // namespace tpk
