// The chooser of the CUDA backend: pure functions, tested without a device.
#include "cuda/comm/choose.h"

#include <set>

#include "expect.h"

using namespace tpk;
using namespace tpk::cuda;

namespace {

constexpr Machine kFour{4, 132, false}, kEight{8, 132, false}, kSwitch{8, 132, true};

Choice sum_of(const Machine& machine, size_t bytes, const Forced& forced = {}) {
  return choose_all_reduce(machine, forced, DType::BF16, ReduceOp::Sum, Codec::None, bytes);
}

}  // namespace

CASE(two_ranks_always_take_one_wait) {
  for (size_t bytes = 1; bytes < size_t{1} << 30; bytes *= 2) {
    EXPECT(sum_of({2, 132, false}, bytes).path == Path::OneShot, bytes);
  }
}

CASE(small_messages_take_one_wait_and_large_ones_the_least_traffic) {
  for (const Machine& machine : {kFour, kEight}) {
    const size_t limit = machine.world_size == 4 ? kOneShotBytesUpTo4 : kOneShotBytesUpTo8;
    EXPECT(sum_of(machine, 0).path == Path::OneShot);
    EXPECT(sum_of(machine, limit).path == Path::OneShot, machine.world_size);
    EXPECT(sum_of(machine, limit + 1).path == Path::TwoShot, machine.world_size);
  }
}

CASE(the_switch_sums_only_what_it_can_and_only_where_the_group_allows_it) {
  EXPECT(sum_of(kSwitch, kMulticastBytes).path == Path::Multicast);
  EXPECT(sum_of(kEight, kMulticastBytes).path != Path::Multicast);
  EXPECT(sum_of(kSwitch, kMulticastBytes - 1).path == Path::OneShot);
  const size_t large = size_t{64} << 20;
  const auto path_of = [&](DType dtype, ReduceOp op, Codec codec) {
    return choose_all_reduce(kSwitch, {}, dtype, op, codec, large).path;
  };
  EXPECT(path_of(DType::F64, ReduceOp::Sum, Codec::None) == Path::TwoShot);
  EXPECT(path_of(DType::I32, ReduceOp::Sum, Codec::None) == Path::TwoShot);
  EXPECT(path_of(DType::BF16, ReduceOp::Max, Codec::None) == Path::TwoShot);
  EXPECT(path_of(DType::BF16, ReduceOp::Avg, Codec::None) == Path::TwoShot);
  EXPECT(path_of(DType::F32, ReduceOp::Sum, Codec::Fp16) == Path::TwoShot);
  EXPECT(path_of(DType::F32, ReduceOp::Sum, Codec::None) == Path::Multicast);
}

CASE(what_is_asked_for_is_taken_unless_it_cannot_be) {
  Forced forced;
  forced.path = Path::TwoShot;
  forced.blocks = 3;
  EXPECT(sum_of(kEight, 16, forced).path == Path::TwoShot);
  EXPECT(sum_of(kEight, 16, forced).blocks == 3);
  forced.path = Path::Multicast;
  EXPECT(sum_of(kEight, 16, forced).path == Path::TwoShot, "no switch");
  EXPECT(sum_of(kSwitch, 16, forced).path == Path::Multicast);
  forced.blocks = 1000;
  EXPECT(sum_of(kEight, 16, forced).blocks == kMaxBlocks, "the signals have room for no more");
}

CASE(blocks_grow_with_the_message_and_leave_half_of_the_device) {
  for (int multiprocessors : {1, 2, 8, 132, 500}) {
    const Machine machine{8, multiprocessors, false};
    int before = 0;
    for (size_t bytes = 0; bytes < size_t{1} << 30; bytes = bytes * 2 + 1) {
      const int blocks = choose_blocks(machine, {}, bytes);
      EXPECT(blocks >= 1 && blocks <= kMaxBlocks && blocks <= std::max(1, multiprocessors / 2), bytes);
      EXPECT(blocks >= before, bytes);
      before = blocks;
    }
  }
  EXPECT(choose_blocks(kEight, {}, size_t{1} << 30) == kUsualBlocks);
}

CASE(blocks_that_are_asked_for_are_resident_too) {
  Forced forced;
  forced.blocks = 16;
  EXPECT(choose_blocks({8, 114 / 8, false}, forced, 0) == 14, "eight ranks that share a GPU of 114 multiprocessors");
  EXPECT(choose_blocks({8, 1, false}, forced, 0) == 1);
  EXPECT(choose_blocks(kEight, forced, 0) == 16);
}

CASE(transfers_beside_products_leave_them_most_of_the_device) {
  for (int multiprocessors : {1, 2, 16, 64, 114, 132}) {
    const Machine machine{8, multiprocessors, false};
    const int blocks = choose_blocks(machine, {}, size_t{1} << 30, true), left = multiprocessors_beside(machine, {});
    EXPECT(blocks <= kBlocksBeside && blocks <= std::max(multiprocessors / 2, 1));
    EXPECT(left == 0 || (left + blocks == multiprocessors && left > blocks), multiprocessors, " ", left);
  }
  EXPECT(multiprocessors_beside(kEight, {}) == 132 - kBlocksBeside);
  EXPECT(multiprocessors_beside({8, 2, false}, {}) == 0, "nothing to divide");
}

CASE(few_rows_or_few_bytes_are_not_cut) {
  const size_t row = 8192 * 2;
  EXPECT(choose_parts(kEight, {}, 1, row).parts == 1);
  EXPECT(choose_parts(kEight, {}, 1023, row).parts == 1);
  EXPECT(choose_parts(kEight, {}, 1024, row).parts == 2);
  EXPECT(choose_parts(kEight, {}, 1 << 20, row).parts == kMostParts);
  EXPECT(choose_parts(kEight, {}, 4096, 2).parts == 1, "a narrow output");
  EXPECT(choose_parts({1, 132, false}, {}, 1 << 20, row).parts == 1, "one rank");
  EXPECT(choose_parts(kEight, {}, 0, row).parts == 1);
  Forced forced;
  forced.parts = 7;
  EXPECT(choose_parts(kEight, forced, 100, 2).parts == 7);
  EXPECT(choose_parts(kEight, forced, 3, 2).parts == 3, "no part without a row");
  EXPECT(choose_parts(kEight, forced, 0, 2).parts == 1);
}

CASE(parts_cover_all_rows_once_and_begin_at_tiles) {
  for (int64_t M : {0, 1, 2, 3, 127, 128, 129, 1000, 4096, 5000}) {
    for (int parts = 1; parts <= 8 && parts <= std::max<int64_t>(M, 1); ++parts) {
      EXPECT(part_start(M, parts, 0) == 0 && part_start(M, parts, parts) == M, M, " ", parts);
      for (int i = 0; i < parts; ++i) {
        const int64_t start = part_start(M, parts, i), end = part_start(M, parts, i + 1);
        EXPECT(start < end || M == 0, M, " ", parts, " ", i);
        if (M >= parts * kTileRows) EXPECT(start % kTileRows == 0, M, " ", parts, " ", i);
      }
    }
  }
}

CASE(parts_keep_the_blocks_of_a_codec_together) {
  for (int64_t unit : {2, 3, 64, 512}) {
    for (int64_t M : {1, 100, 1000, 5000}) {
      for (int parts = 1; parts <= 4; ++parts) {
        for (int i = 0; i < parts; ++i) {
          const int64_t start = part_start(M, parts, i, unit), end = part_start(M, parts, i + 1, unit);
          EXPECT(start <= end && (start % unit == 0 || start == M), M, " ", parts, " ", unit);
        }
        EXPECT(part_start(M, parts, parts, unit) == M, M);
      }
    }
  }
}

CASE(every_choice_gives_a_reason) {
  std::set<std::string> reasons;
  for (size_t bytes : {size_t{64}, size_t{1} << 20}) {
    for (const Machine& machine : {Machine{2, 132, false}, kFour, kEight, kSwitch}) {
      reasons.insert(sum_of(machine, bytes).reason);
    }
  }
  EXPECT(reasons.size() == 5 && reasons.count("") == 0, reasons.size());
}
