#include "chunks.h"

#include <algorithm>
#include <numeric>

namespace tpk {
namespace {

// A product reads all weights for each chunk. Of weights that the caches do not hold, 128 rows at a time cost 1.07 to
// 1.1 times all 512 at once, 64 rows 1.2 to 1.3 times (fp32 and bf16, one core of Zen 5, MKL and oneDNN).
constexpr size_t kRows = 128;
constexpr size_t kMostChunks = 18;
// Engines give every row the bits it has in a product of all rows, but for the last rows of an odd number of them.
constexpr size_t kUnit = 16;
constexpr size_t kColumnUnit = 64;

// Over a faster link product and collective in turn take less time: 43 ms against 66 in chunks at 10 Gbit, 105 against
// 75 at 1 Gbit (512x4096x2048 in fp32, one core of Zen 5).
constexpr double kFastLink = 2.5e8;

size_t num_chunks(const Communicator& comm, const Wire& wire, size_t rows, size_t row_values) {
  if (comm.forced_chunks > 0) return static_cast<size_t>(comm.forced_chunks);
  if (comm.link_bytes_per_s > kFastLink) return 1;
  const size_t by_rows = rows / kRows, by_bytes = wire.bytes(rows * row_values) / kSmallestForThread;
  const size_t whole = std::min({by_rows, by_bytes, kMostChunks - 2});
  return whole < 2 ? 1 : whole + 2;
}

// Of chunk i of n, in quarters of a full one.
size_t weight(size_t i, size_t n) {
  if (n < 4) return 1;
  if (i < 2) return 2 + i;
  return i + 2 < n ? 4 : n - i;
}

// Ends of n chunks of `items` items, at multiples of `unit`.
std::vector<size_t> ends_of(size_t n, size_t items, size_t unit) {
  n = std::min(n, items / unit);
  size_t all = 0, before = 0;
  for (size_t i = 0; i < n; ++i) all += weight(i, n);
  std::vector<size_t> ends;
  for (size_t i = 0; i + 1 < n; ++i) {
    before += weight(i, n);
    const size_t end = before * (items / unit) / all * unit;
    if (end > (ends.empty() ? 0 : ends.back())) ends.push_back(end);
  }
  ends.push_back(items);
  return ends;
}

}  // namespace

std::vector<size_t> chunk_ends(const Communicator& comm, const Wire& wire, size_t rows, size_t row_values) {
  if (!comm.has_thread() || rows == 0 || row_values == 0) return {rows};
  const size_t unit = std::lcm(kUnit, wire.block_values / std::gcd(wire.block_values, row_values));
  return ends_of(num_chunks(comm, wire, rows, row_values), rows, unit);
}

ChunkCut chunks_of_sum(const Communicator& comm, const Wire& wire, size_t rows, size_t columns) {
  if (rows == 0 || columns < rows || columns % wire.block_values != 0) {
    return {false, chunk_ends(comm, wire, rows, columns)};
  }
  if (!comm.has_thread()) return {true, {columns}};
  const size_t unit = std::lcm(kColumnUnit, wire.block_values);
  return {true, ends_of(num_chunks(comm, wire, columns, rows), columns, unit)};
}

}  // namespace tpk
