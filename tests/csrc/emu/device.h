// Emulated devices and what runs on them: one Device for each rank, one Launch for each kernel that was started.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <set>
#include <vector>

#include "clock.h"
#include "control.h"
#include "emu.h"

namespace tpk::emu {

class Block;
struct Stream;

struct Device {
  explicit Device(int rank) : rank(rank) {}
  const int rank;
  std::atomic<cudaError_t> error{cudaSuccess};  // sticky; whatever runs here stops when it is set
  // The rest under mutex().
  int resident = 0;              // blocks that run
  std::multiset<int> waiting;    // priorities of the streams whose blocks wait for room (lower goes first)
  std::vector<Stream*> streams;  // that were not destroyed
  Stream* default_stream = nullptr;
};

// A kernel on its way: made when it is enqueued, gone when its last block has ended.
struct Launch {
  LaunchRequest request;
  Device* device = nullptr;
  Stream* stream = nullptr;
  uint64_t number = 0;  // counts the launches of the process; shuffles differ by it
  // The race detector's: what its threads know when they start, and at what moment that is.
  std::shared_ptr<Moments> base;
  uint32_t first_moment = 0;
  // Under mutex().
  uint64_t next_block = 0, done_blocks = 0;
  std::vector<Block*> running;
  std::vector<Clock> ends;  // of the threads of blocks that are done

  uint64_t blocks() const { return uint64_t{request.grid.x} * request.grid.y * request.grid.z; }
  uint32_t threads() const { return request.block.x * request.block.y * request.block.z; }
};

// One lock for devices, streams, events and launches, and one condition for every change of them.
std::mutex& mutex();
std::condition_variable& changed();

Device& device(int rank);
Device& current_device();
void set_current_device(int rank);
std::list<Launch*>& live_launches();

// Runs the blocks of a launch and returns when all have ended or the device failed. Called by the stream's thread.
void run_launch(Launch& launch);

// The device fails with this error, which stays: what runs on it stops at its next barrier or atomic.
void fail(Device& device, cudaError_t error);

}  // namespace tpk::emu
