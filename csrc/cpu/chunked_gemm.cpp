#include "chunked_gemm.h"

#include <algorithm>
#include <cstring>

#include "core/bytes.h"
#include "core/specs.h"
#include "cpu/choose.h"
#include "torch_side/collectives.h"

namespace tpk {
namespace {

Tensor rows_of(const Tensor& x, size_t begin, size_t end) {
  return torch::stable::narrow(const_cast<Tensor&>(x), 0, static_cast<int64_t>(begin),
                               static_cast<int64_t>(end - begin));
}

// Columns of a product of which one costs `flops`, for a part of about a millisecond, but of so many that packing the
// other factor for each part costs little (one core of Intel with AMX, fp32, MKL, all columns at once and 512, 256, 64
// at a time: 256 rows x 2,048 x 4,096 27.7, 27.4, 28.5, 35.3 ms; the gradient of w, 512 rows, 55.8, 58.6, 60.6, 80.8).
int64_t columns_of_step(int64_t num_columns, int64_t flops) {
  constexpr int64_t kStepFlops = int64_t{1} << 27, kLeast = 512, kUnit = 64;
  return std::min(std::max(kStepFlops / std::max<int64_t>(flops, 1) / kUnit * kUnit, kLeast), num_columns);
}

// Calls body(begin, size) for parts of the columns, and lets the thread of the group run in between.
template <class Body>
void in_steps(Communicator& comm, int64_t num_columns, int64_t flops, Body&& body) {
  const int64_t step = columns_of_step(num_columns, flops);
  for (int64_t begin = 0; begin < num_columns; begin += step) {
    if (begin > 0) comm.let_thread_run();
    body(begin, std::min(step, num_columns - begin));
  }
}

// y = x @ w.T + bias. Columns apart, weights are still read once, and every value has the bits of the full product.
void multiply_into(Communicator& comm, Engine engine, const Tensor& x, const Tensor& w, const OptionalTensor& bias,
                   const Tensor& y) {
  in_steps(comm, w.size(0), 2 * num_rows(x) * w.size(1), [&](int64_t begin, int64_t size) {
    const auto part = [&](const Tensor& of, int64_t dim) {
      return torch::stable::narrow(const_cast<Tensor&>(of), dim, begin, size);
    };
    copy_into(part(y, 1), product_by(engine, x, part(w, 0), bias.has_value() ? OptionalTensor(part(*bias, 0)) : bias));
  });
}

// A block of x @ w.T + bias, as a tensor of its own. The thread of the group runs between blocks alone: in steps of 64
// columns, each of which packs x again, calls took 1 to 4 % longer (512x4096x4096, fp32, oneDNN, one core of Zen 4).
Tensor multiply_block(Engine engine, const Tensor& x, const Tensor& w, const OptionalTensor& bias, const Block& block) {
  const auto columns = [&](const Tensor& of) { return rows_of(of, block.column, block.last_column); };
  return product_by(engine, rows_of(x, block.row, block.last_row), columns(w),
                    bias.has_value() ? OptionalTensor(columns(*bias)) : bias);
}

// Into rows of `num_columns` values, of which y is the first.
void copy_block(const void* values, void* y, const Block& block, size_t num_columns, size_t value_bytes) {
  const size_t width = (block.last_column - block.column) * value_bytes;
  for (size_t row = block.row; row < block.last_row; ++row) {
    std::memcpy(at(y, (row * num_columns + block.column) * value_bytes), at(values, (row - block.row) * width), width);
  }
}

// A tensor whose dimension `dim` is cut over the ranks, as rows of a matrix.
struct RowCut {
  Shape shape;        // with `dim` first
  size_t row_values;  // of the matrix
  Cut rows;

  RowCut(const Communicator& comm, Shape whole, int64_t dim) : shape(std::move(whole)) {
    const auto first = shape.begin() + dim;
    std::rotate(shape.begin(), first, first + 1);
    row_values = static_cast<size_t>(shape.back());
    size_t inner = 1;
    for (size_t i = 1; i + 1 < shape.size(); ++i) inner *= static_cast<size_t>(shape[i]);
    rows = Cut::even(static_cast<size_t>(shape[0]), comm.world_size(), inner);
  }
};

Shape with_items(Shape shape, int64_t dim, size_t items) {
  shape[static_cast<size_t>(dim)] = static_cast<int64_t>(items);
  return shape;
}

// The chunks of each rank's rows, those that take no way over the link in one chunk and last: their product takes the
// time in which the last rows of others arrive.
std::vector<Chunks::Chunk> chunks_of_parts(const Communicator& comm, const Wire& wire, const RowCut& cut) {
  std::vector<Chunks::Chunk> list;
  const std::vector<std::vector<int>> order = comm.parts_in_order();
  for (const std::vector<int>& parts : order) {
    std::vector<std::vector<size_t>> ends;  // of each part
    size_t most = 0;
    for (int part : parts) {
      const size_t rows = cut.rows.size(part);
      ends.push_back(&parts == &order.back() ? std::vector<size_t>{rows}
                                             : chunk_ends(comm, wire, rows, cut.row_values, 1));
      most = std::max(most, ends.back().size());
    }
    for (size_t i = 0; i < most; ++i) {
      for (size_t p = 0; p < parts.size(); ++p) {
        const size_t begin = i == 0 ? 0 : ends[p][std::min(i, ends[p].size()) - 1];
        const size_t end = ends[p][std::min(i, ends[p].size() - 1)];
        if (end > begin) list.push_back({begin * cut.row_values, end * cut.row_values, parts[p]});
      }
    }
  }
  return list;
}

// The same of panels of columns: of each the rows of every rank.
std::vector<Chunks::Chunk> chunks_of_panels(const Communicator& comm, const std::vector<size_t>& ends,
                                            const RowCut& cut) {
  std::vector<Chunks::Chunk> list;
  size_t begin = 0;
  for (size_t end : ends) {
    for (const std::vector<int>& parts : comm.parts_in_order()) {
      for (int part : parts) list.push_back({begin * cut.rows.size(part), end * cut.rows.size(part), part});
    }
    begin = end;
  }
  return list;
}

struct Scattered {
  RowCut cut;
  CutCall call;
  Tensor out;
  Scattered(Op op, const Communicator& comm, const Wire& wire, const Tensor& like, const Shape& whole, int64_t dim)
      : cut(comm, whole, dim),
        call(reduce_scatter_call(op, wire, cut.shape.data(), cut.shape.size(), dim, comm)),
        out(fresh_output(like, with_items(whole, dim, static_cast<size_t>(call.rows)))) {}
};

// make(begin, end): rows of the matrix.
Tensor reduce_scatter_rows(Op op, Communicator& comm, const Wire& wire, const Tensor& like, const Shape& whole,
                           int64_t dim, const std::function<void*(size_t begin, size_t end)>& make,
                           const Work& meanwhile) {
  Scattered to(op, comm, wire, like, whole, dim);
  Chunks chunks{chunks_of_parts(comm, wire, to.cut), {}};
  chunks.make = [&](size_t c) {
    const Chunks::Chunk& chunk = chunks.list[c];
    const size_t first = to.cut.rows.start(chunk.part);
    return make(first + chunk.begin / to.cut.row_values, first + chunk.end / to.cut.row_values);
  };
  comm.reduce_scatter_chunks(to.call.spec, wire, chunks, to.out.mutable_data_ptr(), to.call.cut, meanwhile);
  return to.out;
}

Tensor gather_rows(Op op, Communicator& comm, const Wire& wire, const Tensor& x_shard, int64_t dim, int64_t dim_size,
                   const std::vector<size_t>& ends, const Work& meanwhile, const std::function<void(size_t)>& use,
                   const Tensor& x) {
  Tensor shard = dense(x_shard), out = x;
  Shape shape = shape_of(shard);
  std::rotate(shape.begin(), shape.begin() + dim, shape.begin() + dim + 1);
  const Cut items = Cut::even(static_cast<size_t>(dim_size), comm.world_size());
  const CutCall call = all_gather_call(op, wire, shape.data(), shape.size(), dim, items);
  if (numel_of(shard) < call.cut.size(comm.rank())) {
    // The ranks will find out that this one brings too little; until then its part is copied as the cut has it.
    shard = empty_of(shard, with_items(shape, 0, items.size(comm.rank())));
  }
  comm.all_gather_chunks(call.spec, wire, shard.const_data_ptr(), out.mutable_data_ptr(), call.cut, ends, meanwhile,
                         use);
  return out;
}

}  // namespace

bool cuts_rows(const Tensor& x, int64_t dim) {
  for (int64_t d = 0; d < dim; ++d) {
    if (x.size(d) != 1) return false;
  }
  return true;
}

Tensor grad_input_in_steps(Communicator& comm, const Tensor& dy, const Tensor& w) {
  Shape shape = shape_of(dy);
  shape.back() = w.size(1);
  Tensor dx = fresh_output(dy, shape);
  const Tensor rows = as_rows(dy), weight = transpose(w);
  multiply_into(comm, engine_for(comm, rows, weight), rows, weight, {}, as_rows(dx));
  return dx;
}

Tensor grad_weight_in_steps(Communicator& comm, const Tensor& dy, const Tensor& x) {
  const Tensor rows = as_rows(dy), inputs = as_rows(x);
  Tensor dw = fresh_output(x, {rows.size(1), inputs.size(1)});
  in_steps(comm, rows.size(1), 2 * rows.size(0) * inputs.size(1), [&](int64_t begin, int64_t size) {
    const Tensor part = torch::stable::narrow(const_cast<Tensor&>(rows), 1, begin, size);
    const Tensor into = torch::stable::narrow(dw, 0, begin, size);
    call("aten::mm", "out", transpose(part), inputs, into);
  });
  return dw;
}

Tensor all_reduce_product(Op op, Communicator& comm, const Wire& wire, const Tensor& x, const Tensor& w,
                          const OptionalTensor& bias, const ChunkCut& cut, const Work& meanwhile) {
  Shape shape = shape_of(x);
  shape.back() = w.size(0);
  const Tensor rows = as_rows(x);
  const Engine engine = engine_for(comm, rows, w);
  const size_t num_columns = static_cast<size_t>(w.size(0)), num_rows_of_y = static_cast<size_t>(num_rows(x));
  const std::vector<Block> blocks = blocks_of_sum(comm, wire, cut, num_rows_of_y, num_columns);
  Tensor y = fresh_output(x, shape);
  const Tensor y_rows = as_rows(y);
  std::vector<Tensor> made;
  Chunks chunks;
  for (const Block& block : blocks) chunks.list.push_back({block.begin, block.end});
  chunks.make = [&](size_t c) {
    const Block& block = blocks[c];
    if (cut.of_columns) {
      made.push_back(multiply_block(engine, rows, w, bias, block));
    } else {
      made.push_back(rows_of(y_rows, block.row, block.last_row));
      multiply_into(comm, engine, rows_of(rows, block.row, block.last_row), w, bias, made.back());
    }
    return made.back().mutable_data_ptr();
  };
  if (cut.of_columns) {
    made.reserve(blocks.size());  // read by the thread of the group meanwhile
    chunks.use = [&](size_t c) {
      copy_block(made[c].const_data_ptr(), y.mutable_data_ptr(), blocks[c], num_columns, wire.value_bytes);
    };
  }
  comm.all_reduce_chunks(spec_of(op, wire, numel_of(y), shape), wire, chunks, meanwhile);
  return y;
}

Tensor reduce_scatter_product(Op op, Communicator& comm, const Wire& wire, const Tensor& x, const Tensor& w,
                              const OptionalTensor& bias, int64_t dim) {
  Shape shape = shape_of(x);
  shape.back() = w.size(0);
  const Tensor rows = as_rows(x);
  const Engine engine = engine_for(comm, rows, w);
  const size_t num_columns = static_cast<size_t>(w.size(0));
  const size_t num_rows_of_y = static_cast<size_t>(num_rows(x));
  const ChunkCut panels = chunks_of_sum(comm, wire, num_rows_of_y, num_columns, 1);
  if (!panels.of_columns) {
    const Tensor y = as_rows(fresh_output(x, shape));
    const auto make = [&](size_t begin, size_t end) {
      const Tensor part = rows_of(y, begin, end);
      multiply_into(comm, engine, rows_of(rows, begin, end), w, bias, part);
      return part.mutable_data_ptr();
    };
    return reduce_scatter_rows(op, comm, wire, x, shape, dim, make, [] {});
  }
  Scattered to(op, comm, wire, x, shape, dim);
  const size_t ranks = static_cast<size_t>(comm.world_size()), mine = to.cut.rows.size(comm.rank());
  const Tensor summed = fresh_output(x, {static_cast<int64_t>(mine), static_cast<int64_t>(num_columns)});
  std::vector<Tensor> made;
  Chunks chunks{chunks_of_panels(comm, panels.ends, to.cut), {}};
  const auto block_of = [&](size_t c, size_t row, size_t last_row) {
    const size_t i = c / ranks, begin = i == 0 ? 0 : panels.ends[i - 1];
    return Block{row, last_row, begin, panels.ends[i], chunks.list[c].begin, chunks.list[c].end};
  };
  chunks.make = [&](size_t c) -> void* {
    const size_t first = to.cut.rows.start(chunks.list[c].part), end = first + to.cut.rows.size(chunks.list[c].part);
    const bool is_last = c / ranks + 1 == panels.ends.size();  // whose other rows are under way beside this rank's
    if (is_last ? end > first : c % ranks == 0) {
      const Block block = is_last ? block_of(c, first, end) : block_of(c, 0, num_rows_of_y);
      made.push_back(multiply_block(engine, rows, w, bias, block));
    }
    const Block block = block_of(c, first, end);
    const size_t skipped = is_last ? 0 : first * (block.last_column - block.column);
    return at(made.back().mutable_data_ptr(), skipped * wire.value_bytes);
  };
  chunks.use = [&](size_t c) {
    copy_block(at(summed.const_data_ptr(), chunks.list[c].begin * wire.value_bytes), to.out.mutable_data_ptr(),
               block_of(c, 0, mine), num_columns, wire.value_bytes);
  };
  comm.reduce_scatter_chunks(to.call.spec, wire, chunks, summed.mutable_data_ptr(), to.call.cut, [] {});
  return to.out;
}

Tensor reduce_scatter_beside(Op op, Communicator& comm, const Wire& wire, const Tensor& y, int64_t dim,
                             const Work& meanwhile) {
  const Tensor whole = dense(y);
  const size_t row = static_cast<size_t>(y.size(y.dim() - 1)) * y.element_size();
  const auto make = [&](size_t begin, size_t) { return const_cast<char*>(at(whole.const_data_ptr(), begin * row)); };
  return reduce_scatter_rows(op, comm, wire, whole, shape_of(y), dim, make, meanwhile);
}

std::vector<size_t> gathered_ends_of(const Communicator& comm, const Wire& wire, const Tensor& x_shard, const Tensor& w,
                                     int64_t dim, int64_t dim_size) {
  const int64_t items = x_shard.size(dim);
  if (dim_size < 0 || items == 0 || !cuts_rows(x_shard, dim)) return {};
  return gathered_ends(comm, wire, {wire.dtype, num_rows(x_shard) / items * dim_size, w.size(0), w.size(1)});
}

GatheredProduct product_of_gathered(Op op, Communicator& comm, const Wire& wire, const Tensor& x_shard, const Tensor& w,
                                    const OptionalTensor& bias, int64_t dim, int64_t dim_size,
                                    const std::vector<size_t>& ends) {
  const Shape x_shape = with_items(shape_of(x_shard), dim, static_cast<size_t>(dim_size));
  Shape y_shape = x_shape;
  y_shape.back() = w.size(0);
  Tensor x = fresh_output(x_shard, x_shape), y = fresh_output(x_shard, y_shape);
  const Tensor rows = as_rows(x), y_rows = as_rows(y);
  const Engine engine = engine_for(comm, rows, w);
  const RowCut cut(comm, x_shape, dim);
  const Tensor weights = engine == Engine::OneDnn ? dense(w) : w;  // columns of a transposed one would be packed anew
  // Rows [begin, end) of the parts of these ranks; what lies together is multiplied together.
  const auto multiply = [&](const std::vector<int>& ranks, size_t begin, size_t end) {
    for (size_t i = 0; i < ranks.size();) {
      const size_t first = cut.rows.start(ranks[i]) + std::min(begin, cut.rows.size(ranks[i]));
      size_t last = first;
      for (; i < ranks.size() && cut.rows.start(ranks[i]) + std::min(begin, cut.rows.size(ranks[i])) == last; ++i) {
        last = cut.rows.start(ranks[i]) + std::min(end, cut.rows.size(ranks[i]));
      }
      if (first == last) continue;
      multiply_into(comm, engine, rows_of(rows, first, last), weights, bias, rows_of(y_rows, first, last));
    }
  };
  const std::vector<int> near = comm.near_ranks();
  std::vector<int> far;
  for (int r = 0; r < comm.world_size(); ++r) {
    if (std::find(near.begin(), near.end(), r) == near.end()) far.push_back(r);
  }
  std::vector<size_t> value_ends;
  for (size_t end : ends) value_ends.push_back(end * cut.row_values);
  const auto use = [&](size_t i) { multiply(far, i == 0 ? 0 : ends[i - 1], ends[i]); };
  const auto multiply_near = [&] { multiply(near, 0, cut.rows.largest()); };
  gather_rows(op, comm, wire, x_shard, dim, dim_size, value_ends, multiply_near, use, x);
  return {x, y};
}

Tensor all_gather_beside(Op op, Communicator& comm, const Wire& wire, const Tensor& x_shard, int64_t dim,
                         int64_t dim_size, const Work& meanwhile) {
  const Tensor x = fresh_output(x_shard, with_items(shape_of(x_shard), dim, static_cast<size_t>(dim_size)));
  return gather_rows(op, comm, wire, x_shard, dim, dim_size, {}, meanwhile, [](size_t) {}, x);
}

}  // namespace tpk
