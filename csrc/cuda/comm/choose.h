// The path of a call on a device: a pure function of numbers that are the same on all ranks, so that they choose alike.
// Torch-free.
//
// No threshold here has been measured by us: there was no machine with several GPUs. Each names its source.
// `Forced` is how a test, a bench or a tuner takes another way; all ranks of a group must force the same.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "core/codec/codec.h"
#include "core/types.h"
#include "cuda/kernels/peer_limits.h"
#include "cuda/kernels/tiles.h"

namespace tpk::cuda {

enum class Path : uint8_t { Rule, OneShot, TwoShot, Multicast, Fused };

inline const char* name_of(Path path) {
  constexpr const char* names[] = {"", "one_shot", "two_shot", "multicast", "fused"};
  return names[static_cast<size_t>(path)];
}

// What the ranks of a group have in common. multicast: the switch can sum and the group allows it, since the order of
// such a sum is the switch's. arch: 90 for compute capability 9.0. slot_bytes: 0 where ranks cannot read each other.
// sharing: ranks on one device. even_shards: what ranks have of a GEMM's own (choose_fused.h) is of one size.
struct Machine {
  int world_size;
  int multiprocessors;
  bool multicast;
  int arch = 0;
  size_t slot_bytes = 0;
  int sharing = 1;
  bool even_shards = false;
};

// Zero: the rule decides. Path fused is one of GEMMs, the others are of collectives: the rule decides the rest.
struct Forced {
  Path path = Path::Rule;
  int blocks = 0;  // of a collective; of a fused GEMM, those that sum or gather
  int parts = 0;
  int grid = 0;  // blocks of a fused GEMM in all: several ranks on one device must be resident at once
};

struct Choice {
  Path path;
  int blocks;
  const char* reason;
};

struct PartsChoice {
  int parts;  // of the rows; 1: unfused
  const char* reason;
};

// Two 16-byte loads for each of 512 threads. A guess.
constexpr size_t kBytesPerBlock = size_t{16} << 10;
// vLLM's custom all-reduce launches 36 of 512 threads: more contended for NVLink there. Not measured by us.
constexpr int kUsualBlocks = 36;
// Beside a product, which needs the multiprocessors: with 8 loads in flight for each of 512 threads, of a sum 4 to 7 of
// them to peers, 16 blocks have 0.5 to 1 MB on the way, 230 to 450 GB/s at 2.3 us. A model, not measured.
constexpr int kBlocksBeside = 16;
// One-shot moves (R - 1) n bytes a rank after one wait, two-shot 2 (R - 1) / R n after two: equal traffic for R = 2.
// The other limits are those of vLLM's custom all-reduce on NVLink. Not measured by us.
constexpr size_t kOneShotBytesUpTo4 = size_t{512} << 10;
constexpr size_t kOneShotBytesUpTo8 = size_t{256} << 10;
// Inputs of one_shot are read from heaps from so many bytes on. It saves copying them, 2 n bytes of memory traffic at 3
// TB/s, and costs a second wait of 2 to 3 us, since an input may change when the call is over. A model, not measured.
constexpr size_t kOneShotBytesInHeap = size_t{4} << 20;
// From some 8 MiB on NCCL moves more in its own way (sums in the switch); a group that should have that takes transport
// `group`. To change the way in the middle of a group both would have to be open.
// Through the switch each value is sent once each way, so that it should be faster wherever bandwidth counts. A guess.
constexpr size_t kMulticastBytes = size_t{128} << 10;
// A part must fill the device with output tiles of 128 rows and be sent in about the time of its product; each part
// costs two events and a launch. A guess.
constexpr int64_t kPartRows = 512;
constexpr size_t kPartBytes = size_t{4} << 20;
constexpr int kMostParts = 4;

// beside: while products run, that of them which is left over.
inline int choose_blocks(const Machine& machine, const Forced& forced, size_t wire_bytes, bool beside = false) {
  // Blocks that wait for each other must be resident together, a multiprocessor for each: what is asked for is no
  // exception. A kernel of 512 threads with 128 registers each fills one.
  if (forced.blocks > 0) return std::min({forced.blocks, kMaxBlocks, std::max(machine.multiprocessors, 1)});
  // Half of the device at most, so that a product beside it goes on.
  const int most = std::clamp(machine.multiprocessors / 2, 1, beside ? kBlocksBeside : kUsualBlocks);
  const size_t wanted = (wire_bytes + kBytesPerBlock - 1) / kBytesPerBlock;
  return static_cast<int>(std::clamp<size_t>(wanted, 1, static_cast<size_t>(most)));
}

// What products may take while something is sent beside them, 0: all. A kernel of cuBLAS takes every multiprocessor,
// and a persistent one keeps them: a transfer that begins later waits for its end, one that began earlier makes the
// product's last blocks wait for a whole wave.
inline int multiprocessors_beside(const Machine& machine, const Forced& forced) {
  const int blocks = choose_blocks(machine, forced, ~size_t{0} / 2, true);
  return machine.multiprocessors > 2 * blocks ? machine.multiprocessors - blocks : 0;
}

// What the switch can sum.
inline bool multicast_can(DType dtype, ReduceOp op, Codec codec) {
  return codec == Codec::None && op == ReduceOp::Sum &&
         (dtype == DType::F32 || dtype == DType::BF16 || dtype == DType::F16);
}

// wire_bytes: of one rank's whole message.
inline Choice choose_all_reduce(const Machine& machine, const Forced& forced, DType dtype, ReduceOp op, Codec codec,
                                size_t wire_bytes, bool beside = false) {
  const int blocks = choose_blocks(machine, forced, wire_bytes, beside);
  const bool multicast = machine.multicast && multicast_can(dtype, op, codec);
  if (forced.path == Path::Multicast && !multicast) {
    return {Path::TwoShot, blocks, "multicast was asked for, and the switch cannot sum this"};
  }
  if (forced.path != Path::Rule && forced.path != Path::Fused) return {forced.path, blocks, "as asked for"};
  if (multicast && wire_bytes >= kMulticastBytes) {
    return {Path::Multicast, blocks, "rule: the group allows in-switch sums, from 128 KiB on (not measured)"};
  }
  if (machine.world_size == 2) return {Path::OneShot, blocks, "rule: with 2 ranks the least traffic in one wait"};
  const bool up_to_four = machine.world_size <= 4;
  if (wire_bytes <= (up_to_four ? kOneShotBytesUpTo4 : kOneShotBytesUpTo8)) {
    return {Path::OneShot, blocks,
            up_to_four ? "rule: one wait up to 512 KiB with 3 or 4 ranks (not measured)"
                       : "rule: one wait up to 256 KiB with 5 to 8 ranks (not measured)"};
  }
  return {Path::TwoShot, blocks, "rule: the least traffic (limits not measured)"};
}

// How many parts the M rows of a GEMM are cut into, so that one is sent while the next is multiplied.
// row_bytes: of a row that is sent.
inline PartsChoice choose_parts(const Machine& machine, const Forced& forced, int64_t M, size_t row_bytes) {
  if (machine.world_size == 1) return {1, "one rank: nothing is sent"};
  if (forced.parts > 0) {
    return {static_cast<int>(std::clamp<int64_t>(M, 1, forced.parts)), "as asked for"};
  }
  const int64_t by_rows = M / kPartRows;
  const int64_t by_bytes = static_cast<int64_t>(static_cast<size_t>(M) * row_bytes / kPartBytes);
  const int64_t parts = std::min<int64_t>({by_rows, by_bytes, kMostParts});
  if (parts < 2) return {1, "rule: too few rows or bytes to overlap (512 rows and 4 MiB a part, not measured)"};
  return {static_cast<int>(parts), "rule: one part is sent while the next is multiplied (sizes not measured)"};
}

// Where part i of so many begins, at whole tiles where there are enough rows; part `parts` begins behind the last row.
// unit: rows that a codec's blocks keep together.
inline int64_t part_start(int64_t M, int parts, int i, int64_t unit = 1) {
  const int64_t whole_tile = (int64_t{kTileRows} + unit - 1) / unit * unit;
  const int64_t tile = M >= parts * whole_tile ? whole_tile : unit;
  const int64_t tiles = (M + tile - 1) / tile;
  return std::min(M, tiles * i / parts * tile);
}

}  // namespace tpk::cuda
