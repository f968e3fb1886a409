// The collectives on tensors, as the fused ops and the op table use them.
#pragma once

#include "backend.h"

namespace tpk {

ReduceOp reduce_op_of(const char* op, const std::string& name);
// The communicator of a group; world_size must be the group's.
std::shared_ptr<Communicator> communicator_of(Op op, const std::string& group, int64_t world_size);
// rank must be this process's place in the group.
void check_rank(const char* op, const Communicator&, int64_t rank);
const Wire& wire_for(Op op, const Tensor& x, const std::string& codec, ReduceOp reduce_op = ReduceOp::Sum);
CallSpec spec_of(Op op, const Wire& wire, size_t numel, const Shape& must_agree = {}, int64_t mine = 0);

// x must be contiguous; the result may be x itself.
void all_reduce_into(Op op, Communicator&, const Wire&, const Tensor& x, Tensor& out);
// This rank's rows (of dimension dim) of the sum over the ranks.
Tensor reduce_scatter_dim(Op op, Communicator&, const Wire&, const Tensor& x, int64_t dim);
// The shards of all ranks behind one another along dim; dim_size < 0: the ranks exchange their sizes.
Tensor all_gather_dim(Op op, Communicator&, const Wire&, const Tensor& x_shard, int64_t dim, int64_t dim_size);

// --- ops (schemas and formulas in schemas.cpp)
Tensor all_reduce(const Tensor& x, Text group, int64_t world_size, Text op, Text codec);
void all_reduce_(Tensor x, Text group, int64_t world_size, Text op, Text codec);
Tensor reduce_scatter(const Tensor& x, Text group, int64_t world_size, int64_t rank, int64_t dim, Text op, Text codec,
                      Text grad_codec);
Tensor all_gather(const Tensor& x_shard, Text group, int64_t world_size, int64_t rank, int64_t dim, int64_t dim_size,
                  Text codec, Text grad_codec);
Tensor arena_empty(Text group, std::vector<int64_t> shape, ScalarType dtype);
Tensor device_arena_empty(Text group, std::vector<int64_t> shape, ScalarType dtype, torch::stable::Device device);
std::vector<int64_t> exchange_sizes(Text group, int64_t mine);

}  // namespace tpk
