// How a fused GEMM is cut into tiles: every tile once, in an order that all ranks share, and launches that fit.
#include <algorithm>
#include <map>
#include <random>
#include <set>
#include <tuple>
#include <vector>

#include "cuda/kernels/tiles.h"
#include "expect.h"

using namespace tpk;
using namespace tpk::cuda;

namespace {

struct Shape {
  int ranks;
  RowCut cut;
  uint32_t N, tile_columns;
};

Shape random_shape(std::mt19937& random) {
  Shape shape{};
  shape.ranks = static_cast<int>(1 + random() % kMaxPeers);
  shape.tile_columns = random() % 2 == 0 ? 128 : 256;
  shape.N = 8 * (1 + static_cast<uint32_t>(random() % 150));
  const bool even = random() % 3 == 0;
  const uint32_t rows = static_cast<uint32_t>(random() % 2000);
  for (int r = 0; r < shape.ranks; ++r) {
    shape.cut.count[r] = even ? rows : random() % 4 == 0 ? 0 : static_cast<uint32_t>(random() % 2000);
  }
  return shape;
}

std::string text_of(const Shape& shape) {
  std::string text = concat(shape.ranks, " ranks, N ", shape.N, ", tiles of ", shape.tile_columns, ", rows");
  for (int r = 0; r < shape.ranks; ++r) text += concat(" ", shape.cut.count[r]);
  return text;
}

TileOrder order_of(const Shape& shape, bool gathers, int me) {
  return gathers ? TileOrder::of_gather(shape.cut, shape.ranks, me, shape.N, shape.tile_columns)
                 : TileOrder::of_reduction(shape.cut, shape.ranks, me, shape.N, shape.tile_columns);
}

std::vector<Tile> all_tiles(const Shape& shape, bool gathers, int me) {
  const TileOrder order = order_of(shape, gathers, me);
  std::vector<Tile> tiles;
  for (uint32_t i = 0; i < order.total(); ++i) tiles.push_back(gathers ? order.by_part(i) : order.interleaved(i));
  return tiles;
}

}  // namespace

CASE(every_tile_comes_once_and_its_number_says_where_it_lies) {
  std::mt19937 random(5);
  for (int i = 0; i < 100; ++i) {
    const Shape shape = random_shape(random);
    const bool gathers = i % 2 == 0;
    const int me = static_cast<int>(random() % static_cast<unsigned>(shape.ranks));
    const TileOrder order = order_of(shape, gathers, me);
    std::set<std::tuple<uint32_t, uint32_t, uint32_t>> places;
    std::set<std::pair<uint32_t, uint32_t>> numbers;
    for (const Tile& tile : all_tiles(shape, gathers, me)) {
      EXPECT(tile.owner < static_cast<uint32_t>(shape.ranks), text_of(shape));
      EXPECT(tile.row_block * kTileRows < shape.cut.count[tile.owner], text_of(shape));
      EXPECT(tile.column_block * shape.tile_columns < shape.N, text_of(shape));
      EXPECT(tile.number < order.tiles_of(tile.owner), text_of(shape));
      EXPECT(places.emplace(tile.owner, tile.row_block, tile.column_block).second, text_of(shape), ": a tile twice");
      EXPECT(numbers.emplace(tile.owner, tile.number).second, text_of(shape), ": a number twice");
      const Tile same = order.tile(tile.owner, tile.number);
      EXPECT(same.row_block == tile.row_block && same.column_block == tile.column_block, text_of(shape));
      EXPECT(order.number_beside(tile, 0) == tile.number, text_of(shape));
    }
    size_t expected = 0;
    for (int r = 0; r < shape.ranks; ++r) {
      expected += size_t{(shape.cut.count[r] + 127) / 128} * ((shape.N + shape.tile_columns - 1) / shape.tile_columns);
    }
    EXPECT(places.size() == expected && order.total() == expected, text_of(shape));
  }
}

CASE(wide_tiles_have_each_tile_of_a_part_once) {
  std::mt19937 random(15);
  for (int i = 0; i < 60; ++i) {
    Shape shape = random_shape(random);
    const uint32_t across = 512 / shape.tile_columns;
    shape.N = 512 * (1 + shape.N % 5);
    const TileOrder order = order_of(shape, false, 0);
    for (uint32_t owner = 0; owner < static_cast<uint32_t>(shape.ranks); ++owner) {
      std::set<uint32_t> numbers;
      for (uint32_t number = 0; number < order.tiles_of(owner) / across; ++number) {
        const Tile wide = order.wide_tile(owner, number, across);
        EXPECT(wide.owner == owner && wide.column_block % across == 0, text_of(shape));
        for (uint32_t k = 0; k < across; ++k) {
          const Tile tile = order.tile(owner, order.number_beside(wide, k));
          EXPECT(tile.row_block == wide.row_block && tile.column_block == wide.column_block + k, text_of(shape));
          numbers.insert(tile.number);
        }
      }
      EXPECT(numbers.size() == order.tiles_of(owner), text_of(shape));
    }
  }
}

// So that a part's tiles come to its owner from all ranks in one order: the one in which it takes them to sum.
CASE(all_ranks_work_on_the_tiles_of_a_part_in_the_order_of_their_numbers) {
  std::mt19937 random(6);
  for (int i = 0; i < 40; ++i) {
    const Shape shape = random_shape(random);
    for (int me = 0; me < shape.ranks; ++me) {
      std::map<uint32_t, uint32_t> next;
      for (const Tile& tile : all_tiles(shape, i % 2 == 0, me)) {
        EXPECT(tile.number == next[tile.owner]++, text_of(shape), " rank ", me, " part ", tile.owner);
      }
    }
  }
}

CASE(a_gather_begins_with_what_is_there_and_asks_each_rank_another) {
  std::mt19937 random(7);
  for (int i = 0; i < 40; ++i) {
    const Shape shape = random_shape(random);
    for (int me = 0; me < shape.ranks; ++me) {
      uint32_t last = 0;
      for (const Tile& tile : all_tiles(shape, true, me)) {
        const auto ranks = static_cast<uint32_t>(shape.ranks);
        const uint32_t distance = (tile.owner + ranks - static_cast<uint32_t>(me)) % ranks;
        EXPECT(distance >= last, text_of(shape));
        last = distance;
      }
    }
  }
}

// Column by column, each over the parts r + 1, r + 2, ..., r: after any number of tiles the even parts differ by no
// more than the row blocks of one column, and the own part is never ahead.
CASE(a_reduction_works_on_all_parts_evenly_and_on_its_own_last) {
  std::mt19937 random(8);
  for (int i = 0; i < 40; ++i) {
    Shape shape = random_shape(random);
    for (int r = 1; r < shape.ranks; ++r) shape.cut.count[r] = shape.cut.count[0];
    const auto ranks = static_cast<uint32_t>(shape.ranks);
    for (uint32_t me = 0; me < ranks; ++me) {
      std::vector<uint32_t> done(ranks, 0);
      for (const Tile& tile : all_tiles(shape, false, static_cast<int>(me))) {
        ++done[tile.owner];
        const auto [least, most] = std::minmax_element(done.begin(), done.end());
        EXPECT(*most - *least <= std::max(1u, kGroupRowBlocks / ranks), text_of(shape));
        EXPECT(done[me] == *least, text_of(shape), " rank ", me);
        EXPECT(done[(me + 1) % ranks] == *most, text_of(shape), " rank ", me);
      }
    }
  }
}

CASE(a_launch_of_as_many_rows_as_it_may_take_fits) {
  std::mt19937 random(9);
  for (int i = 0; i < 2000; ++i) {
    const size_t slot = size_t{16} * (1 + random() % (1 << (random() % 20)));
    const int ranks = static_cast<int>(1 + random() % kMaxPeers);
    const uint32_t width = 8 * (1 + static_cast<uint32_t>(random() % 4000));
    const uint32_t columns = random() % 2 == 0 ? 128 : 256;
    const uint32_t reduced = most_reduced_rows(slot, ranks, width, columns, Codec::None),
                   gathered = most_gathered_rows(slot, width, Codec::None);
    EXPECT(size_t{reduced} * width * 2 * static_cast<size_t>(ranks) <= slot);
    EXPECT(size_t{gathered} * width * 2 <= slot);
    EXPECT((reduced + 127) / 128 * ((width + columns - 1) / columns) <= kMaxTiles);
    EXPECT((gathered + 127) / 128 * ((width + kGatherColumns - 1) / kGatherColumns) <= kMaxTiles);
    EXPECT(reduced < 128 || reduced % 128 == 0), EXPECT(gathered < 128 || gathered % 128 == 0);
    // No row too few: one more block of rows, or one more row, would not fit.
    const uint32_t more = reduced < 128 ? reduced + 1 : reduced + 128;
    EXPECT(size_t{more} * width * 2 * static_cast<size_t>(ranks) > slot ||
           (more + 127) / 128 * ((width + columns - 1) / columns) > kMaxTiles);
  }
  EXPECT(most_reduced_rows(size_t{16} << 20, 8, 8192, 256, Codec::None) == 128);
  EXPECT(most_gathered_rows(size_t{16} << 20, 8192, Codec::None) == 1024);
  EXPECT(most_reduced_rows(4096, 8, 8192, 256, Codec::None) == 0, "not one row");
  EXPECT(most_reduced_rows(size_t{1} << 40, 1, 8 << 20, 128, Codec::None) == 0, "more columns than tiles have numbers");
  EXPECT(most_reduced_rows(4096, 2, 0, 128, Codec::None) == 0), EXPECT(most_gathered_rows(4096, 0, Codec::None) == 0);
}

CASE(pieces_are_alike_and_the_fewest) {
  EXPECT(even_rows(1000, 1024) == 1024 && even_rows(1000, 100) == 100 && even_rows(0, 256) == 256);
  EXPECT(even_rows(1025, 1024) == 640 && even_rows(8192, 1920) == 1664);
  for (uint64_t rows = 1; rows < 9000; rows += 37) {
    for (uint32_t most = 128; most <= 2048; most += 128) {
      const uint32_t each = even_rows(rows, most);
      EXPECT(each <= most && each % 128 == 0 && (rows + each - 1) / each == (rows + most - 1) / most, rows, " ", most);
    }
  }
}

// What a device of 132 multiprocessors, 116 of which multiply, leaves undone in its last waves.
CASE(waves_of_a_large_gemm_are_full) {
  constexpr size_t kSlot = size_t{64} << 20;
  for (uint32_t ranks : {2u, 4u, 8u}) {
    const uint32_t part = 8192 / ranks, columns = 8192 / 256;
    const uint32_t each = even_rows(part, most_reduced_rows(kSlot, static_cast<int>(ranks), 8192, 256, Codec::None));
    uint32_t waves = 0;
    for (uint32_t row = 0; row < part; row += each) {
      waves += divided_up(ranks * divided_up(std::min(each, part - row), kTileRows) * columns, 116);
    }
    const double used = 64.0 * columns / (waves * 116.0);
    EXPECT(used > 0.95, ranks, " ranks: ", used, " of ", waves, " waves");
  }
}

CASE(wide_tiles_are_taken_where_they_fill_the_device) {
  EXPECT(choose_tile_columns(8192, 4096, 116) == 256);
  EXPECT(choose_tile_columns(8192, 128, 4) == 128, "half of each tile would be waste");
  EXPECT(choose_tile_columns(512, 4096, 116) == 128, "64 wide tiles for 116 multiprocessors");
}
