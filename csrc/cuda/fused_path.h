// Path fused on tensors: operands as its kernels take them, and the calls. gemm_times.h decides when.
#pragma once

#include "row_parts.h"

namespace tpk::cuda {

// M: rows of y over all ranks; shared: N of a reduction, K of a gather; own: its K, or N, on this rank. wants_w: of a
// backward, the gradient of w, too; the same on all ranks.
bool takes_fused(const DeviceCommunicator& comm, Op op, const Wire& wire, int64_t M, int64_t shared, int64_t own,
                 bool wants_w = false);

// y = this rank's rows (gemm_reduce_scatter), or all, of the sum over the ranks of x[M, K] @ w[N, K].T, plus the bias
// of rank 0. rows: how those of the sum are cut. w is read as it lies, row by row or column by column.
void reduce_fused(DeviceCommunicator& comm, const CallSpec& spec, const Tensor& x, const Tensor& w,
                  const OptionalTensor& bias, const Cut& rows, const Tensor& y);

// y[M, N] = x @ w[N, K].T (+ bias) for the rows of all ranks, which x_whole[M, K] takes, too.
void gather_fused(DeviceCommunicator& comm, const CallSpec& spec, const Tensor& x_shard, const Tensor& x_whole,
                  const Tensor& w, const OptionalTensor& bias, const Cut& rows, const Tensor& y);

}  // namespace tpk::cuda
