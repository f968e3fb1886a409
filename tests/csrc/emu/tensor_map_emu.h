// What the emulated cuTensorMapEncodeTiled writes, and the emulated hardware reads.
#pragma once

#include <cstdint>
#include <cstring>

namespace tpk::emu {

struct EmulatedMap {
  static constexpr uint64_t kMagic = 0x7465'6e73'6f72'6d61;

  uint64_t magic;
  const char* base;
  uint64_t rows, columns, row_stride;
  uint32_t box_rows, box_columns, value_bytes;

  static EmulatedMap of(const void* map) {
    EmulatedMap found;
    std::memcpy(&found, map, sizeof found);
    return found;
  }
  bool is_valid() const { return magic == kMagic; }
  size_t tile_bytes() const { return size_t{box_rows} * box_columns * value_bytes; }

  // action(of its first byte in global memory, row of the tile, its first byte in that row, bytes) for each row of a
  // tile that lies inside, in part or as a whole.
  template <class Action>
  void each_row_inside(int32_t column, int32_t row, Action action) const {
    const int64_t first = column < 0 ? 0 : column, all = static_cast<int64_t>(columns);
    const int64_t end = int64_t{column} + box_columns < all ? int64_t{column} + box_columns : all;
    for (uint32_t r = 0; r < box_rows && first < end; ++r) {
      const int64_t at = int64_t{row} + r;
      if (at < 0 || at >= static_cast<int64_t>(rows)) continue;
      action(base + static_cast<uint64_t>(at) * row_stride + static_cast<uint64_t>(first) * value_bytes, r,
             static_cast<size_t>(first - column) * value_bytes, static_cast<size_t>(end - first) * value_bytes);
    }
  }
};
static_assert(sizeof(EmulatedMap) <= 128, "a tensor map has 128 bytes");

}  // namespace tpk::emu
