// How the rows of a fused GEMM are cut into parts, and what the parts send. Shared by its forward and its backward.
#pragma once

#include "core/specs.h"
#include "cuda/comm/device_communicator.h"
#include "gemm.h"
#include "torch_side/collectives.h"

namespace tpk::cuda {

std::shared_ptr<DeviceCommunicator> device_communicator_of(Op op, const std::string& group, int64_t world_size);

inline size_t row_bytes(const Tensor& rows) { return static_cast<size_t>(rows.size(1)) * rows.element_size(); }
inline char* data_of(const Tensor& x) { return static_cast<char*>(x.mutable_data_ptr()); }

// Rows of the matrix for each item of dimension 0.
size_t rows_in_item(const Tensor& tokens);

// Rows that no part may separate, because a block of the codec reaches over them.
int64_t unit_of(const Wire& wire, int64_t row_values);

// A product that peers will read: in the heap where it fits, else like any tensor.
Tensor product_for_peers(DeviceCommunicator& comm, const Wire& wire, const std::string& group, const Tensor& like,
                         const Shape& shape);

// The rows of all ranks, cut into parts: part i has the i-th stretch of every rank's rows.
class RowParts {
 public:
  // items: what each rank has of dimension 0 of `tokens`, whose rows have `row_values` values.
  RowParts(const DeviceCommunicator& comm, const Wire& wire, const Cut& items, const Tensor& tokens,
           int64_t row_values);

  int count() const { return parts_; }
  // The stretches of part i, in values.
  Stretch stretch(int part) const;
  // Calls body(start, count) for the rows of part i, those of neighbours as one.
  template <class Body>
  void each_range(int part, Body&& body) const {
    int64_t begin = 0, end = 0;
    for (int r = 0; r < ranks(); ++r) {
      const auto base = static_cast<int64_t>(rows_.start(r));
      const int64_t from = base + start(r, part), to = base + start(r, part + 1);
      if (from == to) continue;
      if (from != end) {
        if (end > begin) body(begin, end - begin);
        begin = from;
      }
      end = to;
    }
    if (end > begin) body(begin, end - begin);
  }

 private:
  int ranks() const { return static_cast<int>(rows_.starts.size()) - 1; }
  int64_t start(int rank, int part) const {
    return part_start(static_cast<int64_t>(rows_.size(rank)), parts_, part, unit_);
  }

  Cut rows_;
  int64_t row_values_;
  int64_t unit_;
  int parts_;
};

// A gather along dimension 0 that is sent in parts.
class RowGather {
 public:
  RowGather(Op op, DeviceCommunicator& comm, const Wire& wire, const Tensor& shard, int64_t dim_size);

  const Tensor& whole() const { return whole_; }
  Tensor rows() const { return as_rows(whole_); }
  RowParts parts() const;
  void send(const Stretch& stretch) const;
  void send_all() const { send(Stretch::all(call_.cut)); }
  // The same for what gathers in its own way: this rank's rows, and how those of all ranks are cut.
  Tensor mine() const { return as_rows(shard_); }
  Cut cut() const;
  const CallSpec& spec() const { return call_.spec; }

 private:
  DeviceCommunicator& comm_;
  const Wire& wire_;
  const Cut items_;
  Tensor shard_, whole_;
  CutCall call_;
};

}  // namespace tpk::cuda
