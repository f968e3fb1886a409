// A block: its threads as fibers of one OS thread, the scheduler that runs them in turn, and their barriers.
#pragma once

#include <array>
#include <random>

#include "detector.h"
#include "device.h"
#include "fiber.h"

namespace tpk::emu {

class Block;

enum class Doing : uint8_t { Running, AtBarrier, AtWarp, Polling, Done };

// One CUDA thread.
struct Thread {
  Block* block = nullptr;
  uint32_t number = 0;  // in the block
  uint3 index{};
  Context context;
  Doing doing = Doing::Running;
  Where where;                   // of what it does
  const void* polled = nullptr;  // the address it waits for
  bool acquired = false;         // what others stored, and has not made the asynchronous loads see it
  uint64_t result = 0;           // of a operation
  // What it has loaded since it last did something else: to load the same again is to wait.
  std::vector<std::pair<const void*, uint64_t>> seen;
  ThreadMemory memory;  // the race detector's

  uint32_t lane() const { return number % 32; }
};

class Block {
 public:
  Block(Launch& launch, uint64_t number, const Stacks& stacks);
  void run();

  Launch& launch() { return launch_; }
  const uint3& index() const { return index_; }
  char* shared() { return shared_.get(); }
  std::vector<Thread>& threads() { return threads_; }
  const Stacks& stacks() const { return stacks_; }
  SharedMemory& shared_memory() { return *shared_memory_; }

  // Called by the running thread.
  void started(Thread& thread);
  int sync(Vote vote, bool holds, Where where);
  uint64_t sync_warp(uint32_t mask, Post post, Finish finish, bool fences, Where where);
  void yield(Doing doing);
  void moved() { progress_.store(progress_.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed); }
  void preempt();
  [[noreturn]] void die(cudaError_t error);
  [[noreturn]] void end_thread();

  // For the watchdog, while the block runs. The text is exact only when nobody moves.
  uint64_t progress() const { return progress_.load(std::memory_order_relaxed); }
  uint64_t idle_rounds() const { return idle_rounds_.load(std::memory_order_relaxed); }
  std::string describe() const;
  std::string name() const;

 private:
  struct WarpOperation {
    uint32_t mask = 0, arrived = 0;
    Finish finish = nullptr;
    bool fences = false;
    Where where;
    std::array<Post, 32> posts{};
  };

  void round(std::vector<Thread*>& ready);
  void wait_for_others(uint64_t idle);
  void finish_barrier();
  void finish_warp(size_t warp, size_t operation);
  std::string mask_problem(const Thread& thread, uint32_t mask, Finish finish, const Where& where) const;
  void diverged(const std::string& text);
  bool is_any_alive(size_t warp, uint32_t lanes) const;

  Launch& launch_;
  const uint3 index_;
  const Stacks& stacks_;
  std::unique_ptr<char, void (*)(void*)> shared_;
  std::unique_ptr<SharedMemory> shared_memory_;
  std::vector<Thread> threads_;
  Context scheduler_;
  std::vector<Thread*> woken_;
  std::mt19937_64 random_;
  std::atomic<uint64_t> progress_{0}, idle_rounds_{0};

  uint32_t alive_ = 0, at_barrier_ = 0, votes_ = 0;
  Vote vote_ = Vote::None;
  Where barrier_;
  std::vector<std::vector<WarpOperation>> warps_;  // operations of each warp that are not complete
};

// What a thread does after it has loaded something that it may be waiting for, or changed what others may wait for.
void after_load(Thread& thread, const void* address, uint64_t value, const Where& where);
void after_store(Thread& thread);

// What the block's threads have set going must be over.
void end_async(Block& block);

// The CUDA thread that this OS thread runs at the moment, or nullptr.
Thread* current_thread();

}  // namespace tpk::emu
