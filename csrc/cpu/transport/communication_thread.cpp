#include "communication_thread.h"

#include <pthread.h>

#include <csignal>
#include <utility>

namespace tpk {

CommunicationThread::~CommunicationThread() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    leaves_ = true;
  }
  changed_.notify_all();
  if (thread_.joinable()) thread_.join();
}

void CommunicationThread::start(std::function<void()> job) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    job_ = std::move(job);
    error_ = nullptr;
  }
  if (thread_.joinable()) return changed_.notify_all();
  sigset_t all, before;  // a thread inherits the mask
  sigfillset(&all);
  for (int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL}) sigdelset(&all, fault);  // those of the thread itself
  pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    thread_ = std::thread([this] { work(); });
  } catch (...) {
    job_ = nullptr;
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
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    changed_.wait(lock, [&] { return leaves_ || job_; });
    if (leaves_) return;
    std::exception_ptr error;
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
