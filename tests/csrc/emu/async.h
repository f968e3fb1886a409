// What a block's threads have set going beside themselves, and who stands for it in the race detector. For hopper.cpp,
// products.cpp and stores.cpp.
#pragma once

#include <deque>
#include <map>
#include <random>

#include "block.h"
#include "hopper.h"
#include "tensor_map_emu.h"

namespace tpk::emu {

constexpr uintptr_t kPattern = 1024;  // of the 128-byte swizzle: a tile begins with it

// One that reads and writes beside the threads, as the race detector knows it.
struct Agent {
  uint32_t id = 0, last = 0;
};

// A tile on its way, or bytes of a bulk copy.
struct Tile {
  char* to;
  EmulatedMap map;
  uint64_t* bar;
  int32_t column, row;
  const char* from;  // of bytes, which have no map
  uint32_t bytes;    // in all
  bool has_landed;   // but nobody knows yet
  uint32_t moment;   // of the barrier's agent
};

// What a barrier that counts bytes has beside its 8 bytes: who knows what, for the race detector.
struct Counter {
  const Thread* maker = nullptr;
  bool is_published = false;  // to the asynchronous proxy
  Snapshot made;
  Clock arriving;      // of all who have arrived and all that has come
  Snapshot completed;  // of that at the end of the last phase
  Agent* agent = nullptr;
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

// What a warp has read for one of its products, [k][row].
struct Decoded {
  size_t number = 0;
  std::vector<float> a, b;
};

// Of a warp.
struct WarpProducts {
  std::deque<Decoded> decoded;
  size_t watched = 0;  // products whose operands the race detector knows to be read
  Agent* agent = nullptr;
  uint32_t before = 0;  // the agent's last moment before this block
};

// Bulk copies and tiles of a thread out of shared memory, oldest first.
struct Stores {
  struct Asked {
    char* to;  // of bytes; of a tile its map and its place there
    EmulatedMap map;
    int32_t column, row;
    const char* from;
    size_t bytes;
    int group;
    uint32_t moment;                   // of both agents
    std::vector<uint64_t> taken = {};  // what was read, once it was
    bool is_there = false;
  };
  std::deque<Asked> asked;
  int group = 0;  // that is open
  Agent *reader = nullptr, *writer = nullptr;
};

struct NamedBarrier {
  uint64_t generation = 0;
  int expected = 0;
  std::vector<Thread*> threads;
};

// A product as all threads of its warpgroup must ask for it.
struct Request {
  uint64_t a, b;
  bool accumulate, b_transposed;
  int columns;
  uint32_t line;
  bool operator==(const Request&) const = default;
};

// Of the block that this OS thread runs.
struct Async {
  uint64_t launch = 0, block = ~uint64_t{0};
  std::mt19937_64 random;
  uint32_t agents = 0;  // of barriers
  std::vector<Tile> tiles;
  std::map<const uint64_t*, Counter> counters;
  std::map<Thread*, Products> products;
  std::map<Thread*, Stores> stores;
  std::map<uint32_t, WarpProducts> warps;
  std::map<uint32_t, std::vector<Request>> requests;  // by warpgroup
  std::map<uint32_t, int> registers;                  // by warpgroup, where it has set them
  std::map<int, NamedBarrier> barriers;
};

uint64_t number_of(Block& block);
Async& async_of(Block& block);
inline Block& this_block() { return *current_thread()->block; }
inline Async& async() { return async_of(this_block()); }

// A thread that ends so has nothing on its stack: it is not unwound.
[[noreturn]] void misuse(const char* text, const Where& where);

// The one of that number among those of the block. The same in the next launch on the stream.
Agent& agent_of(Block& block, uint32_t number, const char* what);
void forget_agents();

// What it knows when the running thread sets it going.
Clock clock_of(const Agent& agent);

// ---- bytes that move by themselves
// Not by memcpy, which the race detector takes for an access of the running thread.
void copy_words(void* to, const void* from, size_t bytes);
// A tile's map, if it and the place of the tile are what the hardware takes.
EmulatedMap check_tile(const void* map, const void* shared, Where where);
// Of a bulk copy: places and sizes are multiples of 16, and one of the places lies in shared memory.
void check_bulk(const void* to, const void* from, const void* shared, uint32_t bytes, Where where);

// ---- shared memory
char* shared_base();  // where addresses in shared memory count from
bool lies_in_shared(const char* from, size_t bytes);

// Of a byte in rows of 128 bytes: the 16-byte word's number takes the row's number, modulo 8, by exclusive or.
inline uintptr_t swizzled(uintptr_t address) { return address ^ ((address >> 7 & 7) << 4); }

}  // namespace tpk::emu
