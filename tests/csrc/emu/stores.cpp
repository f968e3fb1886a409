// Bulk copies and tiles out of shared memory.
#include "async.h"

namespace tpk::emu {
namespace {

constexpr uint32_t kFirstThread = 2048;  // agents of threads are numbered from here, two to each

// action(place, where in shared memory's bytes, how many) for all that lies together where it is stored.
template <class Action>
void each_part(const Stores::Asked& asked, Action action) {
  if (asked.to != nullptr) return action(asked.to, 0, asked.bytes);
  asked.map.each_row_inside(asked.column, asked.row, [&](const char* to, uint32_t row, size_t first, size_t bytes) {
    action(const_cast<char*>(to), row * 128 + first, bytes);
  });
}

// For the race detector: shared memory is read, and the other place written, from now until a wait says otherwise. What
// has read knows nothing of what writes, so that a wait for the one is none for the other.
uint32_t watch(Stores& mine, const Stores::Asked& asked, Where where) {
  Thread& thread = *current_thread();
  if (mine.reader == nullptr) {
    mine.reader = &agent_of(*thread.block, kFirstThread + 2 * thread.number, "bytes read from shared memory");
    mine.writer = &agent_of(*thread.block, kFirstThread + 2 * thread.number + 1, "bytes written from shared memory");
    mine.reader->last = mine.writer->last = std::max(mine.reader->last, mine.writer->last);
  }
  ++mine.reader->last, ++mine.writer->last;
  detector()->async_access(thread, clock_of(*mine.reader), asked.from, asked.bytes, false, where);
  const Clock writer = clock_of(*mine.writer);
  each_part(asked, [&](const char* to, size_t, size_t bytes) {
    detector()->async_access(thread, writer, to, bytes, true, where);
  });
  return mine.reader->last;
}

void take(Stores::Asked& asked) {
  if (!asked.taken.empty()) return;
  asked.taken.resize(asked.bytes / sizeof(uint64_t));
  copy_words(asked.taken.data(), asked.from, asked.bytes);
}

void put(Stores::Asked& asked) {
  take(asked);
  if (asked.is_there) return;
  asked.is_there = true;
  if (asked.to != nullptr) return copy_words(asked.to, asked.taken.data(), asked.bytes);
  // A tile begins with the pattern.
  const char* const taken = reinterpret_cast<const char*>(asked.taken.data());
  each_part(asked, [&](char* to, size_t at, size_t bytes) {
    for (size_t i = 0; i < bytes; ++i) static_cast<volatile char*>(to)[i] = taken[swizzled(at + i)];
  });
}

void ask(Stores::Asked asked, Where where) {
  Stores& mine = async().stores[current_thread()];
  asked.group = mine.group;
  if (detector() != nullptr) asked.moment = watch(mine, asked, where);
  if (options().seed % 2 != 0) put(asked);
  mine.asked.push_back(std::move(asked));
  this_block().preempt();
}

}  // namespace

void check_bulk(const void* to, const void* from, const void* shared, uint32_t bytes, Where where) {
  check_aligned(to, 16, where);
  check_aligned(from, 16, where);
  if (bytes == 0 || bytes % 16 != 0) misuse("a bulk copy of no multiple of 16 bytes", where);
  if (!lies_in_shared(static_cast<const char*>(shared), bytes))
    misuse("a bulk copy that does not fit into shared memory", where);
}

void copy_words(void* to, const void* from, size_t bytes) {
  auto* const words = static_cast<volatile uint64_t*>(to);
  for (size_t i = 0; i < bytes / sizeof *words; ++i) words[i] = static_cast<const volatile uint64_t*>(from)[i];
}

void store_bytes(void* to, const void* from, uint32_t bytes, Where where) {
  check_bulk(to, from, from, bytes, where);
  ask({static_cast<char*>(to), {}, 0, 0, static_cast<const char*>(from), bytes, 0, 0}, where);
}

void store_tile(const void* map, const void* from, int32_t column, int32_t row, Where where) {
  const EmulatedMap found = check_tile(map, from, where);
  ask({nullptr, found, column, row, static_cast<const char*>(from), found.tile_bytes(), 0, 0}, where);
}

void stores_commit() { ++async().stores[current_thread()].group; }

void stores_wait(int groups_left, bool reads, Where where) {
  Stores& mine = async().stores[current_thread()];
  const int groups = mine.group - groups_left;  // that are over then
  uint32_t moment = 0;
  for (Stores::Asked& asked : mine.asked) {
    if (asked.group >= groups) break;
    reads ? take(asked) : put(asked);
    moment = asked.moment;
  }
  while (!reads && !mine.asked.empty() && mine.asked.front().group < groups) mine.asked.pop_front();
  if (groups_left == 0 && !mine.asked.empty() && mine.asked.back().group >= groups)
    misuse("a wait for bytes that no stores_commit has closed", where);
  if (moment != 0) {  // with a race detector
    Clock& clock = current_thread()->memory.clock;
    clock.join({nullptr, mine.reader->id, moment});
    if (!reads) clock.join({nullptr, mine.writer->id, moment});
  }
  this_block().moved();
  this_block().preempt();
}

}  // namespace tpk::emu
