// What lies where in an arena: the memory of one rank that every rank of the group can reach. Torch-free.
//
//   [ Control | slot 0 | slot 1 | heap ]
//
// Control  signals of one rank: its call, the stages that are done, its state. Written by the owner, read by all.
// slots    messages are sent in pieces, numbered through all calls; piece g uses slot g % 2.
// heap     tensors of group.empty: a collective reads them where they are.
//
// Order    the owner stores data, then releases `call` or `stage`; a reader acquires it, then loads the data. The
//          counters only grow and are never reset. Slot g % 2 is free again when every rank has signalled piece g - 1,
//          because a rank signals it only after it has read what it needs of piece g - 2.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "types.h"

namespace tpk {

// The fingerprint of one call, beside its number. 64 bytes: one cache line carries both to the reader.
struct alignas(64) CallRecord {
  std::atomic<uint64_t> call;  // written last
  uint64_t numel;              // of the full tensor; must agree
  int64_t mine;                // a number of this rank (rows of its shard); need not agree
  uint64_t heap_offset;        // where its input lies in its heap, or kNotInHeap
  uint8_t op, dtype, reduce_op, codec;
  uint32_t shape_hash;  // of the dimensions that must agree
};
static_assert(sizeof(CallRecord) == 64, "one cache line");
static_assert(std::atomic<uint64_t>::is_always_lock_free && std::atomic<uint32_t>::is_always_lock_free,
              "a lock of one process does not order another one");

constexpr uint64_t kNotInHeap = ~uint64_t{0};

// Left: Failed, then closed.
enum class RankState : uint32_t { Open = 0, Closed = 1, Failed = 2, Left = 3 };

struct Control {
  CallRecord records[2];                       // of call e at [e % 2]
  alignas(64) std::atomic<uint64_t> stage;     // (call << kStageBits) + stages of this call that are done
  alignas(64) std::atomic<uint32_t> sleepers;  // ranks asleep on a word of this control
  alignas(64) std::atomic<uint32_t> state;     // RankState
  uint64_t failed_call;                        // when state is Failed or Left
  int32_t culprit;                             // the rank that was late or lost
  uint32_t was_late;                           // 1 when a deadline passed, 0 when a rank was lost
};

// The version of the protocol between ranks: layout of the arena, order of signals, fingerprints and openings of calls.
// It grows with every change of these; Group.open compares it.
constexpr int kArenaLayout = 3;
// Messages that each rank sums a part of are sent in pieces of this size, which stay in the second-level cache.
constexpr size_t kPieceBytes = size_t{512} << 10;

constexpr int kStageBits = 24;
constexpr size_t kControlBytes = 4096;
static_assert(sizeof(Control) <= kControlBytes, "the control fits into its page");

struct ArenaLayout {
  size_t arena_bytes;
  size_t slot_bytes;

  static constexpr size_t kPage = 4096;
  static constexpr size_t kMaxSlotBytes = size_t{1} << 20;
  static constexpr size_t kMinArenaBytes = size_t{256} << 10;

  // An eighth of the arena for each slot, 1 MiB at most: pieces larger than that fall out of the second-level cache.
  static ArenaLayout of(size_t arena_bytes) {
    size_t slot = arena_bytes / 8 / kPage * kPage;
    return {arena_bytes, slot < kMaxSlotBytes ? slot : kMaxSlotBytes};
  }
  size_t slot_offset(int which) const { return kControlBytes + static_cast<size_t>(which) * slot_bytes; }
  size_t heap_offset() const { return slot_offset(2); }
  size_t heap_bytes() const { return arena_bytes - heap_offset(); }
};

}  // namespace tpk
