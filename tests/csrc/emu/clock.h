// Vector clocks: what a CUDA thread, a stream or a host thread knows of all others. Only the race detector needs them.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

namespace tpk::emu {

using Moments = std::vector<uint32_t>;  // [id]: the last moment of that one which is known to have passed

// A clock at one moment; cheap to copy.
struct Snapshot {
  std::shared_ptr<Moments> others;  // never written to while anybody else holds it
  uint32_t id = 0;
  uint32_t now = 0;
};

// Id 0 is nobody.
struct Clock {
  std::shared_ptr<Moments> others;
  uint32_t id = 0;
  uint32_t now = 1;

  bool knows(uint32_t who, uint32_t when) const {
    if (who == id) return when <= now;
    return others != nullptr && who < others->size() && (*others)[who] >= when;
  }

  Snapshot snapshot() const { return {others, id, now}; }

  // What comes after a snapshot was given away is not covered by it.
  void tick() { ++now; }

  // Of a thread that ticked when it gave the snapshot away: who knows that moment of it knows all that it knew then.
  void join_released(const Snapshot& seen) {
    if (seen.id == 0 || !knows(seen.id, seen.now)) join(seen);
  }

  void join(const Snapshot& seen) {
    if (seen.others != nullptr && seen.others != others) {
      if (others == nullptr) {
        others = seen.others;
      } else {
        Moments& mine = writable(seen.others->size());
        for (size_t i = 0; i < seen.others->size(); ++i) mine[i] = std::max(mine[i], (*seen.others)[i]);
      }
    }
    if (seen.id != 0 && !knows(seen.id, seen.now)) writable(seen.id + 1)[seen.id] = seen.now;
  }

 private:
  Moments& writable(size_t size) {
    if (others == nullptr) {
      others = std::make_shared<Moments>(size);
    } else if (others.use_count() > 1) {
      others = std::make_shared<Moments>(*others);
    }
    std::atomic_thread_fence(std::memory_order_acquire);  // use_count() orders nothing by itself
    if (others->size() < size) others->resize(size);
    return *others;
  }
};

}  // namespace tpk::emu
