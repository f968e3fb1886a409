#include "shm.h"

#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>

#include "core/check.h"
#include "core/errors.h"

namespace tpk {
namespace {

constexpr int kSleepMilliseconds = 20;  // a dead rank is noticed this soon
constexpr uint64_t kSpinNanoseconds = 100'000;
constexpr uint64_t kCrowdedSpinNanoseconds = 2'000;
constexpr int kPausesBetweenClocks = 32;
constexpr int kYields = 50;
constexpr uint64_t kLongYieldNanoseconds = 200'000;
// A yield that takes longer than a rank computes at a time has given the core to another program, for a time slice: the
// next ones would, too.
constexpr uint64_t kSliceNanoseconds = 2'000'000, kNoYieldNanoseconds = 100'000'000;

inline void pause_core() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// The low half of a counter, which is what the kernel compares.
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the low half comes first");
inline uint32_t* futex_word(const std::atomic<uint64_t>& word) {
  return reinterpret_cast<uint32_t*>(const_cast<std::atomic<uint64_t>*>(&word));
}

// Where there is no pidfd (an old kernel, seccomp, no descriptors left): whether the process has ended. One that its
// parent has not reaped yet has.
bool is_gone(int pid) {
  if (kill(pid, 0) != 0 && errno == ESRCH) return true;
  std::ifstream file(concat("/proc/", pid, "/stat"));
  std::string text;
  if (!std::getline(file, text)) return false;
  const size_t name_ends = text.rfind(')');  // the state comes next: ") S "
  return name_ends != std::string::npos && name_ends + 2 < text.size() &&
         (text[name_ends + 2] == 'Z' || text[name_ends + 2] == 'X');
}

}  // namespace

ShmCommunicator::ShmCommunicator(std::string name, std::string label, int rank, int world_size, double timeout_s,
                                 int fd, size_t arena_bytes, const std::vector<int>& pids, int cores)
    : Communicator(std::move(name), std::move(label), rank, world_size, timeout_s),
      layout_(ArenaLayout::of(arena_bytes)),
      crowded_(world_size > cores),
      pids_(pids) {
  TPK_CHECK(arena_bytes >= ArenaLayout::kMinArenaBytes && arena_bytes % ArenaLayout::kPage == 0,
            "Group.open: arena_bytes must be a multiple of ", ArenaLayout::kPage, ", at least ",
            ArenaLayout::kMinArenaBytes, ", got ", arena_bytes);
  void* memory = mmap(nullptr, arena_bytes * static_cast<size_t>(world_size), PROT_READ | PROT_WRITE,
                      MAP_SHARED | MAP_POPULATE, fd, 0);
  if (memory == MAP_FAILED) {
    throw std::runtime_error(
        concat("Group.open: mapping the arena of group '", this->label(), "' failed: ", std::strerror(errno)));
  }
  base_ = static_cast<char*>(memory);
  heap_.reset(arena(rank) + layout_.heap_offset(), layout_.heap_bytes());
  inputs_.resize(static_cast<size_t>(world_size));
  outputs_.resize(static_cast<size_t>(world_size) + 1);
  for (int r = 0; r < world_size; ++r) {
    pidfds_.push_back(static_cast<int>(syscall(SYS_pidfd_open, pids_[static_cast<size_t>(r)], 0)));
  }
}

ShmCommunicator::~ShmCommunicator() { unmap(); }

void ShmCommunicator::unmap() {
  for (int& fd : pidfds_) {
    if (fd >= 0) ::close(fd);
    fd = -1;
  }
  if (base_ != nullptr) munmap(base_, layout_.arena_bytes * static_cast<size_t>(world_size()));
  base_ = nullptr;
}

// No call is in progress, and none comes any more: only tensors of the heap need the memory.
void ShmCommunicator::do_close() {
  set_state(state_of(rank()) == RankState::Failed ? RankState::Left : RankState::Closed);
  std::lock_guard<std::mutex> lock(mapping_mutex_);
  left_ = true;
  if (heap_blocks_ == 0) unmap();
}

void* ShmCommunicator::heap_allocate(size_t bytes) {
  std::lock_guard<std::mutex> lock(mapping_mutex_);
  if (left_) throw PeerLost(concat("group '", label(), "': its memory is gone, because this rank closed the group"));
  void* const block = heap_.allocate(bytes);
  if (block != nullptr) ++heap_blocks_;
  return block;
}

void ShmCommunicator::heap_free(void* pointer) {
  std::lock_guard<std::mutex> lock(mapping_mutex_);
  heap_.free(pointer);
  if (--heap_blocks_ == 0 && left_) unmap();
}

Communicator::Heaps ShmCommunicator::take_heaps() {
  std::lock_guard<std::mutex> lock(mapping_mutex_);
  Heaps all;
  for (int r = 0; r < world_size(); ++r) all.of_rank.push_back(arena(r) + layout_.heap_offset());
  all.bytes = layout_.heap_bytes();
  heap_.reset(nullptr, 0);
  return all;
}

// A process that ended, or a rank that left; its `state` is read last, so that what it wrote before is seen.
std::string ShmCommunicator::loss_of(int r) const {
  pollfd process{pidfds_[static_cast<size_t>(r)], POLLIN, 0};
  const int pid = pids_[static_cast<size_t>(r)];
  if (process.fd >= 0 ? poll(&process, 1, 0) > 0 : is_gone(pid)) return concat("died (process ", pid, ")");
  const RankState state = state_of(r);
  return state == RankState::Closed || state == RankState::Left ? "closed the group" : "";
}

RankState ShmCommunicator::state_of(int r) const {
  return static_cast<RankState>(control(r).state.load(std::memory_order_acquire));
}

void ShmCommunicator::set_state(RankState state) {
  control(rank()).state.store(static_cast<uint32_t>(state), std::memory_order_release);
  wake_sleepers();
}

bool ShmCommunicator::gave_up(int r) const {
  const RankState state = state_of(r);
  return state == RankState::Failed || state == RankState::Left;
}

void ShmCommunicator::announce(const CallSpec& spec, const void* input_in_heap) {
  CallRecord& mine = control(rank()).records[call_ & 1];
  mine.numel = spec.numel;
  mine.mine = spec.mine;
  mine.heap_offset = input_in_heap == nullptr
                         ? kNotInHeap
                         : static_cast<uint64_t>(static_cast<const char*>(input_in_heap) - arena(rank()) -
                                                 static_cast<ptrdiff_t>(layout_.heap_offset()));
  mine.op = static_cast<uint8_t>(spec.op);
  mine.dtype = static_cast<uint8_t>(spec.dtype);
  mine.reduce_op = static_cast<uint8_t>(spec.reduce_op);
  mine.codec = static_cast<uint8_t>(spec.codec);
  mine.shape_hash = spec.shape_hash;
  mine.call.store(call_, std::memory_order_release);
  wake_sleepers();
}

void ShmCommunicator::hear_all(const CallSpec& mine) {
  bool agreed = true;
  for (int r = 0; r < world_size(); ++r) {
    const CallRecord& theirs = record(r);
    wait_for(mine.op, r, theirs.call, call_);
    agreed &= theirs.numel == mine.numel && theirs.shape_hash == mine.shape_hash &&
              theirs.op == static_cast<uint8_t>(mine.op) && theirs.dtype == static_cast<uint8_t>(mine.dtype) &&
              theirs.reduce_op == static_cast<uint8_t>(mine.reduce_op) &&
              theirs.codec == static_cast<uint8_t>(mine.codec);
  }
  if (!agreed) refuse_as_one_piece([&] { check_agreement(mine, announced()); });
}

std::vector<CallSpec> ShmCommunicator::announced() const {
  std::vector<CallSpec> all;
  for (int r = 0; r < world_size(); ++r) {
    const CallRecord& theirs = record(r);
    all.push_back({static_cast<Op>(theirs.op), static_cast<DType>(theirs.dtype),
                   static_cast<ReduceOp>(theirs.reduce_op), static_cast<Codec>(theirs.codec), theirs.numel,
                   theirs.shape_hash, theirs.mine});
  }
  return all;
}

bool ShmCommunicator::anybody_in_heap() const {
  for (int r = 0; r < world_size(); ++r) {
    if (record(r).heap_offset != kNotInHeap) return true;
  }
  return false;
}

bool ShmCommunicator::everybody_in_heap() const {
  for (int r = 0; r < world_size(); ++r) {
    if (record(r).heap_offset == kNotInHeap) return false;
  }
  return true;
}

void ShmCommunicator::signal(uint64_t stage) {
  control(rank()).stage.store((call_ << kStageBits) + stage, std::memory_order_release);
  wake_sleepers();
}

void ShmCommunicator::wait_all(Op op, uint64_t stage) {
  for (int r = 0; r < world_size(); ++r) {
    if (r != rank()) wait_for(op, r, control(r).stage, (call_ << kStageBits) + stage);
  }
}

void ShmCommunicator::wake_sleepers() {
  // Pairs with the fence in sleep_on: either this sees the sleeper, or the sleeper sees the new value.
  std::atomic_thread_fence(std::memory_order_seq_cst);
  Control& mine = control(rank());
  if (mine.sleepers.load(std::memory_order_relaxed) == 0) return;
  for (const std::atomic<uint64_t>* word : {static_cast<const std::atomic<uint64_t>*>(&mine.records[call_ & 1].call),
                                            static_cast<const std::atomic<uint64_t>*>(&mine.stage)}) {
    syscall(SYS_futex, futex_word(*word), FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
  }
}

// Spin, then sleep in the kernel until the word changes. With a core for each rank there is no yielding in between: on
// a core that another program uses, a yield gives away a whole time slice, where a sleeper is woken with priority.
// With more ranks than cores the one waited for may need this core: yield early, until a yield shows that others are
// here, too.
void ShmCommunicator::wait_for(Op op, int other, const std::atomic<uint64_t>& word, uint64_t target) {
  // Most waits end within these polls: the clock is not read.
  for (int i = 0; i < kPausesBetweenClocks; ++i) {
    if (word.load(std::memory_order_acquire) >= target) return;
    pause_core();
  }
  const uint64_t started = now_nanoseconds();
  const uint64_t spin_until = started + (crowded_ ? kCrowdedSpinNanoseconds : kSpinNanoseconds);
  uint64_t now = started;
  while (now < spin_until) {
    for (int i = 0; i < kPausesBetweenClocks; ++i) {
      pause_core();
      if (word.load(std::memory_order_acquire) >= target) return count_wait(now_nanoseconds() - started);
    }
    now = now_nanoseconds();
  }
  for (int i = 0; crowded_ && now >= yield_again_ && i < kYields; ++i) {
    sched_yield();
    const uint64_t after = now_nanoseconds();
    if (after - now > kSliceNanoseconds) yield_again_ = after + kNoYieldNanoseconds;
    if (word.load(std::memory_order_acquire) >= target) return count_wait(after - started);
    if (after - now > kLongYieldNanoseconds) break;
    now = after;
  }
  while (true) {
    const uint64_t seen = word.load(std::memory_order_acquire);
    if (seen >= target) break;
    look_for_trouble(op, other, word, target, started);
    sleep_on(other, word, seen);
  }
  count_wait(now_nanoseconds() - started);
}

void ShmCommunicator::sleep_on(int other, const std::atomic<uint64_t>& word, uint64_t seen) {
  std::atomic<uint32_t>& sleepers = control(other).sleepers;
  sleepers.fetch_add(1, std::memory_order_relaxed);
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (word.load(std::memory_order_relaxed) == seen) {
    const timespec limit{0, kSleepMilliseconds * 1'000'000L};
    syscall(SYS_futex, futex_word(word), FUTEX_WAIT, static_cast<uint32_t>(seen), &limit, nullptr, 0);
  }
  sleepers.fetch_sub(1, std::memory_order_relaxed);
}

void ShmCommunicator::mark_failed(int culprit, bool late) {
  Control& mine = control(rank());
  mine.failed_call = call_;
  mine.culprit = culprit;
  mine.was_late = late ? 1 : 0;
  set_state(RankState::Failed);
}

void ShmCommunicator::give_up(bool late) {
  std::lock_guard<std::mutex> lock(mapping_mutex_);
  if (!left_ && !gave_up(rank())) mark_failed(rank(), late);
}

void ShmCommunicator::fail_lost(Op op, int lost, const std::string& how) {
  mark_failed(lost, false);
  throw PeerLost(concat(describe_call(op), ": rank ", lost, " ", how, "."));
}

void ShmCommunicator::fail_late(Op op) {
  std::vector<int> late, came;
  const uint64_t my_stage = control(rank()).stage.load(std::memory_order_relaxed);  // this rank's own
  for (int r = 0; r < world_size(); ++r) {
    (last_call(r) >= call_ && control(r).stage.load(std::memory_order_relaxed) >= my_stage ? came : late).push_back(r);
  }
  const int first = late.empty() ? rank() : late.front();
  mark_failed(first, true);
  throw TimeoutFailure(late_text(op, call_, late, came, last_call(first)));
}

// Another rank failed: report its culprit, so that all survivors name the same rank.
void ShmCommunicator::fail_with(Op op, int failed) {
  const Control& theirs = control(failed);
  const bool late = theirs.was_late != 0;
  const int culprit = theirs.culprit;
  const std::string text = concat(describe_call(op), ": rank ", failed, " gave up at call ", theirs.failed_call,
                                  " because rank ", culprit, culprit == rank() ? " (this rank)" : "",
                                  late ? concat(" did not signal within ", timeout_s(), " s") : " was lost", "; rank ",
                                  culprit, " was last seen at call ", last_call(culprit), ".");
  mark_failed(culprit, late);
  if (late) throw TimeoutFailure(text);
  throw PeerLost(text);
}

uint64_t ShmCommunicator::last_call(int r) const {
  const auto call = [&](size_t i) { return control(r).records[i].call.load(std::memory_order_relaxed); };
  return std::max(call(0), call(1));
}

// Looks at every rank, not only at the one waited for: the first cause is what the error should name. A rank that left
// after it had done its part of this call is no trouble.
void ShmCommunicator::look_for_trouble(Op op, int other, const std::atomic<uint64_t>& word, uint64_t target,
                                       uint64_t started) {
  if (is_aborted()) throw PeerLost(concat(describe_call(op), ": this rank aborted the group."));
  for (int r = 0; r < world_size(); ++r) {
    if (r == rank()) continue;
    const std::string how = loss_of(r);
    if (how.empty()) continue;
    const bool owes = r == other ? word.load(std::memory_order_acquire) < target : last_call(r) < call_;
    if (owes && gave_up(r)) fail_with(op, r);  // whatever it did afterwards
    if (owes) fail_lost(op, r, concat(how, "; it was last seen at call ", last_call(r)));
  }
  if (word.load(std::memory_order_acquire) >= target) return;
  for (int r = 0; r < world_size(); ++r) {
    if (r != rank() && gave_up(r)) fail_with(op, r);
  }
  if (static_cast<double>(now_nanoseconds() - started) * 1e-9 > timeout_s()) fail_late(op);
}

}  // namespace tpk
