// The protocol of a call over peer memory: announcements, waits, and the state after a failure.
//
// A kernel over peers is a Turn, the same on every rank:
//
//   Turn turn(peers, call, Kernel::TwoShot);
//   if (turn.bring(copy_in)) {              // announce, wait for all, compare: inputs can be read from the slots
//     ...                                   // sum
//     if (turn.step(kDone)) ...             // all have summed: read the sums
//   }
//   turn.end();
//
// Needs    R <= 8 ranks; the same launches in the same order, on one stream, on all ranks; grids that are resident as a
//          whole, on all ranks at once. Block b waits for the blocks b of the other ranks alone, so block b may read
//          from a peer only what block b there has written.
// Order    what a block wrote is released with its flags (store_release_sys after a barrier of the block), and acquired
//          by the blocks that poll them (load_acquire_sys before a barrier). Call e uses slot e % 2 and arrived[e % 2],
//          which are free again in call e + 2: a kernel ends only after it has received all announcements of e + 1, and
//          a rank announces e + 1 only after its kernel e has ended, and with it all reads of e.
// Flags    a rank finds flags of e or of calls before e, never of a call after: whoever announces e + 1 has ended e,
// and
//          for a step in e + 1 it needs this rank's announcement of e + 1. Hence a wait compares for equality (a wait
//          for kCopied also ends at kDone): a flag that a block raised long ago could be taken for a new one only after
//          exactly 2^30 calls in which no block had that number. Epochs wrap around without 0, with which the signals
//          begin.
// Heaps    an input that lies in a heap may be changed when the kernel has ended: a kernel that reads heaps takes one
//          step (kDone) after the last read.
// Refusal  every block compares all announcements with its own; all ranks get the same verdict. Then no data is read,
//          nothing is written to outputs, the call counts as done, and the host finds a record. The later pieces of a
//          refused call return at once: ranks that disagree about its size launch different numbers of them.
// Waits    end at a deadline: the first block whose wait fails records the missing ranks and traps; the group is lost.
// Traffic  32 bytes from each block to each rank, and 4 for each step.
//
// Kernels that exchange flags tile by tile have the same turn with other flags: tile_turn.cuh.
#pragma once

#include "cuda/kernels/device.cuh"
#include "kernels.h"
#include "vector.cuh"

namespace tpk::cuda {

// Flags of a block to the blocks of the same number, after its announcement: 4 * epoch + one of these, which is never
// the zero that the signals begin with.
constexpr uint32_t kCopied = 1;  // an input that cannot be read from its heap has been copied into the slot
constexpr uint32_t kDone = 2;    // sums can be read; inputs have been read

class Turn {
 public:
  // Reads the epoch. `expected`: the `brings` that rank threadIdx.x must announce.
  __device__ __forceinline__ Turn(const Peers& peers, const Call& call, Kernel kernel, uint32_t expected = 0)
      : Turn(peers, call, plan_of(kernel, gridDim.x, blockDim.x), blockIdx.x, expected) {}
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;

  __device__ __forceinline__ int rank() const { return peers_.rank; }
  __device__ __forceinline__ int world_size() const { return peers_.world_size; }
  __device__ __forceinline__ char* slot(int r) const { return peers_.arena[r] + slot_offset(peers_, epoch_); }
  __device__ __forceinline__ char* multicast_slot() const { return peers_.multicast + slot_offset(peers_, epoch_); }

  // Makes this rank's input readable and waits until all inputs are: copy_in() puts this block's part of it into
  // slot(rank()). True when the ranks agree.
  template <class CopyIn>
  __device__ __forceinline__ bool bring(CopyIn copy_in) {
    if (outcome_ == Outcome::Skipped) return false;
    copy_in();
    announce(kNoUnits);
    return await_announcements();
  }

  // The same for an input that may lie in this rank's heap, at `heap_units`, or else kNoUnits: when all do, nothing is
  // copied; when some do, those ranks copy, and all ranks wait for them.
  template <class CopyIn>
  __device__ __forceinline__ bool bring_or_leave(uint32_t heap_units, CopyIn copy_in) {
    if (outcome_ == Outcome::Skipped) return false;
    const bool in_heap = heap_units != kNoUnits;
#pragma unroll 1
    for (int time = 0; time < 2; ++time) {  // a loop, so that copy_in() is there only once
      const bool is_second = time == 1;
      if (in_heap == is_second) copy_in();
      if (is_second) break;
      announce(heap_units);
      if (!await_announcements()) return false;
      const int in_heaps = count_heaps();
      reads_heaps_ = in_heaps == peers_.world_size;
      if (in_heaps == 0 || reads_heaps_) return true;
    }
    return step(kCopied);
  }

  // After bring_or_leave: whether inputs are read from heaps; they are read from slots if not.
  __device__ __forceinline__ bool reads_heaps() const { return reads_heaps_; }
  // The input of rank r: in the layout of the tensor in a heap, in that of copy_in() in a slot.
  __device__ __forceinline__ const char* source(int r) const { return peers_.arena[r] + size_t{source_units(r)} * 16; }
  // The same from the start of its arena, in units of 16 bytes.
  __device__ __forceinline__ uint32_t source_units(int r) const {
    return reads_heaps_ ? static_cast<uint32_t>(heap_offset(peers_) / 16) + received().units[r]
                        : static_cast<uint32_t>(slot_offset(peers_, epoch_) / 16);
  }

  // A barrier with the blocks of this number on all ranks.
  __device__ __forceinline__ bool step(uint32_t how_far) {
    __syncthreads();  // what this block read and wrote comes before its flags
    const int t = static_cast<int>(threadIdx.x);
    if (t < peers_.world_size) {
      const uint32_t flag_of_call = 4 * epoch_;
      store_release_sys(&signals(t).stage[peers_.rank][blockIdx.x], flag_of_call + how_far);
      const uint32_t* flag = &signals(peers_.rank).stage[t][blockIdx.x];
      const auto has_reached = [&] {
        const uint32_t reached = load_acquire_sys(flag) - flag_of_call;
        return reached >= how_far && reached <= kDone;
      };
      const bool came = wait(has_reached, [] { return false; });
      received().late[t] = !came;
    }
    __syncthreads();
    return is_any_late() ? give_up(2) : true;
  }

  // The last block of the rank closes the call. All threads of a block have read the epoch before any is here (bring
  // has a barrier), so it may change.
  __device__ __forceinline__ void end() {
    if (threadIdx.x != 0 || outcome_ == Outcome::Skipped || outcome_ == Outcome::GaveUp) return;
    Signals& mine = signals(peers_.rank);
    if (add_acq_rel_gpu(&mine.finished, 1) + 1 != gridDim.x) return;
    if (outcome_ == Outcome::Refused) record_mismatch();
    mine.finished = 0;
    mine.begun = mine.taken[0] = mine.taken[1] = 0;
    mine.refused = outcome_ == Outcome::Refused ? 1 : 0;
    mine.epoch = epoch_;
  }

 protected:
  enum class Outcome : uint32_t { Going, Refused, GaveUp, Skipped };
  enum class Verdict : uint32_t { Agrees, Differs, Late };  // the worse, the larger

  // By thread r of the block, of rank r.
  struct Received {
    Verdict verdict[kMaxPeers];  // of its announcement
    bool late[kMaxPeers];        // with a later flag
    uint32_t units[kMaxPeers];
  };
  __device__ __forceinline__ static Received& received() {
    __shared__ Received shared;
    return shared;
  }

  // `block`: the number of the blocks whose announcements are compared.
  __device__ __forceinline__ Turn(const Peers& peers, const Call& call, uint32_t plan, uint32_t block,
                                  uint32_t expected)
      : peers_(peers), call_(call), expected_(expected), plan_(plan), block_(block) {
    const uint32_t last = signals(peers.rank).epoch;
    epoch_ = last == ~uint32_t{0} ? 2 : last + 1;  // an even one follows an odd one
    if (call.piece > 0 && signals(peers.rank).refused != 0) outcome_ = Outcome::Skipped;
  }

  __device__ __forceinline__ Signals& signals(int r) const { return *reinterpret_cast<Signals*>(peers_.arena[r]); }
  __device__ __forceinline__ Announcement& arrived(int from, uint32_t block) const {
    return signals(peers_.rank).arrived[epoch_ & 1][from][block];
  }
  __device__ __forceinline__ uint32_t kind() const {
    return kind_of(call_.op, call_.dtype, call_.reduce_op, call_.codec);
  }
  __device__ __forceinline__ static uint32_t low(uint64_t value) { return static_cast<uint32_t>(value); }
  __device__ __forceinline__ static uint32_t high(uint64_t value) { return static_cast<uint32_t>(value >> 32); }
  // The halves of a number that is read and written as flags are.
  __device__ __forceinline__ static uint32_t* halves(uint64_t& value) { return reinterpret_cast<uint32_t*>(&value); }

  __device__ __forceinline__ void announce(uint32_t heap_units) const {
    __syncthreads();  // what this block copied in comes before its flags
    const int t = static_cast<int>(threadIdx.x);
    if (t < peers_.world_size) send_announcement(t, heap_units);
  }

  __device__ __forceinline__ void send_announcement(int r, uint32_t heap_units) const {
    Announcement& at = signals(r).arrived[epoch_ & 1][peers_.rank][block_];
    store16_relaxed_sys(&at, {0, kind(), low(call_.numel), high(call_.numel)});  // 0: no epoch, nobody waits for it
    store16_relaxed_sys(&at.shape_hash, {call_.shape_hash, plan_, call_.brings, heap_units});
    store_release_sys(&at.flag, epoch_);
  }

  // Waits for the announcements of all ranks to this block and compares them with its own.
  __device__ __forceinline__ bool await_announcements() {
    const int t = static_cast<int>(threadIdx.x);
    if (t < peers_.world_size) await_announcement(t);
    __syncthreads();
    const Verdict worst = worst_verdict();
    if (worst == Verdict::Late) return give_up(1);
    if (worst == Verdict::Differs) return outcome_ = Outcome::Refused, false;
    return true;
  }

  // Puts the announcement of rank r into received().
  __device__ __forceinline__ void await_announcement(int r) const {
    bool differs = false;
    const bool came = wait([&] { return has_announced(r, block_); },
                           // A rank whose grid is smaller has no block of this number; the plan of its block 0 differs.
                           [&] { return differs = has_announced(r, 0) && disagrees(r, 0); });
    if (came && !differs) differs = disagrees(r, block_);
    received().verdict[r] = !came ? Verdict::Late : differs ? Verdict::Differs : Verdict::Agrees;
    received().late[r] = false;
    received().units[r] = load_relaxed_sys(&arrived(r, block_).heap_units);
  }

  __device__ __forceinline__ int count_heaps() const {
    int in_heaps = 0;
    for (int r = 0; r < peers_.world_size; ++r) in_heaps += received().units[r] != kNoUnits ? 1 : 0;
    return in_heaps;
  }

  __device__ __forceinline__ bool has_announced(int r, uint32_t block) const {
    return load_acquire_sys(&arrived(r, block).flag) == epoch_;
  }

  __device__ __forceinline__ bool disagrees(int r, uint32_t block) const {
    const Announcement& theirs = arrived(r, block);
    const Word16 first = load16_peer(&theirs), second = load16_peer(&theirs.shape_hash);
    return first.y != kind() || first.z != low(call_.numel) || first.w != high(call_.numel) ||
           second.x != call_.shape_hash || second.y != plan_ || second.z != expected_;
  }

  __device__ __forceinline__ Verdict worst_verdict() const {
    Verdict worst = Verdict::Agrees;
    for (int r = 0; r < peers_.world_size; ++r) worst = received().verdict[r] > worst ? received().verdict[r] : worst;
    return worst;
  }

  __device__ __forceinline__ bool is_any_late() const {
    bool late = false;
    for (int r = 0; r < peers_.world_size; ++r) late |= received().late[r];
    return late;
  }

  // Polls came() until it holds, after every 64 polls also otherwise() and the clock, which is slow to read; false at
  // the deadline.
  template <class Came, class Otherwise>
  __device__ __forceinline__ bool wait(Came came, Otherwise otherwise) const {
    constexpr int kPollsBetweenClocks = 64;
    if (came()) return true;
    const uint64_t start = global_time_ns();
    do {
#pragma unroll 1
      for (int i = 0; i < kPollsBetweenClocks; ++i) {
        if (came()) return true;
      }
      if (otherwise()) return true;
    } while (global_time_ns() - start < peers_.timeout_ns);
    return false;
  }

  // Ends the kernel of this rank. Of the blocks whose wait failed only the first one traps, after it has written the
  // record: a trap would cut off a record that another block is writing.
  __device__ __forceinline__ bool give_up(uint32_t stage) { return give_up(stage, threadIdx.x == 0); }
  __device__ __forceinline__ bool give_up(uint32_t stage, bool reports) {
    outcome_ = Outcome::GaveUp;
    if (!reports || add_acq_rel_gpu(&signals(peers_.rank).gave_up, 1) != 0) return false;
    FailureRecord& record = *peers_.failure;
    if (load_relaxed_sys(&record.failure) == static_cast<uint32_t>(Failure::None)) {
      record.missing = 0;
      for (int r = 0; r < peers_.world_size; ++r) {
        if (received().verdict[r] == Verdict::Late || received().late[r]) record.missing |= 1u << r;
        record.last_seen[r] = last_seen(r);
      }
      publish(Failure::Late, stage);
    }
    trap();
    return false;
  }

  __device__ __forceinline__ uint32_t last_seen(int r) const {
    const uint32_t newest = epoch_ + 1;  // no flag is further
    const Signals& mine = signals(peers_.rank);
    const uint32_t even = load_relaxed_sys(&mine.arrived[0][r][block_].flag);
    const uint32_t odd = load_relaxed_sys(&mine.arrived[1][r][block_].flag);
    return newest - even < newest - odd ? even : odd;
  }

  __device__ __forceinline__ void record_mismatch() const {
    FailureRecord& record = *peers_.failure;
    if (load_relaxed_sys(&record.failure) != static_cast<uint32_t>(Failure::None)) return;
    int blamed = 0;
    while (received().verdict[blamed] != Verdict::Differs) ++blamed;
    Announcement& theirs = arrived(blamed, has_announced(blamed, block_) ? block_ : 0);
    record.blamed = static_cast<uint32_t>(blamed);
    record.theirs.flag = load_relaxed_sys(&theirs.flag);
    record.theirs.kind = load_relaxed_sys(&theirs.kind);
    record.theirs.numel = load_relaxed_sys(halves(theirs.numel)) |
                          static_cast<uint64_t>(load_relaxed_sys(halves(theirs.numel) + 1)) << 32;
    record.theirs.shape_hash = load_relaxed_sys(&theirs.shape_hash);
    record.theirs.plan = load_relaxed_sys(&theirs.plan);
    record.theirs.brings = load_relaxed_sys(&theirs.brings);
    record.theirs.heap_units = load_relaxed_sys(&theirs.heap_units);
    publish(Failure::Mismatch, 1);
  }

  __device__ __forceinline__ void publish(Failure failure, uint32_t stage) const {
    FailureRecord& record = *peers_.failure;
    record.epoch = epoch_;
    record.stage = stage;
    record.kind = kind();
    record.numel = call_.numel;
    store_release_sys(&record.failure, static_cast<uint32_t>(failure));
    fence_sys();  // the record is in memory before the kernel ends, also by a trap
  }

  const Peers& peers_;
  const Call& call_;
  uint32_t expected_;
  uint32_t plan_;
  uint32_t block_;
  uint32_t epoch_;
  Outcome outcome_ = Outcome::Going;
  bool reads_heaps_ = false;
};

// The inputs of all ranks, for Format::sum. In units of the arenas, whose addresses stay in the kernel's arguments.
struct Sources {
  static constexpr int kMost = kMaxPeers;
  static constexpr Reach kReach = Reach::Peer;

  const Peers& peers;
  size_t offset;  // bytes behind the start of each input
  uint32_t units[kMaxPeers];

  __device__ __forceinline__ Sources(const Peers& of, const Turn& turn, size_t from) : peers(of), offset(from) {
#pragma unroll
    for (int r = 0; r < kMaxPeers; ++r) units[r] = r < of.world_size ? turn.source_units(r) : 0;
  }
  __device__ __forceinline__ const char* operator[](int r) const {
    return peers.arena[r] + size_t{units[r]} * 16 + offset;
  }
};

}  // namespace tpk::cuda
