#include "communication_thread.h"

#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <csignal>
#include <cstdint>
#include <utility>

namespace tpk {
namespace {

// Asks the scheduler to let this thread run as soon as it wakes up, for short moments, beside a thread of the same core
// that always computes: Linux from 6.12 on lets a thread with a short slice preempt one with a long slice, where it
// would otherwise wait for its end (up to 100 ms). Elsewhere nothing changes; policy and priority are those of the
// process in any case.
void prefer_short_slices() {
#if defined(SYS_sched_setattr) && defined(SYS_sched_getattr)
  struct {
    uint32_t size = 48, policy = 0;
    uint64_t flags = 0;
    int32_t nice = 0;
    uint32_t priority = 0;
    uint64_t slice_ns = 0, deadline = 0, period = 0;
  } attributes;
  static_assert(sizeof attributes == 48, "struct sched_attr in its first version");
  if (syscall(SYS_sched_getattr, 0, &attributes, sizeof attributes, 0) != 0) return;
  if (attributes.policy != SCHED_OTHER) return;
  attributes.slice_ns = 100'000;
  syscall(SYS_sched_setattr, 0, &attributes, 0);
#endif
}

}  // namespace

CommunicationThread::~CommunicationThread() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    leaves_ = true;
  }
  changed_.notify_all();
  if (thread_.joinable()) thread_.join();
}

void CommunicationThread::start(std::function<void()> job) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (!thread_.joinable()) create();
  job_ = std::move(job);
  error_ = nullptr;
  has_begun_ = false;
  changed_.notify_all();
  changed_.wait(lock, [&] { return has_begun_; });
}

void CommunicationThread::create() {
  sigset_t all, before;  // a thread inherits the mask
  sigfillset(&all);
  for (int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL}) sigdelset(&all, fault);  // those of the thread itself
  pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    thread_ = std::thread([this] { work(); });
  } catch (...) {
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    throw;
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

bool CommunicationThread::has_ended() {
  std::lock_guard<std::mutex> lock(mutex_);
  return !job_;
}

void CommunicationThread::finish() {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [&] { return !job_; });
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

void CommunicationThread::work() {
  prefer_short_slices();
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    changed_.wait(lock, [&] { return leaves_ || job_; });
    if (leaves_) return;
    std::exception_ptr error;
    has_begun_ = true;
    changed_.notify_all();
    lock.unlock();
    try {
      job_();  // assigned anew only when it has ended
    } catch (...) {
      error = std::current_exception();
    }
    lock.lock();
    job_ = nullptr;
    error_ = error;
    changed_.notify_all();
  }
}

}  // namespace tpk
