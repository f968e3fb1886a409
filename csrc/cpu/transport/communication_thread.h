// The thread of a group that moves bytes while the calling thread multiplies. Torch-free.
#pragma once

#include <condition_variable>
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

}  // namespace tpk
