// The fused GEMMs over emulated ranks: products, sums, gathers, and that slots and flags can be used again and again.
#include "emu_fused.h"
#include "emu_steps.h"

using namespace tpk;
using namespace tpk::cuda;
using namespace tpk::testing;

namespace {

constexpr Fused kKinds[] = {Fused::ReduceScatter, Fused::AllReduce, Fused::Gather};
constexpr GroupOptions kRoomy = {.slot_bytes = size_t{1} << 20};

uint32_t up_to(uint32_t most, std::mt19937& random) { return static_cast<uint32_t>(random()) % (most + 1); }

Gemm random_gemm(int ranks, std::mt19937& random) {
  Gemm gemm{
      .kind = kKinds[up_to(2, random)], .rows = {}, .N = 8 * (1 + up_to(24, random)), .K = 8 * (1 + up_to(16, random))};
  // Parts of any size, some empty; 8 ranks of a quarter of the rows.
  const uint32_t most = ranks > 4 ? 40 : 160;
  for (int r = 0; r < ranks; ++r) gemm.rows.push_back(up_to(3, random) == 0 ? 0 : up_to(most, random));
  gemm.dtype = up_to(1, random) == 0 ? DType::BF16 : DType::F16;
  gemm.tile_columns = up_to(2, random) == 0 ? 256 : 128;
  gemm.grid = {1 + static_cast<int>(up_to(1, random)), 1 + static_cast<int>(up_to(2, random))};
  gemm.bias = up_to(1, random) == 0;
  gemm.integers = up_to(1, random) == 0;
  gemm.padding = 8 * up_to(2, random);
  gemm.transposed = up_to(1, random) == 0;
  gemm.piece_rows = up_to(3, random) == 0 ? 24 + up_to(60, random) : 0;
  gemm.seed = random();
  return gemm;
}

// Where every access is checked there are fewer shapes, and the plain variant checks the values.
bool looks_closely() {
#if defined(__SANITIZE_ADDRESS__)
  return true;
#else
  return emu::detects_races();
#endif
}

// What rank `from` has brought for the rows of rank `owner` in the call of this epoch.
Bytes brought(const EmulatedGroup& group, int from, int owner, uint32_t epoch, size_t bytes) {
  const char* const slot = group.peers(0).arena[owner] + slot_offset(group.peers(0), epoch);
  return Bytes(slot + static_cast<size_t>(from) * bytes, slot + (static_cast<size_t>(from) + 1) * bytes);
}

}  // namespace

CASE(products_are_right_whatever_the_shape) {
  std::mt19937 random(11);
  for (int ranks : {1, 2, 3, 4, 8}) {
    if (looks_closely() && ranks != 2) continue;
    for (uint64_t seed : {0, 1, 2}) {
      if (looks_closely() && seed != 1) continue;
      configure(ranks, seed);
      EmulatedGroup group(ranks, kRoomy);
      run_gemms(group, {random_gemm(ranks, random), random_gemm(ranks, random)});
      emu::reset();
    }
  }
}

// Every kind over two row blocks and two column blocks of each part, so that blocks of a rank share the work.
CASE(all_kinds_over_several_tiles_of_every_rank) {
  if (looks_closely()) return;
  for (Fused kind : kKinds) {
    for (uint64_t seed : {0, 3}) {
      configure(2, seed);
      EmulatedGroup group(2, kRoomy);
      Gemm gemm{.kind = kind, .rows = {140, 136}, .N = 264, .K = 136, .grid = {2, 3}, .bias = true};
      gemm.transposed = seed != 0, gemm.tile_columns = seed != 0 ? 256 : 128;
      run_gemms(group, {gemm});
      emu::reset();
    }
  }
}

// More than one slice of K, and more stages than the ring has.
CASE(a_long_k_is_gathered_slice_by_slice) {
  if (looks_closely()) return;
  configure(3, 2);
  EmulatedGroup group(3, kRoomy);
  const std::vector<uint32_t> rows = {8, 0, 17};
  run_gemms(group, {{.kind = Fused::Gather, .rows = rows, .N = 40, .K = 1096, .integers = false, .padding = 8},
                    {.kind = Fused::ReduceScatter, .rows = rows, .N = 40, .K = 584, .integers = false}});
  emu::reset();
}

// A w that lies transposed on one rank and as it is on the other.
CASE(both_layouts_of_w_are_multiplied_alike) {
  for (Fused kind : kKinds) {
    for (uint32_t tile_columns : {128u, 256u}) {
      if (looks_closely() && tile_columns == 128) continue;
      configure(2, 1);
      EmulatedGroup group(2, kRoomy);
      for (DType dtype : {DType::BF16, DType::F16}) {
        run_gemms(group, {{.kind = kind,
                           .dtype = dtype,
                           .rows = {7, 21},
                           .N = 200,
                           .K = 136,
                           .tile_columns = tile_columns,
                           .bias = true,
                           .integers = false,
                           .padding = 8,
                           .transposed = true}});
      }
      emu::reset();
    }
  }
}

// Flags of a gather belong to items, so that each rank may have tiles of its own.
CASE(ranks_gather_with_tiles_of_their_own) {
  for (uint64_t seed : {1, 2}) {
    if (looks_closely() && seed != 1) continue;
    configure(2, seed);
    EmulatedGroup group(2, kRoomy);
    const PreparedGemm gemm(group, {.kind = Fused::Gather, .rows = {40, 24}, .N = 264, .K = 72, .grid = {1, 2}});
    const auto launch = [&](int rank, cudaStream_t stream) {
      return gemm.launch_cut(rank, stream, 0, rank == 0 ? 128 : 256);
    };
    run_launches(group, {launch, launch}, "own tiles");
    gemm.check();
    emu::reset();
  }
}

// Calls of all kinds in a row, without a wait in between: slots, announcements and flags are used by each of them.
CASE(calls_of_all_kinds_follow_each_other) {
  for (uint64_t seed : {0, 1, 2}) {
    if (looks_closely() && seed != 1) continue;
    configure(3, seed);
    EmulatedGroup group(3, kRoomy);
    HeapPlan heap;
    std::vector<std::unique_ptr<PreparedStep>> plain;
    std::vector<std::unique_ptr<PreparedGemm>> fused;
    std::vector<tpk::testing::Launch> steps;
    const auto add_plain = [&](Kind kind) {
      plain.push_back(std::make_unique<PreparedStep>(
          group, Step{.kind = kind, .dtype = DType::F32, .n = 700, .blocks = 3, .seed = seed + plain.size()}, heap));
      steps.push_back([one = plain.back().get()](int rank, cudaStream_t stream) { return one->launch(rank, stream); });
    };
    const auto add_fused = [&](Fused kind, uint32_t piece_rows) {
      fused.push_back(std::make_unique<PreparedGemm>(group, Gemm{.kind = kind,
                                                                 .rows = {33, 9, 40},
                                                                 .N = 72,
                                                                 .K = 40,
                                                                 .piece_rows = piece_rows,
                                                                 .seed = seed * 16 + fused.size()}));
      steps.push_back([one = fused.back().get()](int rank, cudaStream_t stream) { return one->launch(rank, stream); });
    };
    for (int round = 0; round < (looks_closely() ? 1 : 2); ++round) {
      add_fused(Fused::AllReduce, 0), add_fused(Fused::AllReduce, 16), add_plain(Kind::TwoShot);
      add_fused(Fused::Gather, 0), add_fused(Fused::ReduceScatter, 0), add_plain(Kind::ReduceScatter);
      add_plain(Kind::AllGather), add_fused(Fused::Gather, 24), add_plain(Kind::OneShot);
      add_fused(Fused::ReduceScatter, 8);
    }
    run_launches(group, steps, "calls in a row");
    for (const auto& one : plain) one->check();
    for (const auto& one : fused) one->check();
    emu::reset();
  }
}

// The bits of the sum are those that reduce_scatter and two_shot make, under the same codec, of the products that are
// sent under none.
void check_sums(EmulatedGroup& group, const Gemm& gemm) {
  const int ranks = group.ranks();
  Gemm plain = gemm;
  plain.codec = Codec::None, plain.piece_rows = 0;
  const PreparedGemm products(group, plain);
  run_launches(group, {[&](int rank, cudaStream_t stream) { return products.launch(rank, stream); }}, "a reduction");
  const uint32_t epoch = group.signals(0).epoch;
  const size_t n = size_t{products.all_rows()} * gemm.N;
  DeviceCut cut{};
  std::vector<std::unique_ptr<DeviceBytes>> partial, part, whole;
  for (int r = 0; r < ranks; ++r) {
    cut.count[r] = uint64_t{gemm.rows[static_cast<size_t>(r)]} * gemm.N;
    cut.first[r] = r == 0 ? 0 : cut.first[r - 1] + cut.count[r - 1];
  }
  for (int r = 0; r < ranks; ++r) {
    Bytes product;
    for (int owner = 0; owner < ranks; ++owner) {
      const Bytes of_owner = brought(group, r, owner, epoch, cut.count[owner] * 2);
      product.insert(product.end(), of_owner.begin(), of_owner.end());
    }
    partial.push_back(std::make_unique<DeviceBytes>(r, product));
    part.push_back(std::make_unique<DeviceBytes>(r, Bytes(cut.count[r] * 2)));
    whole.push_back(std::make_unique<DeviceBytes>(r, Bytes(n * 2)));
  }
  Call call{};
  call.dtype = gemm.dtype, call.codec = gemm.codec, call.op = Op::ReduceScatter, call.numel = n;
  call.heap_offset = kNotInHeap;
  const auto reduce_scatter = [&](int rank, cudaStream_t stream) {
    const size_t r = static_cast<size_t>(rank);
    return launch_reduce_scatter(group.peers(rank), call, partial[r]->data(), part[r]->data(), cut, 2, stream);
  };
  const auto two_shot = [&](int rank, cudaStream_t stream) {
    const size_t r = static_cast<size_t>(rank);
    return launch_two_shot(group.peers(rank), call, partial[r]->data(), whole[r]->data(), n, 2, stream);
  };
  Gemm everywhere = gemm;
  everywhere.kind = Fused::AllReduce;
  const PreparedGemm scattered(group, gemm), reduced(group, everywhere);
  run_launches(group,
               {reduce_scatter, two_shot, [&](int rank, cudaStream_t stream) { return scattered.launch(rank, stream); },
                [&](int rank, cudaStream_t stream) { return reduced.launch(rank, stream); }},
               text_of(gemm));
  for (int r = 0; r < ranks; ++r) {
    std::string where;
    EXPECT(same_values(gemm.dtype, part[static_cast<size_t>(r)]->values(), scattered.output(r), &where), text_of(gemm),
           ": rank ", r, ", ", where);
    EXPECT(same_values(gemm.dtype, whole[static_cast<size_t>(r)]->values(), reduced.output(r), &where), text_of(gemm),
           ": rank ", r, ", all, ", where);
  }
  if (gemm.codec == Codec::None) scattered.check(), reduced.check();
}

CASE(the_sum_is_that_of_the_plain_collectives) {
  if (looks_closely()) return;
  configure(3, 1);
  EmulatedGroup group(3, kRoomy);
  for (DType dtype : {DType::BF16, DType::F16}) {
    check_sums(group, {.kind = Fused::ReduceScatter,
                       .dtype = dtype,
                       .rows = {20, 5, 33},
                       .N = 136,
                       .K = 72,
                       .bias = true,
                       .integers = false,
                       .seed = 5});
  }
  emu::reset();
}

// Values beyond what the exponents of a block keep, and a NaN; parts of several tiles, none, and a few rows.
CASE(a_codec_in_the_epilogue_has_the_bits_of_the_call_in_two_steps) {
  constexpr uint32_t widths[] = {0, 1024, 136, 288, 416};  // of fp16, bf16, int8, fp8
  const auto check = [](int ranks, Codec codec, DType dtype, uint64_t seed, uint32_t first_rows, uint32_t N) {
    configure(ranks, seed);
    EmulatedGroup group(ranks, {.slot_bytes = size_t{4} << 20});
    Gemm gemm{.kind = Fused::ReduceScatter,
              .dtype = dtype,
              .codec = codec,
              .rows = {first_rows},
              .N = N,
              .K = 24,
              .tile_columns = seed % 2 == 0 ? 128u : 256u,
              .grid = {1, 2},
              .bias = seed % 3 == 0,
              .integers = false,
              .decades = true,
              .piece_rows = seed % 4 == 0 ? 20u : 0u,
              .seed = seed};
    for (int r = 1; r < ranks; ++r) gemm.rows.push_back(r % 2 == 0 ? 0 : 17 + static_cast<uint32_t>(r));
    check_sums(group, gemm);
    emu::reset();
  };
  if (looks_closely()) {
    check(2, Codec::Fp16, DType::F16, 2, 5, 512);
    return check(2, Codec::Int8, DType::BF16, 1, 5, 160);
  }
  uint64_t seed = 0;
  for (int ranks : {1, 2, 3, 4, 8}) {
    for (size_t i = 0; i + 1 < static_cast<size_t>(Codec::Count); ++i) {
      for (DType dtype : {DType::BF16, DType::F16}) {
        const Codec codec = packing_codec(i);
        if (++seed % 3 == 0 && ranks > 2) continue;
        check(ranks, codec, dtype, seed, ranks > 2 ? 9 : 131, widths[static_cast<size_t>(codec)]);
      }
    }
  }
}

// x_whole has the values that the CPU packs and unpacks, the own rows, too, and what is multiplied are those.
CASE(rows_are_gathered_under_a_codec_as_all_ranks_unpack_them) {
  constexpr uint32_t depths[] = {0, 1024, 136, 544, 416};  // of fp16, bf16, int8, fp8
  const auto check = [](int ranks, const std::vector<Gemm>& gemms) {
    configure(ranks, gemms[0].seed);
    EmulatedGroup group(ranks, kRoomy);
    run_gemms(group, gemms);
    emu::reset();
  };
  uint64_t seed = 0;
  for (int ranks : {1, 2, 3, 8}) {
    if (looks_closely() && ranks != 2) continue;
    for (size_t i = 0; i + 1 < static_cast<size_t>(Codec::Count); ++i) {
      Gemm gemm{.kind = Fused::Gather,
                .dtype = ++seed % 2 == 0 ? DType::BF16 : DType::F16,
                .codec = packing_codec(i),
                .rows = {ranks == 2 && !looks_closely() ? 140u : 9u},
                .N = 40,
                .K = depths[static_cast<size_t>(packing_codec(i))],
                .bias = true,
                .integers = false,
                .piece_rows = seed % 3 == 0 ? 8u : 0u,
                .padding = 8,
                .seed = seed};
      if (looks_closely() && (gemm.codec == Codec::Bf16 || gemm.codec == Codec::Fp8)) continue;
      for (int r = 1; r < ranks; ++r) gemm.rows.push_back(r % 2 == 0 ? 0 : 17 + static_cast<uint32_t>(r));
      Gemm apart = gemm;
      apart.decades = true, apart.dtype = DType::BF16;
      check(ranks, {gemm, apart});
    }
  }
}

// Blocks that begin in the order of their numbers on a device that does not hold them all: a reduction comes to an end
// with one multiplying block at a time. A gather needs its grid, at any order.
CASE(a_device_that_holds_a_part_of_the_grid_comes_to_an_end) {
  if (looks_closely()) return;
  for (Fused kind : {Fused::ReduceScatter, Fused::AllReduce}) {
    for (int resident : {3, 4}) {
      configure(2, 0, resident);
      EmulatedGroup group(2, kRoomy);
      run_gemms(group, {{.kind = kind, .rows = {140, 30}, .N = 200, .K = 24, .grid = {2, 5}},
                        {.kind = kind, .rows = {10, 30}, .N = 40, .K = 24, .grid = {2, 5}}});
      emu::reset();
    }
  }
  for (Fused kind : kKinds) {
    configure(2, 4, 4);
    EmulatedGroup group(2, kRoomy);
    run_gemms(group, {{.kind = kind, .rows = {140, 30}, .N = 200, .K = 24, .grid = {1, 3}}});
    emu::reset();
  }
}

// Grids may differ: flags belong to tiles.
CASE(ranks_may_have_grids_of_their_own) {
  configure(3, 1);
  EmulatedGroup group(3, kRoomy);
  for (Fused kind : kKinds) {
    const PreparedGemm gemm(group, {.kind = kind, .rows = {70, 140, 8}, .N = 136, .K = 24});
    const auto launch = [&](int rank, cudaStream_t stream) {
      return gemm.launch(rank, stream, gemm.call(rank), FusedGrid{1 + rank % 2, 1 + rank});
    };
    run_launches(group, {launch}, "grids that differ");
    gemm.check();
  }
  emu::reset();
}

CASE(counters_wrap_around) {
  if (looks_closely()) return;
  configure(2, 1);
  EmulatedGroup group(2, kRoomy);
  for (uint32_t start : {0x7ffffffdu, 0xfffffffcu}) {
    for (int r = 0; r < 2; ++r) {
      group.signals(r).epoch = start;
      for (auto& half : group.signals(r).arrived) {
        for (auto& of_rank : half) {
          for (Announcement& announcement : of_rank) announcement.flag = start;
        }
      }
    }
    std::vector<Gemm> gemms;
    for (Fused kind : {Fused::AllReduce, Fused::Gather, Fused::ReduceScatter, Fused::AllReduce, Fused::Gather}) {
      gemms.push_back({.kind = kind, .rows = {5, 9}, .N = 16, .K = 16});
    }
    run_gemms(group, gemms);
    const uint32_t end = start + 5;
    EXPECT(group.signals(0).epoch == (end < start ? end + 2 : end));  // 0 and 1 are left out
  }
  emu::reset();
}
