// The Works of the back end for torch.distributed, and the queue that runs collectives.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <torch/csrc/distributed/c10d/Work.hpp>
#include <vector>

#include "cpu/transport/communication_thread.h"
#include "cpu/transport/mailboxes.h"

namespace tpk {

using Tensors = std::vector<at::Tensor>;

// Whether a profiler of torch records events.
bool is_profiled();

// What programs of torch.distributed catch: a passed deadline is a RuntimeError there (DistBackendError).
std::exception_ptr as_error_of_torch(std::exception_ptr error);

// One operation of one rank. Its future has the outputs; a future is made when it is asked for.
class Work : public c10d::Work {
 public:
  // title, inputs: of the event that a profiler records.
  Work(int rank, c10d::OpType type, const char* title, const Tensors& inputs, Tensors outputs);

  std::vector<at::Tensor> result() override { return outputs_; }
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override;
  int sourceRank() const override { return source_; }
  // Ends it, and gives its future, if there is one, its value, which runs the callbacks.
  void complete(std::exception_ptr error, int source = -1);
  // The two apart.
  c10::intrusive_ptr<c10::ivalue::Future> end(const std::exception_ptr& error, int source = -1);
  void settle(c10::ivalue::Future& future, const std::exception_ptr& error) const;

 private:
  const Tensors outputs_;
  c10::intrusive_ptr<c10::ivalue::Future> future_;  // under mutex_
  int source_ = -1;
};

// Of a message: whoever waits for it moves bytes.
class MessageWork final : public Work {
 public:
  MessageWork(int rank, c10d::OpType type, const char* title, const Tensors& tensors,
              std::shared_ptr<Mailboxes> mailboxes)
      : Work(rank, type, title, tensors, tensors), mailboxes_(std::move(mailboxes)) {}
  bool wait(std::chrono::milliseconds timeout) override;

 private:
  const std::shared_ptr<Mailboxes> mailboxes_;
};

// Of a receive into other memory than the tensor's: `write_back` runs once, when somebody sees that it has ended.
class WrittenBackWork final : public c10d::Work {
 public:
  WrittenBackWork(c10::intrusive_ptr<c10d::Work> work, std::function<void()> write_back)
      : c10d::Work(-1, c10d::OpType::RECV), work_(std::move(work)), write_back_(std::move(write_back)) {}
  bool isCompleted() override;
  bool wait(std::chrono::milliseconds timeout) override;
  void abort() override { work_->abort(); }
  int sourceRank() const override { return work_->sourceRank(); }

 private:
  void write_back();

  const c10::intrusive_ptr<c10d::Work> work_;
  std::function<void()> write_back_;  // under mutex_
};

// Several Works as one (startCoalescing).
class CoalescedWork final : public c10d::Work {
 public:
  explicit CoalescedWork(std::vector<c10::intrusive_ptr<c10d::Work>> works)
      : c10d::Work(-1, c10d::OpType::COALESCED), works_(std::move(works)) {}
  bool isCompleted() override;
  bool wait(std::chrono::milliseconds timeout) override;

 private:
  const std::vector<c10::intrusive_ptr<c10d::Work>> works_;
};

class Queue;

// Of a collective: who waits for it runs it, unless a thread has begun it.
class CollectiveWork final : public Work {
 public:
  CollectiveWork(int rank, c10d::OpType type, const char* title, const Tensors& inputs, Tensors outputs,
                 const std::shared_ptr<Queue>& queue)
      : Work(rank, type, title, inputs, std::move(outputs)), queue_(queue) {}
  bool wait(std::chrono::milliseconds timeout) override;

 private:
  const std::weak_ptr<Queue> queue_;  // whose entries have their works
};

// Runs collectives one after the other in the order of their calls. One that its caller waits for runs on the caller's
// thread when nothing is before it; the others run on a thread of the group, which sleeps in between, or on a thread
// that waits for one of them.
//
// The thread that ran a collective runs the callbacks of its future, too, and a callback may wait for the future of
// another collective (the hook of PowerSGD does). Then another thread of the group takes over: at once where the
// callback itself has called that collective, else after kPatience.
class Queue {
 public:
  // Whether nothing runs or waits.
  bool is_idle() const { return length_ == 0; }
  // On the calling thread; throws what it throws, as errors of torch.
  template <class Body>
  static void run_here(Body&& body) {
    if (const std::exception_ptr error = error_of(body)) std::rethrow_exception(error);
  }
  // The same, and ends the work.
  template <class Body>
  static void run_now(Work& work, Body&& body) {
    const std::exception_ptr error = error_of(body);
    work.complete(error);
    if (error) std::rethrow_exception(error);
  }
  void add(const c10::intrusive_ptr<Work>& work, std::function<void()> body);
  // Runs what no thread has begun, up to that work; returns at once where another thread runs something.
  void run_until(Work& work);
  // Ends when what has been added has ended.
  void close();

 private:
  struct Entry {
    c10::intrusive_ptr<Work> work;
    std::function<void()> body;
  };
  template <class Body>
  static std::exception_ptr error_of(Body&& body) {
    try {
      body();
    } catch (...) {
      return as_error_of_torch(std::current_exception());
    }
    return nullptr;
  }
  static constexpr std::chrono::milliseconds kPatience{2};

  bool may_run() const;
  void run_first(std::unique_lock<std::mutex>& lock);
  void call_back(const std::function<void()>& settle);
  void have_free_thread();
  void serve();

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Entry> entries_;
  std::atomic<size_t> length_{0};                                          // with the one that runs
  std::thread::id runner_;                                                 // none while nothing runs
  std::optional<std::chrono::steady_clock::time_point> calls_back_since_;  // the runner, the callbacks of a future
  size_t num_calling_back_ = 0;                                            // threads that do
  bool leaves_ = false;
  std::vector<std::unique_ptr<CommunicationThread>> threads_;
};

}  // namespace tpk
