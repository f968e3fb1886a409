// Barriers that count bytes, tiles that come by themselves, barriers of some threads.
#include "async.h"
#include "report.h"

namespace tpk::emu {
namespace {

constexpr uint32_t kMostBytes = (1 << 20) - 1;  // that a phase can expect

// ---- barriers that count bytes --------------------------------------------------------------------------------------

// The words of a barrier as this emulator packs them.
struct Counts {
  uint32_t phase, arrivals, pending;
  int32_t bytes;

  static Counts of(uint64_t bits) {
    return {static_cast<uint32_t>(bits >> 63), static_cast<uint32_t>(bits >> 44 & 0x7ffff),
            static_cast<uint32_t>(bits >> 24 & 0xfffff), static_cast<int32_t>(static_cast<uint32_t>(bits) << 8) >> 8};
  }
  uint64_t bits() const {
    return uint64_t{phase} << 63 | uint64_t{arrivals} << 44 | uint64_t{pending} << 24 |
           (static_cast<uint32_t>(bytes) & 0xffffff);
  }
};

Counter& counter_of(const uint64_t* bar, Where where) {
  const auto found = async().counters.find(bar);
  if (found == async().counters.end()) misuse("a barrier that was never initialised", where);
  Counter& counter = found->second;
  const Clock& mine = current_thread()->memory.clock;
  if (detector() != nullptr && !mine.knows(counter.made.id, counter.made.now))
    misuse("a barrier that another thread initialises, with nothing in between", where);
  return counter;
}

// Ends the phase if nothing is missing any more.
void complete(uint64_t* bar, Counter& counter, Counts counts, Where where) {
  if (counts.pending > 0 || counts.bytes != 0) {
    *bar = counts.bits();
    return;
  }
  *bar = Counts{counts.phase ^ 1, counts.arrivals, counts.arrivals, 0}.bits();
  counter.completed = counter.arriving.snapshot();
  for (const Tile& tile : async().tiles) {
    if (tile.bar == bar) misuse("a phase that is over while a tile of it is on its way: bytes nobody expected", where);
  }
}

// ---- tiles ----------------------------------------------------------------------------------------------------------

void land(const Tile& tile) {
  if (tile.from != nullptr) {
    copy_words(tile.to, tile.from, tile.bytes);
    return;
  }
  // The pattern is one of addresses; rows begin at multiples of 128.
  const auto place_of = [&](size_t at) {
    const uintptr_t offset = static_cast<uintptr_t>(tile.to - shared_base()) + at;
    return shared_base() + (options().planted_swizzle ? swizzled(offset + 128) - 128 : swizzled(offset));
  };
  for (uint32_t at = 0; at < tile.bytes; ++at) *place_of(at) = 0;
  tile.map.each_row_inside(tile.column, tile.row, [&](const char* from, uint32_t r, size_t first, size_t bytes) {
    for (size_t i = 0; i < bytes; ++i) *place_of(r * 128 + first + i) = from[i];
  });
}

void bring(const Tile& tile, Where where) {
  if (!tile.has_landed) land(tile);
  Counter& counter = async().counters[tile.bar];
  if (counter.agent != nullptr) counter.arriving.join({nullptr, counter.agent->id, tile.moment});
  Counts counts = Counts::of(*tile.bar);
  counts.bytes -= static_cast<int32_t>(tile.bytes);
  complete(tile.bar, counter, counts, where);
}

// Some of the tiles that are on their way come.
void bring_some(Where where) {
  Async& state = async();
  while (!state.tiles.empty()) {
    if (options().seed != 0 && state.random() % 2 == 0) return;
    const size_t i = options().seed == 0 ? 0 : state.random() % state.tiles.size();
    const Tile tile = state.tiles[i];
    state.tiles.erase(state.tiles.begin() + static_cast<ptrdiff_t>(i));
    bring(tile, where);
    this_block().moved();
    if (options().seed == 0) return;
  }
}

void watch_source(const Tile& tile, const Clock& clock, Where where) {
  Thread& thread = *current_thread();
  if (tile.from != nullptr) return detector()->async_access(thread, clock, tile.from, tile.bytes, false, where);
  tile.map.each_row_inside(tile.column, tile.row, [&](const char* from, uint32_t, size_t, size_t bytes) {
    detector()->async_access(thread, clock, from, bytes, false, where);
  });
}

// For the race detector: what the tile is read from, and where it is written, from now until its phase is over.
uint32_t watch(const Tile& tile, Counter& counter, Where where) {
  Thread& thread = *current_thread();
  if (counter.agent == nullptr) {
    counter.agent = &agent_of(this_block(), async().agents++, "tiles of a barrier");
  }
  ++counter.agent->last;
  const Clock clock = clock_of(*counter.agent);
  watch_source(tile, clock, where);
  detector()->async_access(thread, clock, tile.to, tile.bytes, true, where);
  return clock.now;
}

void set_going(Tile tile, Where where) {
  if (current_thread()->acquired) {
    misuse("bytes are asked for after an acquire without fence_async: what others stored need not be seen", where);
  }
  Counter& counter = counter_of(tile.bar, where);
  if (!counter.is_published) misuse("bytes for a barrier that no transaction_init_done has published", where);
  if (detector() != nullptr) tile.moment = watch(tile, counter, where);
  if (tile.has_landed) land(tile);
  async().tiles.push_back(tile);
  this_block().preempt();
}

}  // namespace

uint32_t shared_address(const void* shared, Where where) {
  if (!lies_in_shared(static_cast<const char*>(shared), 1))
    misuse("an operand outside of dynamic shared memory", where);
  return static_cast<uint32_t>(static_cast<const char*>(shared) - shared_base());
}

void transaction_init(uint64_t* bar, uint32_t arrivals, Where where) {
  if (arrivals == 0 || arrivals > kMostBytes) misuse("a barrier of no arrivals, or of more than 2^20 - 1", where);
  check_aligned(bar, sizeof *bar, where);
  Thread& thread = *current_thread();
  Counter& counter = async().counters[bar];
  counter = Counter{};
  counter.maker = &thread, counter.made = thread.memory.clock.snapshot();
  thread.memory.clock.tick();
  *bar = Counts{0, arrivals, arrivals, 0}.bits();
  this_block().moved();
}

void transaction_init_done(Where where) {
  for (auto& [bar, counter] : async().counters) {
    if (counter.maker == current_thread()) counter.is_published = true;
  }
  for (Space space : {Space::Global, Space::Shared}) fence_async(space, where);
}

void transaction_arrive(uint64_t* bar, uint32_t expected_bytes, Where where) {
  Counter& counter = counter_of(bar, where);
  Counts counts = Counts::of(*bar);
  if (expected_bytes > kMostBytes) misuse("more bytes than a phase can expect", where);
  if (counts.pending == 0) misuse("one arrival more than its barrier expects in a phase", where);
  if (detector() != nullptr) {
    Clock& mine = current_thread()->memory.clock;
    counter.arriving.join(mine.snapshot());
    mine.tick();
  }
  counts.bytes += static_cast<int32_t>(expected_bytes);
  --counts.pending;
  complete(bar, counter, counts, where);
  after_store(*current_thread());
}

bool transaction_done(const uint64_t* bar, uint32_t parity, Where where) {
  const Counter& counter = counter_of(bar, where);
  const uint64_t bits = *bar;
  const bool done = Counts::of(bits).phase != parity;
  if (done && detector() != nullptr) current_thread()->memory.clock.join(counter.completed);
  after_load(*current_thread(), bar, bits, where);
  if (!done) bring_some(where);
  return done;
}

EmulatedMap check_tile(const void* map, const void* shared, Where where) {
  const EmulatedMap found = EmulatedMap::of(map);
  if (!found.is_valid()) misuse("a tensor map that was never encoded", where);
  if (reinterpret_cast<uintptr_t>(map) % 64 != 0) misuse("a tensor map at no multiple of 64", where);
  const char* const first = static_cast<const char*>(shared);
  if (!lies_in_shared(first, found.tile_bytes())) misuse("a tile that does not fit into shared memory", where);
  if ((first - shared_base()) % kPattern != 0) misuse("a tile that does not begin at a multiple of 1024", where);
  return found;
}

void load_tile(void* to, const void* map, uint64_t* bar, int32_t column, int32_t row, Where where) {
  const EmulatedMap found = check_tile(map, to, where);
  // Under half of the seeds at once, so that what is overwritten too early shows.
  set_going({static_cast<char*>(to), found, bar, column, row, nullptr, static_cast<uint32_t>(found.tile_bytes()),
             options().seed % 2 != 0, 0},
            where);
}

void load_bytes(void* to, const void* from, uint32_t bytes, uint64_t* bar, Where where) {
  check_bulk(to, from, to, bytes, where);
  set_going({static_cast<char*>(to), {}, bar, 0, 0, static_cast<const char*>(from), bytes, options().seed % 2 != 0, 0},
            where);
}

void prefetch(const void* map, Where where) {
  if (!EmulatedMap::of(map).is_valid()) misuse("a tensor map that was never encoded", where);
}

void fence_async(Space space, Where) {
  if (space == Space::Global) current_thread()->acquired = false;
  if (detector() != nullptr) current_thread()->memory.clock.fence_async(space);
  this_block().preempt();
}

// A warp must have come as a whole when the last has.
void sync_named(int id, int threads, Where where) {
  if (id < 1 || id > 15 || threads <= 0 || threads % 32 != 0)
    misuse("a barrier of some threads: 1 .. 15 (0 is __syncthreads), whole warps", where);
  NamedBarrier& barrier = async().barriers[id];
  Thread& thread = *current_thread();
  if (barrier.threads.empty()) barrier.expected = threads;
  if (barrier.expected != threads) misuse("a barrier that other threads wait at with another number", where);
  barrier.threads.push_back(&thread);
  const uint64_t generation = barrier.generation;
  thread.where = where, thread.polled = &barrier;
  if (static_cast<int>(barrier.threads.size()) == threads) {
    std::map<uint32_t, int> lanes;
    for (Thread* other : barrier.threads) ++lanes[other->number / 32], other->seen.clear();
    if (static_cast<int>(lanes.size()) * 32 != threads) misuse("a barrier with parts of warps", where);
    if (detector() != nullptr) detector()->synchronize(barrier.threads);
    barrier.threads.clear();
    ++barrier.generation;
    this_block().moved();
    return;
  }
  while (barrier.generation == generation) this_block().yield(Doing::Polling);
}

void registers(int each) { async().registers[current_thread()->number / 128] = each; }

// The hardware does not say which one.
bool one_of_warp(Where where) {
  sync_warp(0xffffffffu, {}, finish_ballot, where);
  const Thread& thread = *current_thread();
  return thread.lane() == (thread.block->threads().size() < 32 ? 0 : options().seed % 32);
}

}  // namespace tpk::emu
