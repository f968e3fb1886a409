#include "row_parts.h"

#include <numeric>

namespace tpk::cuda {
namespace {

// Products smaller than this are copied in less time than it takes to allocate them in the arena. Not measured.
constexpr size_t kSmallestInHeap = size_t{256} << 10;

}  // namespace

size_t rows_in_item(const Tensor& tokens) {
  size_t inner = 1;
  for (int64_t i = 1; i + 1 < tokens.dim(); ++i) inner *= static_cast<size_t>(tokens.size(i));
  return inner;
}

std::shared_ptr<DeviceCommunicator> device_communicator_of(Op op, const std::string& group, int64_t world_size) {
  return std::static_pointer_cast<DeviceCommunicator>(communicator_of(op, group, world_size));
}

int64_t unit_of(const Wire& wire, int64_t row_values) {
  const auto block = static_cast<int64_t>(wire.block_values);
  return row_values == 0 ? 1 : block / std::gcd(block, row_values);
}

// While a graph is captured the heap is left alone: a replay would write over what has been allocated there since.
Tensor product_for_peers(DeviceCommunicator& comm, const Wire& wire, const std::string& group, const Tensor& like,
                         const Shape& shape) {
  size_t bytes = like.element_size();
  for (int64_t size : shape) bytes *= static_cast<size_t>(size);
  const bool heap =
      wire.is_plain() && bytes >= kSmallestInHeap && bytes <= comm.heap_bytes() && capture_of(current_stream()) == 0;
  if (heap) {
    try {
      return kept(arena_empty(group, shape, like.scalar_type()));
    } catch (const std::invalid_argument&) {  // taken by tensors of group.empty; the copying way is right, too
    }
  }
  return empty_of(like, shape);
}

// A product is made for each rank's rows of a part, so those are what must be large enough.
RowParts::RowParts(const DeviceCommunicator& comm, const Wire& wire, const Cut& items, const Tensor& tokens,
                   int64_t row_values)
    : rows_(items.times(rows_in_item(tokens))),
      row_values_(row_values),
      unit_(unit_of(wire, row_values)),
      parts_(choose_parts(comm.machine(), comm.forced(), static_cast<int64_t>(rows_.size(comm.world_size() - 1)),
                          static_cast<size_t>(row_values) * tokens.element_size())
                 .parts) {}

Stretch RowParts::stretch(int part) const {
  Stretch found;
  for (int r = 0; r < ranks(); ++r) {
    found.begin.push_back(static_cast<size_t>(start(r, part) * row_values_));
    found.end.push_back(static_cast<size_t>(start(r, part + 1) * row_values_));
  }
  return found;
}

RowGather::RowGather(Op op, DeviceCommunicator& comm, const Wire& wire, const Tensor& shard, int64_t dim_size)
    : comm_(comm),
      wire_(wire),
      items_(Cut::even(static_cast<size_t>(dim_size), comm.world_size())),
      shard_(dense(shard)),
      whole_(shard_) {
  Shape shape = shape_of(shard_);
  call_ = all_gather_call(op, wire, shape.data(), shape.size(), 0, items_);
  shape[0] = dim_size;
  whole_ = fresh_output(shard_, shape);
  if (numel_of(shard_) < call_.cut.size(comm.rank())) {
    // The ranks will find out that this one brings too little; until then its part is copied as the cut has it.
    shape[0] = static_cast<int64_t>(items_.size(comm.rank()));
    shard_ = empty_of(shard_, shape);
  }
}

RowParts RowGather::parts() const { return {comm_, wire_, items_, whole_, whole_.size(whole_.dim() - 1)}; }

Cut RowGather::cut() const { return items_.times(rows_in_item(whole_)); }

void RowGather::send(const Stretch& stretch) const {
  comm_.send_all_gather(call_.spec, wire_, shard_.const_data_ptr(), whole_.mutable_data_ptr(), call_.cut, stretch);
}

}  // namespace tpk::cuda
