// Vector clocks: what a CUDA thread, a stream or a host thread knows of all others. Only the race detector needs them.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "emu.h"

namespace tpk::emu {

using Moments = std::vector<uint32_t>;  // [id]: the last moment of that one which is known to have passed

using Fenced = std::array<std::shared_ptr<Moments>, 2>;  // [space]

// A clock at one moment; cheap to copy.
struct Snapshot {
  std::shared_ptr<Moments> others;  // never written to while anybody else holds it
  uint32_t id = 0;
  uint32_t now = 0;
  Fenced fenced = {};
};

// Id 0 is nobody.
struct Clock {
  std::shared_ptr<Moments> others;
  uint32_t id = 0;
  uint32_t now = 1;
  // Of what is known: what somebody, on its way to here, has made visible to asynchronous accesses (fence_async). Those
  // also see all that was there when their kernel began.
  Fenced fenced = {};

  bool knows(uint32_t who, uint32_t when) const {
    if (who == id) return when <= now;
    return has(others, who, when);
  }
  bool knows_fenced(Space space, uint32_t who, uint32_t when) const { return has(of(space), who, when); }

  Snapshot snapshot() const { return {others, id, now, fenced}; }

  // Asynchronous accesses that this clock's owner starts from now on see all that it knows.
  void fence_async(Space space) {
    merge(of(space), others);
    if (id != 0) writable(of(space), id + 1)[id] = now;
    tick();
  }

  // What comes after a snapshot was given away is not covered by it.
  void tick() { ++now; }

  // Of a thread that ticked when it gave the snapshot away: who knows that moment of it knows all that it knew then.
  void join_released(const Snapshot& seen) {
    if (seen.id == 0 || !knows(seen.id, seen.now)) join(seen);
  }

  // Of many: those that have met before share what they know, which is joined once.
  template <class Threads, class SnapshotOf>
  void join_all(const Threads& threads, SnapshotOf snapshot_of) {
    std::shared_ptr<Moments> last;
    for (const auto& thread : threads) {
      Snapshot seen = snapshot_of(thread);
      if (seen.others == last) seen.others = nullptr;
      if (seen.others != nullptr) last = seen.others;
      join(seen);
    }
  }

  void join(const Snapshot& seen) {
    merge(others, seen.others);
    for (Space space : {Space::Global, Space::Shared}) merge(of(space), seen.fenced[static_cast<size_t>(space)]);
    if (seen.id != 0 && !knows(seen.id, seen.now)) writable(others, seen.id + 1)[seen.id] = seen.now;
  }

 private:
  std::shared_ptr<Moments>& of(Space space) { return fenced[static_cast<size_t>(space)]; }
  const std::shared_ptr<Moments>& of(Space space) const { return fenced[static_cast<size_t>(space)]; }

  static bool has(const std::shared_ptr<Moments>& moments, uint32_t who, uint32_t when) {
    return moments != nullptr && who < moments->size() && (*moments)[who] >= when;
  }

  static void merge(std::shared_ptr<Moments>& mine, const std::shared_ptr<Moments>& seen) {
    if (seen == nullptr || seen == mine) return;
    if (mine == nullptr) {
      mine = seen;
      return;
    }
    Moments& moments = writable(mine, seen->size());
    for (size_t i = 0; i < seen->size(); ++i) moments[i] = std::max(moments[i], (*seen)[i]);
  }

  static Moments& writable(std::shared_ptr<Moments>& moments, size_t size) {
    if (moments == nullptr) {
      moments = std::make_shared<Moments>(size);
    } else if (moments.use_count() > 1) {
      moments = std::make_shared<Moments>(*moments);
    }
    std::atomic_thread_fence(std::memory_order_acquire);  // use_count() orders nothing by itself
    if (moments->size() < size) moments->resize(size);
    return *moments;
  }
};

}  // namespace tpk::emu
