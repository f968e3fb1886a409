// Layouts as the PTX ISA draws them, as tables and not as formulas: what the formulas of kernels and of the emulator
// are held against. Torch-free.
#pragma once

#include <cstdint>

namespace tpk::testing {

// The swizzle of 128 bytes (PTX ISA, tensor copies, swizzling modes): where the eight 16-byte words of each row lie, of
// eight rows of 128 bytes that begin at a multiple of 1024. The ninth row is as the first.
constexpr uint8_t kSwizzle128[8][8] = {
    {0, 1, 2, 3, 4, 5, 6, 7}, {1, 0, 3, 2, 5, 4, 7, 6}, {2, 3, 0, 1, 6, 7, 4, 5}, {3, 2, 1, 0, 7, 6, 5, 4},
    {4, 5, 6, 7, 0, 1, 2, 3}, {5, 4, 7, 6, 1, 0, 3, 2}, {6, 7, 4, 5, 2, 3, 0, 1}, {7, 6, 5, 4, 3, 2, 1, 0},
};

// Of the place of value `column` of row `row` in a tile of 64 columns of 2 bytes: its number.
constexpr uint32_t swizzled_place(uint32_t row, uint32_t column) {
  return row * 64 + uint32_t{kSwizzle128[row % 8][column / 8]} * 8 + column % 8;
}

// The same of value `k` of K of row `row` of a transposed operand, in tiles of 64 rows and 64 values of K: the
// canonical layout ((8, 8, m), (8, k)) : ((1, 8, LBO), (64, SBO)) of values of 2 bytes (PTX ISA, shared memory matrix
// layout, MN-major, 128-byte swizzle), LBO 4096 and SBO 512 values.
constexpr uint32_t transposed_place(uint32_t row, uint32_t k) {
  return row / 64 * 4096 + k / 8 * 512 + k % 8 * 64 + uint32_t{kSwizzle128[k % 8][row / 8 % 8]} * 8 + row % 8;
}

}  // namespace tpk::testing
