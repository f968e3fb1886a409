#include "hopper.h"

#include <cuda.h>

#include <deque>
#include <limits>
#include <map>
#include <random>

#include "block.h"
#include "report.h"
#include "tensor_map_emu.h"

namespace tpk::emu {
namespace {

// A tile on its way.
struct Tile {
  char* to;
  EmulatedMap map;
  uint64_t* bar;
  int32_t column, row;
};

// Products of a thread that were asked for, oldest first, and what their sums were before.
struct Products {
  struct Asked {
    Product product;
    int group;
  };
  std::vector<Asked> asked;
  std::map<float*, std::vector<float>> sums;
  int group = 0;  // that is open
  size_t asked_for = 0, made = 0;
  bool begun = false;
};

struct NamedBarrier {
  uint64_t generation = 0;
  int expected = 0;
  std::vector<Thread*> met;
  Where where;
};

// A product as all threads of its warpgroup must ask for it.
struct Said {
  uint64_t a, b;
  bool accumulate;
  int columns;
  uint32_t line;
  bool operator==(const Said&) const = default;
};

// What a warp has read for one of its products, [k][row].
struct Decoded {
  size_t number = 0;
  std::vector<float> a, b;
};
constexpr size_t kKeptProducts = 32;

// Of the block that this OS thread runs.
struct Async {
  uint64_t launch = 0, block = ~uint64_t{0};
  std::mt19937_64 random;
  std::vector<Tile> tiles;
  std::map<Thread*, Products> products;
  std::map<uint32_t, std::deque<Decoded>> decoded;  // by warp
  std::map<uint32_t, std::vector<Said>> said;       // by warpgroup
  std::map<int, NamedBarrier> barriers;
};

Block& this_block() { return *current_thread()->block; }

Async& async() {
  static thread_local Async state;
  Block& block = this_block();
  const uint3 index = block.index();
  const dim3 grid = block.launch().request.grid;
  const uint64_t number = index.x + uint64_t{grid.x} * (index.y + uint64_t{grid.y} * index.z);
  if (state.launch != block.launch().number || state.block != number) {
    state = Async{};
    state.launch = block.launch().number, state.block = number;
    state.random.seed(options().seed * 77777 + state.launch * 131 + number);
  }
  return state;
}

// Whoever dies leaves nothing on its stack: it is not unwound.
[[noreturn]] void misuse(const char* text, const Where& where) {
  report(Kind::Misuse, this_block().name() + ": " + text + " at " + text_of(where));
  this_block().die(cudaErrorIllegalInstruction);
}

// ---- shared memory --------------------------------------------------------------------------------------------------

constexpr uintptr_t kPattern = 1024;

char* shared_base() {
  return reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(this_block().shared()) / kPattern * kPattern);
}

bool lies_in_shared(const char* from, size_t bytes) {
  const char* const start = this_block().shared();
  return from >= start && from + bytes <= start + this_block().launch().request.shared_bytes;
}

// Of a byte in rows of 128 bytes: the 16-byte word's number takes the row's number, modulo 8, by exclusive or.
uintptr_t swizzled(uintptr_t address) { return address ^ ((address >> 7 & 7) << 4); }

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
  Counts completed() const {
    if (pending > 0 || bytes != 0) return *this;
    return {phase ^ 1, arrivals, arrivals, 0};
  }
};

void bytes_came(uint64_t* bar, uint32_t bytes, Where where) {
  exchange(
      bar,
      [=](uint64_t bits) {
        Counts counts = Counts::of(bits);
        counts.bytes -= static_cast<int32_t>(bytes);
        return counts.completed().bits();
      },
      Order::Relaxed, Scope::Block, where);
}

// ---- tiles ----------------------------------------------------------------------------------------------------------

void bring(const Tile& tile, Where where) {
  const EmulatedMap& map = tile.map;
  for (uint32_t r = 0; r < map.box_rows; ++r) {
    const int64_t row = int64_t{tile.row} + r;
    for (uint32_t c = 0; c < map.box_columns; ++c) {
      const int64_t column = int64_t{tile.column} + c;
      uint16_t value = 0;
      if (row >= 0 && row < static_cast<int64_t>(map.rows) && column >= 0 &&
          column < static_cast<int64_t>(map.columns)) {
        std::memcpy(&value, map.base + static_cast<uint64_t>(row) * map.row_stride + static_cast<uint64_t>(column) * 2,
                    2);
      }
      // The pattern is one of addresses; rows begin at multiples of 128.
      const uintptr_t offset = static_cast<uintptr_t>(tile.to - shared_base()) + r * 128 + c * 2;
      std::memcpy(shared_base() + swizzled(offset), &value, 2);
    }
  }
  bytes_came(tile.bar, map.box_rows * map.box_columns * 2, where);
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

// ---- products -------------------------------------------------------------------------------------------------------

// The rows of an operand, 16 values each, from the bits of its descriptor.
void decode(uint64_t descriptor, uint32_t first, uint32_t rows, float (*value)(uint16_t), std::vector<float>& to,
            Where where) {
  const uintptr_t start = (descriptor & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  const uint64_t layout = descriptor >> 62, offset = descriptor >> 49 & 7;
  if (layout != 1 || offset != 0) misuse("an operand that is not in rows of 128 swizzled bytes", where);
  const char* const base = shared_base();
  to.resize(size_t{rows} * 16);
  for (uint32_t r = 0; r < rows; ++r) {
    const uintptr_t row = start + (first + r) / 8 * stride + (first + r) % 8 * 128;
    for (uint32_t half = 0; half < 2; ++half) {  // the swizzle keeps 16 bytes together
      const char* const from = base + swizzled(row + half * 16);
      if (!lies_in_shared(from, 16)) misuse("an operand that reaches beyond the block's shared memory", where);
      uint16_t bits[8];
      std::memcpy(bits, from, sizeof bits);
      for (uint32_t k = 0; k < 8; ++k) to[(half * 8 + k) * rows + r] = value(bits[k]);  // [k][row]
    }
  }
}

// What a warp multiplies, read when the first of its lanes makes the product: on the hardware they all do at once.
const Decoded& decoded(uint32_t warp, size_t number, const Product& asked, Where where) {
  std::deque<Decoded>& of_warp = async().decoded[warp];
  for (const Decoded& known : of_warp) {
    if (known.number == number) return known;
  }
  if (of_warp.size() >= kKeptProducts) of_warp.pop_front();
  of_warp.emplace_back();
  Decoded& fresh = of_warp.back();
  fresh.number = number;
  decode(asked.a, warp % 4 * 16, 16, asked.value, fresh.a, where);
  decode(asked.b, 0, static_cast<uint32_t>(asked.columns), asked.value, fresh.b, where);
  return fresh;
}

void make(const Product& asked, size_t number, std::vector<float>& sums, Where where) {
  const Thread& thread = *current_thread();
  const uint32_t lane = thread.lane(), columns = static_cast<uint32_t>(asked.columns);
  const Decoded& operands = decoded(thread.number / 32, number, asked, where);
  float* const d = sums.data();
  if (!asked.accumulate) std::fill(sums.begin(), sums.end(), 0.0f);
  for (uint32_t k = 0; k < 16; ++k) {
    const float upper = operands.a[k * 16 + lane / 4], lower = operands.a[k * 16 + lane / 4 + 8];
    const float* const column = operands.b.data() + k * columns + 2 * (lane % 4);
    for (uint32_t j = 0; j < columns / 8; ++j) {
      d[4 * j] += upper * column[8 * j], d[4 * j + 1] += upper * column[8 * j + 1];
      d[4 * j + 2] += lower * column[8 * j], d[4 * j + 3] += lower * column[8 * j + 1];
    }
  }
}

}  // namespace

uint32_t shared_address(const void* shared, Where where) {
  if (!lies_in_shared(static_cast<const char*>(shared), 1))
    misuse("an operand outside of dynamic shared memory", where);
  return static_cast<uint32_t>(static_cast<const char*>(shared) - shared_base());
}

void transaction_init(uint64_t* bar, uint32_t arrivals, Where where) {
  if (arrivals == 0) misuse("a barrier of no arrivals", where);
  store(bar, Counts{0, arrivals, arrivals, 0}.bits(), Order::Relaxed, Scope::Block, where);
}

void transaction_arrive(uint64_t* bar, uint32_t expected_bytes, Where where) {
  const uint64_t before = exchange(
      bar,
      [=](uint64_t bits) {
        Counts counts = Counts::of(bits);
        if (counts.pending == 0) return bits;
        counts.bytes += static_cast<int32_t>(expected_bytes);
        --counts.pending;
        return counts.completed().bits();
      },
      Order::AcquireRelease, Scope::Block, where);
  if (Counts::of(before).pending == 0) misuse("one arrival more than its barrier expects in a phase", where);
}

bool transaction_done(const uint64_t* bar, uint32_t parity, Where where) {
  if (Counts::of(load(bar, Order::Acquire, Scope::Block, where)).phase != parity) return true;
  bring_some(where);
  return false;
}

void load_tile(void* to, const void* map, uint64_t* bar, int32_t column, int32_t row, Where where) {
  const EmulatedMap found = EmulatedMap::of(map);
  Thread& thread = *current_thread();
  const size_t bytes = size_t{found.box_rows} * found.box_columns * 2;
  if (!found.is_valid()) misuse("a tensor map that was never encoded", where);
  if (reinterpret_cast<uintptr_t>(map) % 64 != 0) misuse("a tensor map at no multiple of 64", where);
  if (!lies_in_shared(static_cast<char*>(to), bytes)) misuse("a tile that does not fit into shared memory", where);
  if ((static_cast<char*>(to) - shared_base()) % kPattern != 0)
    misuse("a tile that does not begin at a multiple of 1024", where);
  if (thread.acquired) {
    misuse("a tile is asked for after an acquire without fence_async: what others stored need not be seen", where);
  }
  if (detector() != nullptr) {
    for (uint64_t r = 0; r < found.box_rows; ++r) {
      const int64_t at = int64_t{row} + static_cast<int64_t>(r);
      if (at < 0 || at >= static_cast<int64_t>(found.rows) || column >= static_cast<int64_t>(found.columns)) continue;
      const uint64_t values = std::min<uint64_t>(found.box_columns, found.columns - static_cast<uint64_t>(column));
      const char* const from =
          found.base + static_cast<uint64_t>(at) * found.row_stride + static_cast<uint64_t>(column) * 2;
      detector()->access(thread, reinterpret_cast<uintptr_t>(from), values * 2, false,
                         reinterpret_cast<uintptr_t>(__builtin_return_address(0)));
    }
  }
  async().tiles.push_back({static_cast<char*>(to), found, bar, column, row});
}

void fence_async(Where) {
  current_thread()->acquired = false;
  this_block().preempt();
}

void products_begin() { async().products[current_thread()].begun = true; }

void product(const Product& asked, Where where) {
  Async& state = async();
  Thread& thread = *current_thread();
  Products& mine = state.products[&thread];
  if (!mine.begun) misuse("a product that no products_begin comes before", where);
  std::vector<Said>& said = state.said[thread.number / 128];
  const Said now{asked.a, asked.b, asked.accumulate, asked.columns, where.line()};
  if (mine.asked_for == said.size()) said.push_back(now);
  if (said[mine.asked_for++] != now) {
    report(Kind::Divergence,
           this_block().name() + ": threads of a warpgroup ask for different products at " + text_of(where));
    this_block().die(cudaErrorIllegalInstruction);
  }
  const auto count = static_cast<size_t>(asked.columns / 2);
  if (mine.sums.find(asked.d) == mine.sums.end()) {
    mine.sums[asked.d].assign(asked.d, asked.d + count);
    std::fill_n(asked.d, count, std::numeric_limits<float>::quiet_NaN());
  }
  mine.asked.push_back({asked, mine.group});
}

void products_commit() { ++async().products[current_thread()].group; }

void products_wait(int groups_left, Where where) {
  Products& mine = async().products[current_thread()];
  size_t done = 0;
  for (; done < mine.asked.size() && mine.asked[done].group < mine.group - groups_left; ++done) {
    const Product& asked = mine.asked[done].product;
    make(asked, mine.made++, mine.sums[asked.d], where);
  }
  mine.asked.erase(mine.asked.begin(), mine.asked.begin() + static_cast<ptrdiff_t>(done));
  // A warp waits as one: its lanes go on when the products of all of them are made.
  meet_warp(0xffffffffu, {}, finish_ballot, where);
  if (!mine.asked.empty()) return;
  for (const auto& [d, sums] : mine.sums) std::copy(sums.begin(), sums.end(), d);
  mine.sums.clear();
  mine.begun = false;
}

void meet_some(int id, int threads, Where where) {
  if (id < 0 || id > 15 || threads <= 0 || threads % 32 != 0)
    misuse("a barrier of some threads: 0 .. 15, whole warps", where);
  NamedBarrier& barrier = async().barriers[id];
  Thread& thread = *current_thread();
  if (barrier.met.empty()) barrier.expected = threads, barrier.where = where;
  if (barrier.expected != threads) misuse("a barrier that others meet with another number of threads", where);
  barrier.met.push_back(&thread);
  const uint64_t generation = barrier.generation;
  thread.where = where, thread.polled = &barrier;
  if (static_cast<int>(barrier.met.size()) == threads) {
    if (detector() != nullptr) detector()->meet(barrier.met);
    barrier.met.clear();
    ++barrier.generation;
    this_block().moved();
    return;
  }
  while (barrier.generation == generation) this_block().yield(Doing::Polling);
}

}  // namespace tpk::emu
