// How a fused GEMM is cut into tiles, in which order they are worked on, and how many rows a launch takes. Pure
// functions of numbers that are the same on all ranks, for host and device; torch-free.
//
// A tile is kTileRows x tile_columns of y and never crosses from one rank's part to the next. The tiles of a part are
// numbered in groups of some row blocks by all columns, column by column inside a group: tiles that are worked on at
// the same time then share rows of x and of w in the second-level cache.
//
//   order of a reduction   group by group, each over the parts of all ranks at once, so that tiles of all parts, and
//                          what is sent to all ranks, come evenly; rank r begins with part r + 1, its own last.
//   order of a gather      part by part: the own one, which is there, then those of r + 1, r + 2, ...
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/codec/codec.h"
#include "peer_limits.h"

namespace tpk::cuda {

constexpr uint32_t kTileRows = 128;
constexpr uint32_t kTileDepth = 64;       // values of K that one stage of the main loop holds
constexpr uint32_t kGatherColumns = 512;  // values of K of an item of a gather, which has kTileRows rows
constexpr uint32_t kGroupRowBlocks = 8;   // that share the columns of w, over all parts that are worked on at once

// How the rows of one launch are cut over the ranks: those of rank r begin at first[r] of the whole tensor.
struct RowCut {
  uint32_t first[kMaxPeers];
  uint32_t count[kMaxPeers];
  uint32_t brings[kMaxPeers];  // all_gather_gemm: what every rank must announce as Call::brings; 0 elsewhere
};

TPK_HOST_DEVICE constexpr uint32_t divided_up(uint32_t a, uint32_t b) { return (a + b - 1) / b; }
TPK_HOST_DEVICE constexpr uint32_t smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }

// A tile of y: whose rows, which of that rank's tiles, and where in that rank's part.
struct Tile {
  uint32_t owner, number;
  uint32_t row_block, column_block;
};

// Numbers of the tiles (or of a gather's items) of a part with so many row blocks.
struct TileNumbers {
  uint32_t columns;     // column blocks
  uint32_t group_rows;  // row blocks of a group

  TPK_HOST_DEVICE constexpr Tile tile(uint32_t owner, uint32_t row_blocks, uint32_t number) const {
    const uint32_t group = number / (group_rows * columns), within = number % (group_rows * columns);
    const uint32_t height = smaller(group_rows, row_blocks - group * group_rows);
    return {owner, number, group * group_rows + within % height, within / height};
  }
  TPK_HOST_DEVICE constexpr uint32_t number(uint32_t row_blocks, uint32_t row_block, uint32_t column_block) const {
    const uint32_t before = row_block / group_rows * group_rows, height = smaller(group_rows, row_blocks - before);
    return before * columns + column_block * height + row_block - before;
  }
};

class TileOrder {
 public:
  // For rank `me` of `ranks`.
  TPK_HOST_DEVICE static TileOrder of_reduction(const RowCut& cut, int ranks, int me, uint32_t N, uint32_t columns) {
    const uint32_t all = static_cast<uint32_t>(ranks);
    return TileOrder(cut, all, me, divided_up(N, columns), all < kGroupRowBlocks ? kGroupRowBlocks / all : 1);
  }
  TPK_HOST_DEVICE static TileOrder of_gather(const RowCut& cut, int ranks, int me, uint32_t N, uint32_t columns) {
    return TileOrder(cut, static_cast<uint32_t>(ranks), me, divided_up(N, columns), kGroupRowBlocks);
  }

  TPK_HOST_DEVICE uint32_t row_blocks(uint32_t owner) const { return divided_up(cut_->count[owner], kTileRows); }
  TPK_HOST_DEVICE uint32_t tiles_of(uint32_t owner) const { return row_blocks(owner) * numbers_.columns; }
  TPK_HOST_DEVICE uint32_t total() const { return total_; }
  TPK_HOST_DEVICE Tile tile(uint32_t owner, uint32_t number) const {
    return numbers_.tile(owner, row_blocks(owner), number);
  }
  // Tiles of a part taken `across` at a time, side by side: the first of those in place `number`, and the number of the
  // one so many to the right of a tile.
  TPK_HOST_DEVICE Tile wide_tile(uint32_t owner, uint32_t number, uint32_t across) const {
    const TileNumbers wide{numbers_.columns / across, numbers_.group_rows};
    Tile tile = wide.tile(owner, row_blocks(owner), number);
    tile.column_block *= across;
    return tile;
  }
  TPK_HOST_DEVICE uint32_t number_beside(const Tile& tile, uint32_t to_the_right) const {
    return numbers_.number(row_blocks(tile.owner), tile.row_block, tile.column_block + to_the_right);
  }

  // Tile i of total() of a reduction.
  TPK_HOST_DEVICE Tile interleaved(uint32_t i) const {
    // Groups that all parts have whole are all alike; the others are searched.
    const uint32_t of_whole = ranks_ * numbers_.group_rows * numbers_.columns;
    uint32_t group = smaller(i / of_whole, whole_groups_), rows = ranks_ * numbers_.group_rows;
    i -= group * of_whole;
    if (group == whole_groups_) {
      for (rows = rows_of(group); i >= rows * numbers_.columns; rows = rows_of(group)) {
        i -= rows * numbers_.columns;
        ++group;
      }
    }
    const uint32_t column = i / rows;
    uint32_t row = i % rows, owner = next_of(me_);
    while (row >= height(owner, group)) row -= height(owner, group), owner = next_of(owner);
    const uint32_t before = group * numbers_.group_rows;
    return {owner, before * numbers_.columns + column * height(owner, group) + row, before + row, column};
  }

  // Tile i of total() of a gather.
  TPK_HOST_DEVICE Tile by_part(uint32_t i) const {
    uint32_t owner = me_;
    while (i >= tiles_of(owner)) i -= tiles_of(owner), owner = next_of(owner);
    return tile(owner, i);
  }

 private:
  TPK_HOST_DEVICE TileOrder(const RowCut& cut, uint32_t ranks, int me, uint32_t columns, uint32_t group_rows)
      : cut_(&cut), ranks_(ranks), me_(static_cast<uint32_t>(me)), numbers_{columns, group_rows} {
    whole_groups_ = ~uint32_t{0};
    for (uint32_t r = 0; r < ranks; ++r) {
      whole_groups_ = smaller(whole_groups_, row_blocks(r) / group_rows);
      total_ += tiles_of(r);
    }
  }

  TPK_HOST_DEVICE uint32_t next_of(uint32_t owner) const { return owner + 1 == ranks_ ? 0 : owner + 1; }
  // Row blocks of a part in a group, and of all parts.
  TPK_HOST_DEVICE uint32_t height(uint32_t owner, uint32_t group) const {
    const uint32_t before = group * numbers_.group_rows, blocks = row_blocks(owner);
    return blocks <= before ? 0 : smaller(numbers_.group_rows, blocks - before);
  }
  TPK_HOST_DEVICE uint32_t rows_of(uint32_t group) const {
    uint32_t rows = 0;
    for (uint32_t r = 0; r < ranks_; ++r) rows += height(r, group);
    return rows;
  }

  const RowCut* cut_;
  uint32_t ranks_, me_;
  TileNumbers numbers_;
  uint32_t whole_groups_, total_ = 0;
};

// ---- what is sent of a row of N values (of a gather K) (coded_tiles.cuh)
// ---------------------------------------------------

struct NoCodec : BlockLayout<uint16_t, NoScale, kCodecBlockValues, 0> {};

template <class C>
struct SentRow {
  // Payloads of a byte are packed by the sender, and scales lie behind the payloads of all rows; others are sent as
  // values of 2 bytes.
  static constexpr bool kPacked = sizeof(typename C::Payload) == 1;
  // A scale is of one row: N is a multiple of this.
  static constexpr uint32_t kUnit = C::kScaled ? static_cast<uint32_t>(C::kScaleValues) : 8;

  TPK_HOST_DEVICE static constexpr size_t scale_bytes(uint32_t N) {  // each row's begin at a multiple of 16
    return kPacked ? (N / kUnit * sizeof(typename C::Scale) + 15) / 16 * 16 : 0;
  }
  TPK_HOST_DEVICE static constexpr size_t bytes(uint32_t N) { return size_t{N} * (kPacked ? 1 : 2) + scale_bytes(N); }
};

// action(C{}) of the codec.
template <class Action>
constexpr auto with_sent_row(Codec codec, Action action) {
  switch (codec) {
#define TPK_CODEC_CASE(name, id, type) \
  case Codec::id: return action(type{});
    TPK_CODECS(TPK_CODEC_CASE)
#undef TPK_CODEC_CASE
    default: return action(NoCodec{});
  }
}
constexpr size_t sent_row_bytes(Codec codec, uint32_t N) {
  return with_sent_row(codec, [=](auto c) { return SentRow<decltype(c)>::bytes(N); });
}
constexpr bool is_sent_packed(Codec codec) {
  return with_sent_row(codec, [](auto c) { return SentRow<decltype(c)>::kPacked; });
}
constexpr uint32_t sent_unit(Codec codec) {
  return with_sent_row(codec, [](auto c) { return SentRow<decltype(c)>::kUnit; });
}

// ---- how many rows of each rank's part one launch takes; 0: not even one fits, and the call must go another way
// ------

namespace tiles {

// Whole tiles where that many fit.
constexpr uint32_t rounded_rows(size_t fit, uint32_t columns) {
  const size_t most = static_cast<size_t>(kMaxTiles) / columns * kTileRows;
  const size_t rows = fit < most ? fit : most;
  return static_cast<uint32_t>(rows >= kTileRows ? rows / kTileRows * kTileRows : rows);
}

}  // namespace tiles

// gemm_reduce_scatter, gemm_all_reduce: the slot of a rank holds its rows from every rank.
constexpr uint32_t most_reduced_rows(size_t slot_bytes, int ranks, uint32_t N, uint32_t tile_columns, Codec codec) {
  if (N == 0) return 0;
  const size_t row = static_cast<size_t>(ranks) * sent_row_bytes(codec, N);
  return tiles::rounded_rows(slot_bytes / row, divided_up(N, tile_columns));
}
// all_gather_gemm: the slot of a rank holds its own rows.
constexpr uint32_t most_gathered_rows(size_t slot_bytes, uint32_t K, Codec codec) {
  return K == 0 ? 0 : tiles::rounded_rows(slot_bytes / sent_row_bytes(codec, K), divided_up(K, kGatherColumns));
}

// Rows of each of the fewest pieces that `rows` need, all alike: a short last one would leave most of a device idle.
constexpr uint32_t even_rows(uint64_t rows, uint32_t most) {
  if (most < kTileRows || rows <= most) return most;
  const uint64_t pieces = (rows + most - 1) / most, each = (rows + pieces - 1) / pieces;
  return static_cast<uint32_t>((each + kTileRows - 1) / kTileRows * kTileRows);
}

// Columns of a tile: 256 are faster (each value of x that is loaded is used twice as often) but where half of them
// would be wasted, or where there are fewer tiles than multiprocessors. A guess, not measured.
constexpr uint32_t choose_tile_columns(uint64_t rows, uint32_t N, int multiplying) {
  const uint64_t wide = (rows + kTileRows - 1) / kTileRows * divided_up(N, 256);
  const bool wastes_half = N % 256 != 0 && N % 256 <= 128 && N < 1024;
  return wastes_half || wide < static_cast<uint64_t>(multiplying) ? 128 : 256;
}

}  // namespace tpk::cuda
