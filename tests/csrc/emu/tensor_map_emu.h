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
  uint32_t box_rows, box_columns;

  static EmulatedMap of(const void* map) {
    EmulatedMap found;
    std::memcpy(&found, map, sizeof found);
    return found;
  }
  bool is_valid() const { return magic == kMagic; }
};
static_assert(sizeof(EmulatedMap) <= 128, "a tensor map has 128 bytes");

}  // namespace tpk::emu
