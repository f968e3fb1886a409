// The race detector: happens-before by vector clocks. Two accesses to a byte race when one of them writes, not both are
// atomics that see each other, and nothing orders them. What orders: the program, __syncthreads and __syncwarp, a value
// acquired that was released (with the scopes both lie in), fences around relaxed atomics, streams, events and the
// host. That hardware or schedule would have behaved makes no difference.
#include <link.h>

#include <algorithm>
#include <deque>
#include <set>
#include <shared_mutex>
#include <unordered_map>

#include "block.h"
#include "memory.h"
#include "report.h"
#include "shadow.h"
#include "stream.h"

namespace tpk::emu {
namespace {

// The thread-local variables of this program in the calling thread: static __shared__ variables are among them.
std::pair<uintptr_t, uintptr_t> thread_locals() {
  std::pair<uintptr_t, uintptr_t> range{0, 0};
  const auto look = [](dl_phdr_info* info, size_t, void* data) {
    bool is_this_program = false;
    size_t bytes = 0;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      const ElfW(Phdr) & part = info->dlpi_phdr[i];
      const uintptr_t code = reinterpret_cast<uintptr_t>(&thread_locals) - info->dlpi_addr - part.p_vaddr;
      if (part.p_type == PT_LOAD && code < part.p_memsz) is_this_program = true;
      if (part.p_type == PT_TLS) bytes = part.p_memsz;
    }
    if (!is_this_program || info->dlpi_tls_data == nullptr) return 0;
    const auto start = reinterpret_cast<uintptr_t>(info->dlpi_tls_data);
    *static_cast<std::pair<uintptr_t, uintptr_t>*>(data) = {start, start + bytes};
    return 1;
  };
  current_thread();  // in a shared library they are only made when the first of them is touched
  dl_iterate_phdr(look, &range);
  return range;
}

// Of an allocation: a line is made when it is first touched.
class Lines : public Shadow {
 public:
  Lines(const char* base, size_t bytes)
      : first_(reinterpret_cast<uintptr_t>(base) / Line::kBytes),
        lines_((reinterpret_cast<uintptr_t>(base) + bytes) / Line::kBytes - first_ + 1) {}
  ~Lines() override {
    for (auto& line : lines_) delete line.load();
  }
  Line& at(uintptr_t address) {
    std::atomic<Line*>& place = lines_[address / Line::kBytes - first_];
    Line* line = place.load(std::memory_order_acquire);
    if (line != nullptr) return *line;
    auto made = std::make_unique<Line>();
    if (place.compare_exchange_strong(line, made.get())) return *made.release();
    return *line;
  }

 private:
  uintptr_t first_;
  std::vector<std::atomic<Line*>> lines_;
};

// Of a block; only its own OS thread comes here.
class BlockMemory : public SharedMemory {
 public:
  explicit BlockMemory(Block& block) : locals_(thread_locals()) {
    static std::atomic<uint64_t> blocks{0};
    number = ++blocks;
    dynamic_.first = reinterpret_cast<uintptr_t>(block.shared());
    dynamic_.second = dynamic_.first + block.launch().request.shared_bytes;
  }
  bool contains(uintptr_t address) const {
    return (address >= locals_.first && address < locals_.second) ||
           (address >= dynamic_.first && address < dynamic_.second);
  }
  Line& at(uintptr_t address) { return lines_[address / Line::kBytes]; }

  uint64_t number;

 private:
  std::pair<uintptr_t, uintptr_t> locals_, dynamic_;
  std::unordered_map<uintptr_t, Line> lines_;
};

BlockMemory& memory_of(const Thread& thread) { return static_cast<BlockMemory&>(thread.block->shared_memory()); }

class Races : public Detector {
 public:
  Races() { set_detector(this); }

  // ---- who is who

  uint32_t new_id(const std::string& name) override {
    const std::unique_lock lock(names_);
    ids_.push_back({name, nullptr, 0});
    return static_cast<uint32_t>(ids_.size());
  }

  void begin_launch(Launch& launch) override {
    Stream& stream = *launch.stream;
    const std::unique_lock lock(names_);
    while (stream.ids.size() < launch.blocks() * launch.threads()) {
      ids_.push_back({"", &histories_[stream.clock.id], static_cast<uint32_t>(stream.ids.size())});
      stream.ids.push_back(static_cast<uint32_t>(ids_.size()));
    }
    launch.first_moment = ++stream.last_moment;
    Clock base;
    base.join(stream.clock.snapshot());
    launch.base = base.others;
    histories_[stream.clock.id].push_back({launch.first_moment, launch.request.kernel, launch.request.name,
                                           launch.device->rank, launch.blocks(), launch.threads()});
  }

  void end_launch(Launch& launch) override {
    Stream& stream = *launch.stream;
    for (const Clock& clock : launch.ends) stream.last_moment = std::max(stream.last_moment, clock.now);
    stream.clock.join_all(launch.ends, [](const Clock& clock) { return Snapshot{clock.others, clock.id, clock.now}; });
  }

  std::unique_ptr<SharedMemory> enter_block(Block& block) override {
    Launch& launch = block.launch();
    const dim3& grid = launch.request.grid;
    const uint3& at = block.index();
    const size_t number = at.x + grid.x * (at.y + size_t{grid.y} * at.z);
    for (Thread& thread : block.threads()) {
      Clock& clock = thread.memory.clock;
      clock.id = launch.stream->ids[number * launch.threads() + thread.number];
      clock.now = launch.first_moment;
      clock.others = launch.base;
    }
    return std::make_unique<BlockMemory>(block);
  }

  // ---- plain accesses

  void access(Thread& thread, uintptr_t address, size_t bytes, bool writes, uintptr_t code) override {
    if (thread.block->stacks().contains(reinterpret_cast<const void*>(address))) return;
    Access now{thread.memory.clock.id, thread.memory.clock.now};
    now.place = code, now.writes = writes;
    touch_all(thread, address, bytes, now, thread.memory.clock);
  }

  void async_access(Thread& thread, const Clock& clock, const void* memory, size_t bytes, bool writes,
                    const Where& where) override {
    Access now{clock.id, clock.now};
    now.place = std::bit_cast<uintptr_t>(where), now.in_source = 1;
    now.writes = writes, now.async = 1;
    now.shared = memory_of(thread).contains(reinterpret_cast<uintptr_t>(memory)) ? 1 : 0;
    touch_all(thread, reinterpret_cast<uintptr_t>(memory), bytes, now, clock);
  }

  void stream_access(const Clock& clock, const void* memory, size_t bytes, bool writes) override {
    const auto start = reinterpret_cast<uintptr_t>(memory);
    Lines* lines = lines_of(start);
    if (lines == nullptr) return;
    Access now{clock.id, clock.now};
    now.writes = writes;
    for (uintptr_t at = start; at < start + bytes;) {
      const size_t part = std::min(start + bytes - at, Line::kBytes - at % Line::kBytes);
      touch(lines->at(at), at, part, now, clock, true);
      at += part;
    }
  }

  // ---- atomic accesses

  void begin_atomic(Thread& thread, const void* address) override {
    Line& line = line_of_atomic(thread, reinterpret_cast<uintptr_t>(address));
    line.lock();
  }

  void end_atomic(Thread& thread, const void* address, size_t bytes, Atomic::Kind kind, Order order, Scope scope,
                  const Where& where) override {
    const auto at = reinterpret_cast<uintptr_t>(address);
    Line& line = line_of_atomic(thread, at);
    Access now{thread.memory.clock.id, thread.memory.clock.now};
    now.place = std::bit_cast<uintptr_t>(where), now.in_source = 1;
    now.atomic = 1, now.scope = static_cast<uint64_t>(scope);
    const bool reads = kind != Atomic::Kind::Store;
    now.writes = kind != Atomic::Kind::Load;
    const bool is_shared = memory_of(thread).contains(at);
    if (is_shared && reads && !line.is_written(at % Line::kBytes, bytes)) uninitialised(now);
    touch(line, at, bytes, now, thread.memory.clock, false);
    std::vector<Release>& releases = line.releases(at % Line::kBytes);
    if (reads) acquire(thread, releases, order, scope);
    if (now.writes) {
      // An exchange goes on with what was released before: in its own clock where it has acquired and passes it on.
      const bool has_all = std::all_of(releases.begin(), releases.end(), [&](const Release& one) {
        return shared_scope(one, thread) <= std::min(one.scope, scope) && one.scope <= scope;
      });
      const bool passes_on = kind == Atomic::Kind::Exchange && order == Order::AcquireRelease;
      if (kind == Atomic::Kind::Store || (passes_on && has_all)) releases.clear();
      release(thread, releases, order, scope);
    }
    line.unlock();
  }

  void fence(Thread& thread, Scope scope) override {
    ThreadMemory& memory = thread.memory;
    for (size_t level = 0; level <= static_cast<size_t>(scope); ++level) {
      memory.clock.join(memory.unfenced[level].snapshot());
    }
    for (size_t level = 0; level <= static_cast<size_t>(scope); ++level) memory.fenced[level] = memory.clock.snapshot();
    memory.clock.tick();
  }

  void forget_reports() override {
    const std::lock_guard lock(reported_mutex_);
    reported_.clear();
  }

  void forget() override {
    const std::unique_lock lock(names_);
    ids_.clear(), histories_.clear(), elsewhere_.clear();
  }

  void synchronize(const std::vector<Thread*>& threads) override {
    Clock all;
    all.join_all(threads, [](const Thread* thread) { return thread->memory.clock.snapshot(); });
    for (Thread* thread : threads) {
      thread->memory.clock.others = all.others;
      thread->memory.clock.fenced = all.fenced;
      thread->memory.clock.tick();
    }
  }

 private:
  struct LaunchRecord {
    uint32_t first_moment;
    const void* kernel;
    const char* name;
    int rank;
    uint64_t blocks;
    uint32_t threads;
  };
  using History = std::vector<LaunchRecord>;
  struct Id {
    std::string name;  // of a stream or a host thread
    const History* history;
    uint32_t number;  // of the thread in its launches
  };
  struct Who {
    std::string text;
    int rank = -1;
    uint64_t block = 0;  // differs from launch to launch, too
  };

  Lines* lines_of(uintptr_t address) {
    Allocation* allocation = find_allocation(reinterpret_cast<const void*>(address));
    if (allocation == nullptr) return nullptr;
    std::call_once(allocation->shadow_made,
                   [&] { allocation->shadow = std::make_unique<Lines>(allocation->base, allocation->bytes); });
    return static_cast<Lines*>(allocation->shadow.get());
  }

  // Atomics order also where plain accesses are not watched.
  Line& line_of_atomic(Thread& thread, uintptr_t address) {
    if (memory_of(thread).contains(address)) return memory_of(thread).at(address);
    if (Lines* lines = lines_of(address)) return lines->at(address);
    const std::lock_guard lock(elsewhere_mutex_);
    return elsewhere_[address / Line::kBytes];
  }

  // In the shared memory of the thread's block, or in an allocation.
  void touch_all(Thread& thread, uintptr_t address, size_t bytes, const Access& now, const Clock& clock) {
    BlockMemory& shared = memory_of(thread);
    const bool is_shared = shared.contains(address);
    Lines* lines = is_shared ? nullptr : lines_of(address);
    if (!is_shared && lines == nullptr) return;
    for (uintptr_t at = address, end = address + bytes; at < end;) {
      const size_t part = std::min(end - at, Line::kBytes - at % Line::kBytes);
      Line& line = is_shared ? shared.at(at) : lines->at(at);
      if (is_shared && !now.writes && !line.is_written(at % Line::kBytes, part)) uninitialised(now);
      touch(line, at, part, now, clock, !is_shared);
      at += part;
    }
  }

  void touch(Line& line, uintptr_t address, size_t bytes, const Access& now, const Clock& clock, bool locks) {
    if (locks) line.lock();
    Access racing;
    line.access(
        address % Line::kBytes, bytes, now, clock, [&](const Access& old) { racing = old; },
        [&](const Access& a, const Access& b) { return in_one_scope(a, b); });
    if (locks) line.unlock();
    if (racing.id != 0) report_race(address, racing, now, clock.knows(racing.id, racing.when));
  }

  // ---- order by atomics

  // The scope that two threads share.
  static Scope shared_scope(const Release& release, const Thread& thread) {
    if (release.block == memory_of(thread).number) return Scope::Block;
    return release.rank == thread.block->launch().device->rank ? Scope::Gpu : Scope::System;
  }

  static void acquire(Thread& thread, const std::vector<Release>& releases, Order order, Scope scope) {
    for (const Release& release : releases) {
      const Scope shared = shared_scope(release, thread);
      if (shared > release.scope || shared > scope) continue;
      ThreadMemory& memory = thread.memory;
      const bool now = order == Order::Acquire || order == Order::AcquireRelease;
      (now ? memory.clock : memory.unfenced[static_cast<size_t>(shared)]).join_released(release.clock);
    }
  }

  static void release(Thread& thread, std::vector<Release>& releases, Order order, Scope scope) {
    ThreadMemory& memory = thread.memory;
    const int rank = thread.block->launch().device->rank;
    const uint64_t block = memory_of(thread).number;
    if (order == Order::Release || order == Order::AcquireRelease) {
      releases.push_back({memory.clock.snapshot(), scope, rank, block});
      memory.clock.tick();
      return;
    }
    for (size_t level = 0; level < memory.fenced.size(); ++level) {
      if (memory.fenced[level].id == 0) continue;
      releases.push_back({memory.fenced[level], std::min(scope, static_cast<Scope>(level)), rank, block});
    }
  }

  bool in_one_scope(const Access& a, const Access& b) const {
    const auto narrower = static_cast<Scope>(std::min(a.scope, b.scope));
    if (narrower == Scope::System || a.id == b.id) return true;
    const Who one = who(a, false), other = who(b, false);
    return one.rank == other.rank && (narrower == Scope::Gpu || one.block == other.block);
  }

  // ---- reports

  Who who(const Access& access, bool with_text) const {
    const std::shared_lock lock(names_);
    const Id& id = ids_[access.id - 1];
    if (id.history == nullptr) return {id.name};
    auto next = std::upper_bound(id.history->begin(), id.history->end(), access.when,
                                 [](uint32_t when, const LaunchRecord& launch) { return when < launch.first_moment; });
    const LaunchRecord& launch = *std::prev(next);
    const uint32_t block = id.number / launch.threads;
    const uint64_t serial = uint64_t{launch.first_moment} << 32 | block;
    if (!with_text) return {"", launch.rank, serial};
    const std::string text = "rank " + std::to_string(launch.rank) + " " + text_of_kernel(launch.kernel, launch.name) +
                             " block " + std::to_string(block) + " of " + std::to_string(launch.blocks) + " thread " +
                             std::to_string(id.number % launch.threads);
    return {text, launch.rank, serial};
  }

  static std::string place_of(const Access& access) {
    if (access.in_source) return text_of(std::bit_cast<Where>(static_cast<uintptr_t>(access.place)));
    return access.place == 0 ? "a copy or fill" : text_of_code(access.place - 1);
  }

  std::string describe(const Access& access) const {
    return std::string(access.atomic  ? "atomic "
                       : access.async ? "asynchronous "
                                      : "") +
           (access.writes ? "write" : "read") + " by " + who(access, true).text + " at " + place_of(access);
  }

  // Once for each pair of places. Those in order want a fence_async.
  void report_race(uintptr_t address, const Access& old, const Access& now, bool in_order) {
    {
      const std::lock_guard lock(reported_mutex_);
      if (!reported_.emplace(old.place, now.place).second) return;
    }
    Thread* thread = current_thread();
    const bool is_shared = thread != nullptr && memory_of(*thread).contains(address);
    const std::string memory =
        is_shared ? "the shared memory of a block" : describe_address(reinterpret_cast<const void*>(address));
    report(Kind::Race, "on " + memory + (in_order ? ", for want of fence_async" : "") + "\n  " + describe(now) +
                           "\n  " + describe(old));
  }

  void uninitialised(const Access& now) {
    {
      const std::lock_guard lock(reported_mutex_);
      if (!reported_.emplace(0, now.place).second) return;
    }
    report(Kind::Uninitialised, "shared memory that nobody has written: " + describe(now));
  }

  mutable std::shared_mutex names_;
  std::deque<Id> ids_;
  std::unordered_map<uint32_t, History> histories_;  // by the id of the stream
  std::mutex elsewhere_mutex_, reported_mutex_;
  std::unordered_map<uintptr_t, Line> elsewhere_;
  std::set<std::pair<uint64_t, uint64_t>> reported_;
};

// Linking this file is what switches the detector on.
[[maybe_unused]] auto* const the_races = new Races;

}  // namespace
}  // namespace tpk::emu
