// What tests ask of the emulator: how it schedules, how many ranks there are, what it found. No kernel includes this.
//
// A rank is an emulated device; every host thread has a current one (cudaSetDevice). Whatever the emulator finds wrong
// becomes a report that a test takes. Reports that nobody takes make the process end with status 86.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace tpk::emu {

struct Options {
  int ranks = 8;
  int resident_blocks = 64;      // of one rank at a time: the capacity of the emulated device
  uint64_t seed = 0;             // 0: blocks and threads by index; others: shuffled, and preempted at atomics
  double timeout_s = 20.0;       // nobody moves for so long: the watchdog reports who waits where
  bool loud = true;              // reports go to stderr, too, when they are found
  bool planted_swizzle = false;  // a mistake of the emulator's own: tiles land with every row's words as the next one's
};

// Only while nothing runs.
void configure(const Options& options);
const Options& options();

enum class Kind { Race, Scope, Uninitialised, Divergence, Deadlock, Misaligned, Overflow, Misuse };
const char* name_of(Kind kind);

struct Report {
  Kind kind;
  std::string text;
};

// What was found since they were last taken.
std::vector<Report> take_reports();
size_t count(Kind kind);
inline size_t races() { return count(Kind::Race); }
// Whether this program was linked with the race detector.
bool detects_races();

// Waits for every stream, frees what was allocated, forgets streams, errors and reports. Handles of before are invalid.
void reset();

// body(rank) in a host thread for each rank, with that rank as its device. Rethrows the first exception.
void run_ranks(int ranks, const std::function<void(int rank)>& body);

// For the race detector: what any host thread has waited for so far comes before what this thread enqueues next. Call
// it after a barrier between host threads, which the emulator does not see. run_ranks does it at both ends.
void host_threads_met();

// Memory that others allocated (a tensor of torch) counts as memory of a rank from now on, until it is disowned.
void own(void* memory, size_t bytes, int rank);
void disown(void* memory);

// Tensor maps that the driver has made so far.
size_t encoded_maps();

// An address range that stands for the same place at every rank, as the switch's multicast mapping does.
void* multicast(const std::vector<void*>& memory, size_t bytes);

}  // namespace tpk::emu
