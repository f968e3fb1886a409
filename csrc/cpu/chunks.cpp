#include "chunks.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace tpk {
namespace {

// A product of chunks of rows reads all weights for each. Of weights that the caches do not hold, 128 rows at a time
// cost 1.07 to 1.1 times all 512 at once, 64 rows 1.2 to 1.3 times (fp32 and bf16, one core of Zen 5, MKL and oneDNN).
constexpr size_t kRows = 128;
// More were not faster over 300 Mbit and 1 Gbit.
constexpr size_t kMostChunks = 16;
// Engines give every value the bits it has in the full product, but for the last rows of an odd number of them.
constexpr size_t kUnit = 16, kColumnUnit = 64;

// What a sum adds to its product on one core of Zen 4 (512 x 4096 values, links of 300 Mbit to 10 Gbit; the processor
// time of the thread of the group is 6.7 ms for codec none, 5.3 for fp16, 3.9 for int8). Of each byte sent, with one
// received; of each value that is packed, summed and unpacked; of each value whose product is cut, for slower products
// and the copy into place; of each chunk.
constexpr double kSecondsOfByte = 8e-10, kSecondsOfPacking = 1e-9, kSecondsOfCut = 1e-9, kSecondsOfChunk = 2.5e-4;
constexpr double kAssumedLink = 1.25e8;  // bytes a second where none was measured

// Rows multiplied apart read and pack all weights once more. Of each byte of them; fp32, 2,048 x 4,096 weights, MKL on
// one core of Intel with AMX: 512 rows take 51.9 ms, 256 27.7, 128 15.1, 64 9.4; oneDNN on Zen 5 0.5e-10, on Zen
// 4 1.9e-10.
constexpr double kSecondsOfWeightByte = 1e-10;
// Of the wire: a piece of a stream, before which nothing of it can be used.
constexpr size_t kStreamPiece = size_t{256} << 10;

// Seconds that the link needs for a message of wire.bytes(n), which passes `shares` times: 1 to gather or scatter n
// values, 2 to sum them.
double seconds_on_link(const Communicator& comm, const Wire& wire, size_t n, int shares) {
  const double link = comm.link_bytes_per_s > 0 ? comm.link_bytes_per_s : kAssumedLink;
  return static_cast<double>(wire.bytes(n)) * shares * comm.share_of_link() / link;
}

// What n values cost the core that multiplies; nothing hides it.
double seconds_of_work(const Communicator& comm, const Wire& wire, size_t n, int shares) {
  const double sent = static_cast<double>(wire.bytes(n)) * shares * comm.share_of_link();
  return sent * kSecondsOfByte + (wire.is_plain() ? 0 : static_cast<double>(n) * kSecondsOfPacking * shares / 2);
}

// Rows of the codec's blocks.
size_t unit_of(const Wire& wire, size_t row_values) {
  return std::lcm(kUnit, wire.block_values / std::gcd(wire.block_values, row_values));
}

// Of n values. In one chunk the link and the core work at once, on pieces of the message. Of several, the link hides
// all but the last one behind products, and the core none of its own work: it is the core that multiplies. The
// product's own time is left out, because it is the same in any number of chunks, and K may differ between ranks.
size_t num_chunks(const Communicator& comm, const Wire& wire, size_t n, int shares) {
  if (comm.forced_chunks > 0) return static_cast<size_t>(comm.forced_chunks);
  const double values = static_cast<double>(n);
  const double link = seconds_on_link(comm, wire, n, shares);
  const double work = seconds_of_work(comm, wire, n, shares);
  const size_t most = std::min(wire.bytes(n) / kSmallestForThread, kMostChunks);
  const size_t chunks = std::min(static_cast<size_t>(std::sqrt(link / kSecondsOfChunk)), most);
  if (chunks < 2) return 1;
  double of_chunks = static_cast<double>(chunks) * kSecondsOfChunk + link / static_cast<double>(chunks);
  if (comm.sums_in_one_exchange(wire, n, shares == 1)) of_chunks += (shares - 1) * comm.link_hop_s;
  return work + values * kSecondsOfCut + of_chunks < std::max(link, work) ? chunks : 1;
}

// Of chunk i of n, in quarters of a full one.
size_t weight(size_t i, size_t n) {
  if (n < 4) return 1;
  if (i < 2) return 2 + i;
  return i + 2 < n ? 4 : n - i;
}

// Ends of n chunks of `items` items, at multiples of `unit`.
template <class Weight>
std::vector<size_t> ends_of(size_t n, size_t items, size_t unit, Weight&& weight_of) {
  n = std::min(n, items / unit);
  size_t all = 0, before = 0;
  for (size_t i = 0; i < n; ++i) all += weight_of(i, n);
  std::vector<size_t> ends;
  for (size_t i = 0; i + 1 < n; ++i) {
    before += weight_of(i, n);
    const size_t end = before * (items / unit) / all * unit;
    if (end > (ends.empty() ? 0 : ends.back())) ends.push_back(end);
  }
  ends.push_back(items);
  return ends;
}

}  // namespace

std::vector<size_t> chunk_ends(const Communicator& comm, const Wire& wire, size_t rows, size_t row_values, int shares) {
  if (!may_cut(comm, wire) || rows == 0 || row_values == 0) return {rows};
  const size_t unit = unit_of(wire, row_values);
  size_t n = num_chunks(comm, wire, rows * row_values, shares);
  if (comm.forced_chunks == 0 && n > 1) n = std::min(n, rows / kRows + 2);
  if (comm.forced_chunks == 0 && rows < 2 * kRows) n = 1;
  return ends_of(n, rows, unit, weight);
}

std::vector<size_t> ends_of_gathered(const Communicator& comm, const Wire& wire, size_t rows, size_t row_values,
                                     double product, size_t weight_bytes) {
  const size_t part = Cut::even(rows, comm.world_size()).largest(), unit = unit_of(wire, row_values);
  const double ranks = comm.world_size(), near = static_cast<double>(comm.near_ranks().size()), far = ranks - near;
  const double link = seconds_on_link(comm, wire, rows * row_values, 1);
  const double work = seconds_of_work(comm, wire, rows * row_values, 1);
  const double of_row = product / static_cast<double>(rows) * far;
  const double of_chunk = kSecondsOfChunk + far * static_cast<double>(weight_bytes) * kSecondsOfWeightByte;
  const double row_on_link = link / static_cast<double>(part);
  std::vector<size_t> best;
  double least_time = std::max(link, work) + product;
  constexpr double kWorthIt = 0.03;  // of the product, that smaller chunks must save
  for (size_t least = part; least > 0; least = least / 2 / unit * unit) {
    if (least < part && wire.bytes(least * row_values) < kStreamPiece) break;
    std::vector<size_t> ends;
    double now = product * near / ranks + work;
    for (size_t done = 0; done < part; done = ends.back()) {
      const size_t arrived = static_cast<size_t>(std::min(now / row_on_link, static_cast<double>(part))) / unit * unit;
      size_t end = std::max(arrived, done + least);
      if (end + least > part) end = part;
      now = std::max(now, static_cast<double>(end) * row_on_link) + static_cast<double>(end - done) * of_row + of_chunk;
      ends.push_back(end);
    }
    if (now + kWorthIt * product < least_time) {
      least_time = now;
      best = ends;
    }
  }
  return best;
}

ChunkCut chunks_of_sum(const Communicator& comm, const Wire& wire, size_t rows, size_t columns, int shares) {
  if (rows == 0 || columns < rows || columns % wire.block_values != 0) {
    return {false, chunk_ends(comm, wire, rows, columns, shares)};
  }
  if (!may_cut(comm, wire)) return {true, {columns}};
  const size_t unit = std::lcm(kColumnUnit, wire.block_values);
  return {true,
          ends_of(num_chunks(comm, wire, rows * columns, shares), columns, unit, [](size_t, size_t) { return 1; })};
}

std::vector<Block> blocks_of_sum(const Communicator& comm, const Wire& wire, const ChunkCut& cut, size_t rows,
                                 size_t columns) {
  std::vector<Block> blocks;
  size_t start = 0;
  for (size_t end : cut.ends) {
    const size_t column = cut.of_columns ? start : 0, last_column = cut.of_columns ? end : columns;
    std::vector<size_t> row_ends{cut.of_columns ? rows : end};
    if (cut.of_columns && cut.ends.size() > 1 && (start == 0 || end == columns)) {
      const bool has_bytes = wire.bytes(rows * (end - start)) >= 4 * kSmallestForThread && rows >= 2 * kRows;
      const size_t n = comm.forced_chunks > 0 || has_bytes ? 3 : 1;
      // A half and two quarters, the small ones outside.
      row_ends = ends_of(n, rows, kUnit, [&](size_t i, size_t) { return i == (start == 0 ? n - 1 : 0) ? 2 : 1; });
    }
    size_t row = cut.of_columns ? 0 : start;
    for (size_t row_end : row_ends) {
      const size_t width = last_column - column, panel = column * rows;
      blocks.push_back({row, row_end, column, last_column, panel + row * width, panel + row_end * width});
      row = row_end;
    }
    start = end;
  }
  return blocks;
}

}  // namespace tpk
