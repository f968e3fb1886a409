// Fused GEMMs between hosts, in chunks of columns or rows: the thread of the group sends one chunk, or receives it,
// while the next one, or the one before, is multiplied. Bytes and bits are those of the product and the collective one
// after the other, as far as the engine gives a value the same bits in a product of any number of rows and columns.
#pragma once

#include <functional>

#include "chunks.h"
#include "gemm.h"

namespace tpk {

using Work = std::function<void()>;

// Whether every dimension before `dim` has one item, so that its items are whole rows of the matrix.
bool cuts_rows(const Tensor& x, int64_t dim);

// grad_input and grad_weight of gemm.h, as the work beside a collective.
Tensor grad_input_in_steps(Communicator& comm, const Tensor& dy, const Tensor& w);
Tensor grad_weight_in_steps(Communicator& comm, const Tensor& dy, const Tensor& x);

// --- of y = x @ w.T + bias; `meanwhile` runs after the last chunk of it
// The sum over the ranks.
Tensor all_reduce_product(Op op, Communicator& comm, const Wire& wire, const Tensor& x, const Tensor& w,
                          const OptionalTensor& bias, const ChunkCut& cut, const Work& meanwhile);
// This rank's rows of it.
Tensor reduce_scatter_product(Op op, Communicator& comm, const Wire& wire, const Tensor& x, const Tensor& w,
                              const OptionalTensor& bias, int64_t dim);

// The same of a product that is there.
Tensor reduce_scatter_beside(Op op, Communicator& comm, const Wire& wire, const Tensor& y, int64_t dim,
                             const Work& meanwhile);

struct GatheredProduct {
  Tensor x, y;  // x of all ranks; x @ w.T + bias
};
// The ends of its chunks (choose.h); none where the rows are not gathered in chunks, for example because the ranks
// exchange their sizes first.
std::vector<size_t> gathered_ends_of(const Communicator& comm, const Wire& wire, const Tensor& x_shard, const Tensor& w,
                                     int64_t dim, int64_t dim_size);
GatheredProduct product_of_gathered(Op op, Communicator& comm, const Wire& wire, const Tensor& x_shard, const Tensor& w,
                                    const OptionalTensor& bias, int64_t dim, int64_t dim_size,
                                    const std::vector<size_t>& ends);
// x of all ranks, gathered while `meanwhile` runs.
Tensor all_gather_beside(Op op, Communicator& comm, const Wire& wire, const Tensor& x_shard, int64_t dim,
                         int64_t dim_size, const Work& meanwhile);

}  // namespace tpk
