// What the emulator tells the race detector. Without one (nothing linked in), detector() is nullptr.
#pragma once

#include <array>
#include <memory>
#include <string>

#include "clock.h"
#include "emu.h"

namespace tpk::emu {

class Block;
struct Launch;
struct Thread;

// The detector's part of a thread. Scopes are indices: what a fence of that scope covers.
struct ThreadMemory {
  Clock clock;
  std::array<Snapshot, 3> fenced;  // what later relaxed stores publish
  std::array<Clock, 3> unfenced;   // what relaxed loads have seen and a fence would acquire
};

// Everything known of the shared memory of a block.
class SharedMemory {
 public:
  virtual ~SharedMemory() = default;
};

class Detector {
 public:
  virtual ~Detector() = default;

  virtual std::unique_ptr<SharedMemory> enter_block(Block& block) = 0;
  virtual void begin_launch(Launch& launch) = 0;  // by the stream, before its first block
  virtual void end_launch(Launch& launch) = 0;

  // One plain access by the running thread.
  virtual void access(Thread& thread, uintptr_t address, size_t bytes, bool writes, uintptr_t code) = 0;
  // By what works beside the threads of the running thread's block, which knows what `clock` says.
  virtual void async_access(Thread& thread, const Clock& clock, const void* memory, size_t bytes, bool writes,
                            const Where& where) = 0;
  // By a stream: a copy or a fill.
  virtual void stream_access(const Clock& clock, const void* memory, size_t bytes, bool writes) = 0;

  // Around an atomic access, in one piece for all who access the same place.
  virtual void begin_atomic(Thread& thread, const void* address) = 0;
  virtual void end_atomic(Thread& thread, const void* address, size_t bytes, Atomic::Kind kind, Order order,
                          Scope scope, const Where& where) = 0;
  virtual void fence(Thread& thread, Scope scope) = 0;
  // All of them know what each of them did before.
  virtual void synchronize(const std::vector<Thread*>& threads) = 0;

  // What is found again is reported again.
  virtual void forget_reports() = 0;

  // All of it, when no stream, event, graph or allocation is left: clocks get as long as there were ids.
  virtual void forget() = 0;

  // Names for streams and host threads in vector clocks.
  virtual uint32_t new_id(const std::string& name) = 0;
};

Detector* detector();
void set_detector(Detector* detector);

}  // namespace tpk::emu
