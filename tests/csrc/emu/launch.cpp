// Devices, the blocks of a launch as OS threads, and the watchdog.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <numeric>
#include <thread>

#include <unistd.h>

#include "block.h"
#include "report.h"
#include "stream.h"

namespace tpk::emu {
namespace {

Options& the_options() {
  static auto* const all = new Options;
  return *all;
}

std::vector<std::unique_ptr<Device>>& devices() {
  static auto* const all = new std::vector<std::unique_ptr<Device>>;
  return *all;
}

// ---- blocks ---------------------------------------------------------------------------------------------------------

// The next block, as soon as the device has room for it. False when there is none, or the device has failed.
bool take_block(Launch& launch, const std::vector<uint64_t>& order, uint64_t& number) {
  std::unique_lock lock(mutex());
  Device& device = *launch.device;
  const auto waits = device.waiting.insert(launch.stream->priority);
  changed().wait(lock, [&] {
    if (launch.next_block == order.size() || device.error.load() != cudaSuccess) return true;
    return device.resident < options().resident_blocks && *device.waiting.begin() == launch.stream->priority;
  });
  device.waiting.erase(waits);
  changed().notify_all();  // launches of a lower priority
  if (launch.next_block == order.size() || device.error.load() != cudaSuccess) return false;
  ++device.resident;
  number = order[launch.next_block++];
  return true;
}

void run_blocks(Launch& launch, const std::vector<uint64_t>& order) {
  std::unique_ptr<Stacks> stacks;
  for (uint64_t number; take_block(launch, order, number);) {
    if (stacks == nullptr) stacks = std::make_unique<Stacks>(launch.threads());
    Block block(launch, number, *stacks);
    {
      const std::lock_guard lock(mutex());
      launch.running.push_back(&block);
    }
    block.run();
    const std::lock_guard lock(mutex());
    launch.running.erase(std::find(launch.running.begin(), launch.running.end(), &block));
    for (Thread& thread : block.threads()) {
      if (detector() != nullptr) launch.ends.push_back(thread.memory.clock);
    }
    --launch.device->resident;
    ++launch.done_blocks;
    changed().notify_all();
  }
}

// ---- the watchdog ---------------------------------------------------------------------------------------------------

class Watchdog {
 public:
  // Called under mutex() by those who start a launch.
  void start() {
    if (!started_) std::thread([this] { watch(); }).detach();
    started_ = true;
  }

 private:
  using Clock = std::chrono::steady_clock;

  void watch() {
    while (true) {
      usleep(20000);
      const std::lock_guard lock(mutex());
      look();
    }
  }

  void look() {
    uint64_t moves = finished_ops();
    std::vector<const Block*> blocks;
    for (const Launch* launch : live_launches()) {
      moves += launch->number + launch->done_blocks + launch->next_block;
      for (const Block* block : launch->running) {
        moves += block->progress();
        blocks.push_back(block);
      }
    }
    if (moves != moves_ || blocks != blocks_ || blocks.empty()) {
      moves_ = moves, blocks_ = blocks, since_ = Clock::now();
      rounds_.clear();
      for (const Block* block : blocks) rounds_.push_back(block->idle_rounds());
      return;
    }
    // On a busy machine a block may just not have had its turn.
    bool all_idle = true;
    for (size_t i = 0; i < blocks.size(); ++i) all_idle &= blocks[i]->idle_rounds() > rounds_[i] + 20;
    const std::chrono::duration<double> still = Clock::now() - since_;
    if (still.count() > options().timeout_s && all_idle) give_up();
    if (still.count() > 10 * options().timeout_s + 10) {
      std::fprintf(stderr, "emulator: a thread neither moves nor polls; it cannot be stopped\n%s", dump().c_str());
      std::fflush(nullptr);
      _exit(86);
    }
  }

  std::string dump() const {
    std::string text;
    for (const Launch* launch : live_launches()) {
      for (const Block* block : launch->running) text += "\n  " + block->describe();
      if (launch->next_block < launch->blocks()) {
        text += "\n  rank " + std::to_string(launch->device->rank) + " " +
                text_of_kernel(launch->request.kernel, launch->request.name) + ": " +
                std::to_string(launch->blocks() - launch->next_block) + " of " + std::to_string(launch->blocks()) +
                " blocks wait for room on a device of " + std::to_string(options().resident_blocks);
      }
    }
    return text;
  }

  void give_up() {
    report(Kind::Deadlock, "nobody has moved for " + std::to_string(options().timeout_s) + " s" + dump());
    for (Launch* launch : live_launches()) launch->device->error = cudaErrorLaunchTimeout;
    changed().notify_all();
    since_ = Clock::now();
  }

  bool started_ = false;
  uint64_t moves_ = 0;
  std::vector<const Block*> blocks_;
  std::vector<uint64_t> rounds_;
  Clock::time_point since_ = Clock::now();
};

}  // namespace

const Options& options() { return the_options(); }
void configure(const Options& options) { the_options() = options; }

std::mutex& mutex() {
  static auto* const one = new std::mutex;
  return *one;
}

std::condition_variable& changed() {
  static auto* const one = new std::condition_variable;
  return *one;
}

std::list<Launch*>& live_launches() {
  static auto* const all = new std::list<Launch*>;
  return *all;
}

Device& device(int rank) {
  static std::mutex making;
  const std::lock_guard lock(making);
  while (static_cast<int>(devices().size()) <= rank) {
    devices().push_back(std::make_unique<Device>(static_cast<int>(devices().size())));
  }
  return *devices()[static_cast<size_t>(rank)];
}

void fail(Device& device, cudaError_t error) {
  cudaError_t none = cudaSuccess;
  device.error.compare_exchange_strong(none, error);
  const std::lock_guard lock(mutex());
  changed().notify_all();
}

void run_launch(Launch& launch) {
  static auto* const watchdog = new Watchdog;
  std::vector<uint64_t> order(launch.blocks());
  std::iota(order.begin(), order.end(), uint64_t{0});
  if (options().seed != 0) {
    std::mt19937_64 random(options().seed * 7919 + launch.number * 31 + static_cast<uint64_t>(launch.device->rank));
    std::shuffle(order.begin(), order.end(), random);
  }
  if (detector() != nullptr) detector()->begin_launch(launch);
  {
    const std::lock_guard lock(mutex());
    live_launches().push_back(&launch);
    watchdog->start();
  }
  std::vector<std::thread> workers(std::min<uint64_t>(order.size(), static_cast<uint64_t>(options().resident_blocks)));
  for (std::thread& worker : workers) worker = std::thread([&] { run_blocks(launch, order); });
  for (std::thread& worker : workers) worker.join();
  {
    const std::lock_guard lock(mutex());
    live_launches().remove(&launch);
  }
  if (detector() != nullptr) detector()->end_launch(launch);
}

}  // namespace tpk::emu
