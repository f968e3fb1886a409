#include "memory.h"

#include <sys/mman.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <shared_mutex>
#include <vector>

#include "block.h"
#include "control.h"
#include "device.h"
#include "report.h"

namespace tpk::emu {
namespace {

// One address range of the switch and what it stands for at every rank.
struct Multicast {
  size_t bytes;
  std::vector<char*> places;
};

struct Known {
  std::shared_mutex mutex;
  std::map<const char*, Allocation> allocations;  // by first byte
  std::map<const char*, Multicast> multicasts;
  std::atomic<uint64_t> releases{0};
};

Known& known() {
  static auto* const all = new Known;
  return *all;
}

void add(char* base, size_t bytes, int owner, bool foreign) {
  const std::unique_lock lock(known().mutex);
  known().allocations.erase(base);  // memory of others may change its owner without a word
  Allocation& allocation = known().allocations[base];
  allocation.base = base, allocation.bytes = bytes, allocation.owner = owner, allocation.foreign = foreign;
  ++known().releases;
}

}  // namespace

void* allocate(size_t bytes, int owner) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 256, bytes) != 0) return nullptr;
  std::memset(memory, kPoison, bytes);
  add(static_cast<char*>(memory), bytes, owner, false);
  return memory;
}

bool release(void* memory) {
  const std::unique_lock lock(known().mutex);
  const auto found = known().allocations.find(static_cast<const char*>(memory));
  if (found == known().allocations.end()) return false;
  if (!found->second.foreign) std::free(memory);
  known().allocations.erase(found);
  ++known().releases;
  return true;
}

void release_all() {
  const std::unique_lock lock(known().mutex);
  for (auto& [base, allocation] : known().allocations) {
    if (!allocation.foreign) std::free(allocation.base);
  }
  known().allocations.clear();
  for (auto& [base, range] : known().multicasts) munmap(const_cast<char*>(base), range.bytes);
  known().multicasts.clear();
  ++known().releases;
}

Allocation* find_allocation(const void* address) {
  thread_local Allocation* last = nullptr;
  thread_local uint64_t last_releases = 0;
  const char* at = static_cast<const char*>(address);
  if (last != nullptr && last_releases == known().releases.load(std::memory_order_acquire) && at >= last->base &&
      at < last->base + last->bytes) {
    return last;
  }
  const std::shared_lock lock(known().mutex);
  auto next = known().allocations.upper_bound(at);
  if (next == known().allocations.begin()) return nullptr;
  Allocation& candidate = std::prev(next)->second;
  if (at >= candidate.base + candidate.bytes) return nullptr;
  last = &candidate, last_releases = known().releases.load();
  return last;
}

std::string describe_address(const void* address) {
  char text[128];
  std::snprintf(text, sizeof text, "%p", address);
  const Allocation* allocation = find_allocation(address);
  if (allocation == nullptr) return std::string(text) + " (memory that the emulator does not know)";
  const std::string owner =
      allocation->owner == kHost ? "pinned memory of the host" : "memory of rank " + std::to_string(allocation->owner);
  return std::string(text) + " (" + owner + ", byte " +
         std::to_string(static_cast<const char*>(address) - allocation->base) + ")";
}

void own(void* memory, size_t bytes, int rank) { add(static_cast<char*>(memory), bytes, rank, true); }
void disown(void* memory) { release(memory); }

void* multicast(const std::vector<void*>& memory, size_t bytes) {
  // Nothing can be read or written there but through the switch.
  void* range = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (range == MAP_FAILED) return nullptr;
  Multicast entry{bytes, {}};
  for (void* place : memory) entry.places.push_back(static_cast<char*>(place));
  const std::unique_lock lock(known().mutex);
  known().multicasts[static_cast<char*>(range)] = std::move(entry);
  return range;
}

Places places_of(const void* address, size_t bytes, Where where) {
  const char* at = static_cast<const char*>(address);
  Block& block = *current_thread()->block;
  Places places;
  {
    const std::shared_lock lock(known().mutex);
    auto next = known().multicasts.upper_bound(at);
    if (next != known().multicasts.begin()) {
      const auto& [base, range] = *std::prev(next);
      const size_t offset = static_cast<size_t>(at - base), count = range.places.size();
      // In the order of this run's seed: kernels must not count on any.
      for (size_t i = 0; i < count && offset + bytes <= range.bytes; ++i) {
        places.at[places.count++] = range.places[(options().seed + i) % count] + offset;
      }
    }
  }
  if (places.count == 0) {
    report(Kind::Misuse,
           block.name() + ": no multicast address: " + describe_address(address) + " at " + text_of(where));
    block.die(cudaErrorIllegalAddress);
  }
  return places;
}

}  // namespace tpk::emu
