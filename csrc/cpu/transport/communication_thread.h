// The thread of a group that moves bytes while the calling thread multiplies. Torch-free.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>

namespace tpk {

// Runs one job at a time and sleeps in between; the first job creates the thread. It takes no signals, so that their
// handlers run where they would without it. In a forked child it does not exist: there the object must be neither used
// nor destroyed (Communicator::is_of_this_process).
class CommunicationThread {
 public:
  CommunicationThread() = default;
  ~CommunicationThread();  // after its job has ended
  CommunicationThread(const CommunicationThread&) = delete;
  CommunicationThread& operator=(const CommunicationThread&) = delete;

  // Returns when the job has begun: a thread that only goes on computing may keep it from the core that they share.
  void start(std::function<void()> job);
  // Whether the job has ended, in most cases because it has failed.
  bool has_ended();
  // Waits until the job has ended; throws what it has thrown.
  void finish();

 private:
  void create();
  void work();

  std::mutex mutex_;
  std::condition_variable changed_;
  std::function<void()> job_;  // the one that runs or will run; empty: none
  std::exception_ptr error_;
  bool has_begun_ = false, leaves_ = false;
  std::thread thread_;
};

// How many things one thread has made ready for another, which may sleep until there are more.
class Ready {
 public:
  size_t count() const { return count_.load(std::memory_order_acquire); }
  void set(size_t count) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      count_.store(count, std::memory_order_release);
    }
    changed_.notify_all();
  }
  // No more will come.
  void end() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      ended_ = true;
    }
    changed_.notify_all();
  }
  // Whether there are so many; false where they will not come.
  bool wait_for(size_t count) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return ended_ || this->count() >= count; });
    return this->count() >= count;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::atomic<size_t> count_{0};
  bool ended_ = false;
};

}  // namespace tpk
