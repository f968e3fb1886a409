// The fingerprint and the cut of a collective, from the shape of its tensor: one definition for the dispatcher and the
// fast path, because ranks that use different ones must agree. Torch-free.
#pragma once

#include "communicator.h"

namespace tpk {

// Both are of a tensor whose cut dimension `dim` has been brought to the front: rows x the rest.
struct CutCall {
  CallSpec spec;
  Cut cut;         // in values
  int64_t rows;    // of this rank's result
  size_t row = 1;  // values in one
};

inline size_t row_values(const int64_t* shape, size_t num_dims) {
  size_t row = 1;
  for (size_t i = 1; i < num_dims; ++i) row *= static_cast<size_t>(shape[i]);
  return row;
}

// Which tensor, as far as the ranks must agree: sizes, and the dimension that is cut.
inline uint32_t hash_with(const int64_t* sizes, size_t num_sizes, std::initializer_list<int64_t> more) {
  std::vector<int64_t> all(sizes, sizes + num_sizes);
  all.insert(all.end(), more);
  return hash_of(all.data(), all.size());
}

inline CutCall reduce_scatter_call(Op op, const Wire& wire, const int64_t* shape, size_t num_dims, int64_t dim,
                                   const Communicator& comm) {
  CutCall call{};
  call.row = row_values(shape, num_dims);
  const size_t rows = static_cast<size_t>(shape[0]);
  call.cut = Cut::even(rows, comm.world_size(), call.row);
  const size_t ranks = static_cast<size_t>(comm.world_size()), rank = static_cast<size_t>(comm.rank());
  call.rows = static_cast<int64_t>(rows / ranks + (rank < rows % ranks ? 1 : 0));
  call.spec = {op, wire.dtype, wire.op, wire.codec, rows * call.row, hash_with(shape, num_dims, {dim}), 0};
  return call;
}

// items: rows of dim that each rank brings.
inline CutCall all_gather_call(Op op, const Wire& wire, const int64_t* shape, size_t num_dims, int64_t dim,
                               const Cut& items) {
  CutCall call{};
  call.row = row_values(shape, num_dims);
  call.cut = items.times(call.row);
  call.rows = static_cast<int64_t>(items.total());
  call.spec = {op,
               wire.dtype,
               wire.op,
               wire.codec,
               call.cut.total(),
               hash_with(shape + 1, num_dims - 1, {call.rows, dim}),
               static_cast<int64_t>(static_cast<size_t>(shape[0]) * call.row)};
  return call;
}

}  // namespace tpk
