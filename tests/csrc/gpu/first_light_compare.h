// What first light expects, and how it says what is different. Without a device: also what --dry looks at.
#pragma once

#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "core/check.h"
#include "core/codec/half.h"
#include "ptx_tables.h"

namespace tpk::first_light {

constexpr uint32_t kRows = 64, kDepth = 64;  // of the tile of a product: rows of x, values of K of a stage

// "" where they are equal, else the first place where they are not.
template <class T, class Expected>
std::string difference(const char* what, const std::vector<T>& got, Expected expected) {
  for (size_t i = 0; i < got.size(); ++i) {
    const auto wanted = expected(i);
    if (got[i] != wanted) return concat(what, " ", i, " is ", +got[i], ", not ", +wanted);
  }
  return "";
}

// Of what threads wrote about themselves: 1 + the round, expected, got.
inline std::string wrong_round(const std::vector<uint32_t>& wrong) {
  for (size_t t = 0; t < wrong.size() / 3; ++t) {
    const uint32_t* one = &wrong[3 * t];
    if (one[0] == ~0u) return concat("thread ", t, " waited in vain");
    if (one[0] != 0) return concat("thread ", t, ", round ", one[0] - 1, ": got ", one[2], ", not ", one[1]);
  }
  return "";
}

// Two values as a pair has them. Of a NaN only that it is one: its bits are the instruction's own.
template <class T>
std::string pair_difference(const char* what, const std::vector<float>& values, const std::vector<uint32_t>& pairs) {
  for (size_t i = 0; i < values.size(); ++i) {
    for (size_t k = 0; k < 2; ++k) {
      const float value = values[k == 0 ? i : i ^ 1];
      const auto got = static_cast<T>(pairs[i] >> (16 * k) & 0xffff);
      if (std::isnan(value) ? !std::isnan(to_float(got)) : got != from_float<T>(value))
        return concat(what, " of ", value, " is ", to_float(got), ", not ", to_float(from_float<T>(value)));
    }
  }
  return "";
}

// ---- tiles and products ---------------------------------------------------------------------------------------------

// "" where a tile of a matrix lies in shared memory as the PTX ISA's table says, with zeros outside.
inline std::string tile_difference(const std::vector<uint16_t>& tile, const std::vector<uint16_t>& matrix, int32_t rows,
                                   int32_t columns, int32_t first_row, int32_t first_column) {
  for (int32_t r = 0; r < 128; ++r) {
    for (int32_t c = 0; c < 64; ++c) {
      const int32_t row = first_row + r, column = first_column + c;
      const bool inside = row >= 0 && row < rows && column >= 0 && column < columns;
      const uint16_t wanted = inside ? matrix[static_cast<size_t>(row * columns + column)] : 0;
      const uint32_t place = testing::swizzled_place(static_cast<uint32_t>(r), static_cast<uint32_t>(c));
      if (tile[place] != wanted)
        return concat("value ", c, " of row ", r, " of the tile at row ", first_row, ", column ", first_column, " is ",
                      tile[place], ", not ", wanted, " (word ", place / 8 % 8, " of its row)");
    }
  }
  return "";
}

// A tile that is stored at a place of a matrix of values of 2 bytes.
struct StoredTile {
  std::vector<uint16_t> image;   // as it is to lie in shared memory
  std::vector<uint32_t> places;  // of each value of the image in the matrix; ~0 outside
};
inline StoredTile stored_tile(int32_t rows, int32_t columns, int32_t first_row, int32_t first_column) {
  StoredTile made{std::vector<uint16_t>(128 * 64), std::vector<uint32_t>(128 * 64, ~0u)};
  for (uint32_t i = 0; i < 128 * 64; ++i) {
    const int32_t row = first_row + static_cast<int32_t>(i / 64), column = first_column + static_cast<int32_t>(i % 64);
    const uint32_t place = testing::swizzled_place(i / 64, i % 64);
    made.image[place] = static_cast<uint16_t>(i);
    if (row < rows && column < columns) made.places[place] = static_cast<uint32_t>(row * columns + column);
  }
  return made;
}

// "" where no other value of the matrix was stored over.
inline std::string stored_over(const StoredTile& tile, const std::vector<uint16_t>& matrix, uint16_t untouched) {
  std::vector<bool> may(matrix.size());
  for (uint32_t place : tile.places) {
    if (place != ~0u) may[place] = true;
  }
  for (size_t i = 0; i < matrix.size(); ++i) {
    if (!may[i] && matrix[i] != untouched) return concat("value ", i, " of the matrix was stored over: ", matrix[i]);
  }
  return "";
}

// x[rows, K] and w[N, K] in whole numbers, so that sums in fp32 are exact.
struct Factors {
  uint32_t rows, N, K;
  std::vector<double> x, w;

  std::vector<double> transposed_w() const {
    std::vector<double> made(w.size());
    for (uint32_t i = 0; i < w.size(); ++i) made[i % K * N + i / K] = w[i];
    return made;
  }
  double product(uint32_t row, uint32_t column) const {
    double sum = 0;
    for (uint32_t k = 0; k < K && row < rows; ++k) sum += x[row * K + k] * w[column * K + k];
    return sum;
  }
};

enum class Filled { WithColumns, WithDepths, AtRandom };

// WithColumns, WithDepths: x is one at k == row % K, so that y is a value of w, which says where it was.
inline Factors factors(Filled filled, uint32_t rows, uint32_t N, uint32_t K) {
  Factors made{rows, N, K, std::vector<double>(rows * K), std::vector<double>(N * K)};
  std::mt19937 random(7);
  const auto small = [&] { return static_cast<double>(random() % 9) - 4; };
  for (uint32_t i = 0; i < rows * K; ++i) made.x[i] = filled == Filled::AtRandom ? small() : i % K == i / K % K;
  for (uint32_t i = 0; i < N * K; ++i) {
    made.w[i] = filled == Filled::AtRandom ? small() : filled == Filled::WithColumns ? i / K : i % K % 256;
  }
  return made;
}

inline std::string product_difference(const char* what, const Factors& of, const std::vector<float>& y) {
  for (uint32_t i = 0; i < kRows * of.N; ++i) {
    const double wanted = of.product(i / of.N, i % of.N);
    if (y[i] != wanted)
      return concat(what, " [", of.rows, ", ", of.K, "] x [", of.N, ", ", of.K, "]: row ", i / of.N, ", column ",
                    i % of.N, " is ", y[i], ", not ", wanted);
  }
  return "";
}

// ---- without a device -----------------------------------------------------------------------------------------------

inline bool holds(bool condition, const char* what) {
  std::printf(condition ? "ok  dry: %s\n" : "E   dry: %s\n", what);
  return condition;
}

// Whether the comparisons find nothing in what is right, and the one value that is wrong.
inline bool run_dry() {
  bool all = true;
  for (uint32_t row = 0; row < 16; ++row) {
    for (uint32_t column = 0; column < 64; ++column) {
      const uint32_t byte = row * 128 + column * 2;
      all &= testing::swizzled_place(row, column) * 2 == (byte ^ (byte >> 3 & 0x70));
    }
  }
  for (uint32_t n = 0; n < 128; ++n) {  // of a transposed operand a row of the table is a value of K
    for (uint32_t k = 0; k < 64; ++k) {
      const uint32_t byte = n / 64 * 8192 + k * 128 + n % 64 * 2;
      all &= testing::transposed_place(n, k) * 2 == (byte ^ (byte >> 3 & 0x70));
    }
  }
  holds(all, "the tables of the swizzle are its formula");

  std::vector<uint16_t> matrix(200 * 136), tile(128 * 64);
  for (size_t i = 0; i < matrix.size(); ++i) matrix[i] = static_cast<uint16_t>(i + 1);
  for (uint32_t i = 0; i < 128 * 64; ++i) {
    tile[testing::swizzled_place(i / 64, i % 64)] = matrix[i / 64 * 136 + i % 64];
  }
  all &= holds(tile_difference(tile, matrix, 200, 136, 0, 0).empty(), "a tile that is right");
  tile[testing::swizzled_place(9, 17)] = 5;
  const std::string wrong_tile = tile_difference(tile, matrix, 200, 136, 0, 0);
  all &= holds(wrong_tile.find("value 17 of row 9") == 0, "a tile with a value that is wrong");

  const StoredTile stored = stored_tile(200, 136, 128, 128);
  std::vector<uint16_t> under(200 * 136, 7);
  for (uint32_t place : stored.places) {
    if (place != ~0u) under[place] = 0;
  }
  all &= holds(stored_over(stored, under, 7).empty(), "a tile that is stored where it should be");
  under[128 * 136 + 127] = 6;
  all &=
      holds(stored_over(stored, under, 7) == "value 17535 of the matrix was stored over: 6", "a tile stored beside it");

  const Factors of = factors(Filled::AtRandom, 50, 128, 328);
  std::vector<float> y(kRows * 128);
  for (uint32_t i = 0; i < y.size(); ++i) y[i] = static_cast<float>(of.product(i / 128, i % 128));
  all &= holds(product_difference("bf16", of, y).empty(), "a product that is right");
  y[5 * 128 + 6] += 1;
  all &= holds(product_difference("bf16", of, y).find("row 5, column 6") != std::string::npos,
               "a product with a value that is wrong");
  all &= holds(difference("word", std::vector<uint32_t>{0, 2, 3}, [](size_t i) { return i; }) == "word 1 is 2, not 1",
               "a word that is wrong");
  all &= holds(
      pair_difference<Half>("half", {1.0f, 2.5f}, {0x4100'3c00, 0x3c00'4101}) == "half of 2.5 is 2.50195, not 2.5",
      "a conversion that is wrong");
  all &= holds(wrong_round({0, 0, 0, 3, 10, 11}) == "thread 1, round 2: got 11, not 10", "a flag that came too early");
  all &= holds(wrong_round({0, 0, 0, ~0u, 0, 0}) == "thread 1 waited in vain", "a flag that never came");
  return all;
}

}  // namespace tpk::first_light
