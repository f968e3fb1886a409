#include "work.h"

#include <ATen/record_function.h>

#include <algorithm>
#include <optional>
#include <string>
#include <utility>

#include "core/communicator.h"
#include "core/errors.h"

namespace tpk {

std::exception_ptr as_error_of_torch(std::exception_ptr error) {
  try {
    std::rethrow_exception(error);
  } catch (const TimeoutFailure& late) {
    std::string text = late.what();
    text.erase(std::min(text.size(), text.find(" If it is only slow")));  // the advice to who opens a Group
    text += " The timeout is that of init_process_group or new_group.";
    return std::make_exception_ptr(
        c10::DistBackendError({__func__, __FILE__, static_cast<uint32_t>(__LINE__)}, std::move(text)));
  } catch (...) {
    return error;
  }
}

bool is_profiled() { return at::hasGlobalCallbacks() || at::hasThreadLocalCallbacks(); }

namespace {

// The inputs as the base class takes them: a copy, which without a profiler nobody reads.
std::optional<Tensors> for_profiler(const Tensors& inputs) {
  if (!is_profiled()) return std::nullopt;
  return inputs;
}

}  // namespace

Work::Work(int rank, c10d::OpType type, const char* title, const Tensors& inputs, Tensors outputs)
    : c10d::Work(rank, type, is_profiled() ? title : nullptr, for_profiler(inputs)), outputs_(std::move(outputs)) {}

c10::intrusive_ptr<c10::ivalue::Future> Work::getFuture() {
  std::unique_lock<std::mutex> lock(mutex_);
  if (future_ != nullptr) return future_;
  future_ = c10::make_intrusive<c10::ivalue::Future>(c10::ListType::create(c10::TensorType::get()));
  const bool has_ended = completed_;
  const std::exception_ptr error = exception_;
  lock.unlock();
  if (has_ended) settle(*future_, error);
  return future_;
}

void Work::settle(c10::ivalue::Future& future, const std::exception_ptr& error) const {
  if (error) {
    future.setError(error);
  } else {
    future.markCompleted(c10::IValue(outputs_));
  }
}

c10::intrusive_ptr<c10::ivalue::Future> Work::end(const std::exception_ptr& error, int source) {
  source_ = source;
  c10::intrusive_ptr<c10::ivalue::Future> future;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    completed_ = true;
    exception_ = error;
    future = future_;
    if (recordFunctionEndCallback_) std::exchange(recordFunctionEndCallback_, nullptr)();
  }
  cv_.notify_all();
  return future;
}

void Work::complete(std::exception_ptr error, int source) {
  if (const auto future = end(error, source)) settle(*future, error);
}

bool MessageWork::wait(std::chrono::milliseconds timeout) {
  const uint64_t now = now_nanoseconds();
  const auto nanoseconds = std::chrono::duration_cast<std::chrono::nanoseconds>(timeout).count();
  const uint64_t limit = timeout > kNoTimeout ? now + static_cast<uint64_t>(nanoseconds) : ~uint64_t{0};
  mailboxes_->wait([&] { return isCompleted(); }, limit);
  // Past the limit, so that waiting any longer is an error.
  return Work::wait(timeout > kNoTimeout ? std::chrono::milliseconds(1) : timeout);
}

bool CollectiveWork::wait(std::chrono::milliseconds timeout) {
  // With a limit only another thread may run it.
  const std::shared_ptr<Queue> queue = timeout == kNoTimeout ? queue_.lock() : nullptr;
  if (queue != nullptr) queue->run_until(*this);
  return Work::wait(timeout);
}

void WrittenBackWork::write_back() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (write_back_) std::exchange(write_back_, nullptr)();
}

bool WrittenBackWork::isCompleted() {
  const bool has_ended = work_->isCompleted();
  if (has_ended && work_->isSuccess()) write_back();
  return has_ended;
}

bool WrittenBackWork::wait(std::chrono::milliseconds timeout) {
  const bool has_come = work_->wait(timeout);  // false: aborted
  if (has_come) write_back();
  return has_come;
}

bool CoalescedWork::isCompleted() {
  for (const auto& work : works_) {
    if (!work->isCompleted()) return false;
  }
  return true;
}

bool CoalescedWork::wait(std::chrono::milliseconds timeout) {
  for (const auto& work : works_) work->wait(timeout);
  return true;
}

// One that does not run callbacks, which may wait for what has been added.
void Queue::have_free_thread() {
  while (threads_.size() <= num_calling_back_) {
    threads_.push_back(std::make_unique<CommunicationThread>());
    threads_.back()->start([this] { serve(); });
  }
}

void Queue::add(const c10::intrusive_ptr<Work>& work, std::function<void()> body) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(!leaves_, "tpk: the process group was shut down");
    ++length_;
    entries_.push_back({work, std::move(body)});
    have_free_thread();
    if (runner_ == std::this_thread::get_id()) runner_ = {};  // a callback calls it
  }
  changed_.notify_all();
}

void Queue::run_first(std::unique_lock<std::mutex>& lock) {
  Entry entry = std::move(entries_.front());
  entries_.pop_front();
  const std::thread::id me = std::this_thread::get_id(), before = std::exchange(runner_, me);
  calls_back_since_.reset();
  lock.unlock();
  const std::exception_ptr error = error_of(entry.body);
  entry.body = nullptr;
  // Before the work ends: who has waited for it calls the next one on its own thread.
  --length_;
  if (const auto future = entry.work->end(error)) call_back([&] { entry.work->settle(*future, error); });
  lock.lock();
  if (runner_ == me) {
    runner_ = before;
    // This thread is inside a callback that waits for this collective.
    if (before == me) calls_back_since_ = std::chrono::steady_clock::now();
  }
  if (leaves_ || !entries_.empty()) changed_.notify_all();
}

void Queue::call_back(const std::function<void()>& settle) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (runner_ == std::this_thread::get_id()) calls_back_since_ = std::chrono::steady_clock::now();
    ++num_calling_back_;
    if (!entries_.empty()) {
      have_free_thread();
      changed_.notify_all();
    }
  }
  settle();
  std::lock_guard<std::mutex> lock(mutex_);
  --num_calling_back_;
  if (runner_ == std::this_thread::get_id()) calls_back_since_.reset();
}

// What waits for a future may call the next collective: then the running thread itself comes here.
bool Queue::may_run() const {
  return !entries_.empty() && (runner_ == std::thread::id() || runner_ == std::this_thread::get_id());
}

void Queue::run_until(Work& work) {
  std::unique_lock<std::mutex> lock(mutex_);
  while (may_run() && !work.isCompleted()) run_first(lock);
}

void Queue::serve() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (!leaves_ || !entries_.empty()) {
    if (may_run()) {
      run_first(lock);
    } else if (!entries_.empty() && calls_back_since_.has_value()) {
      const auto limit = *calls_back_since_ + kPatience;
      if (std::chrono::steady_clock::now() >= limit) {
        runner_ = {};
      } else {
        changed_.wait_until(lock, limit);
      }
    } else {
      changed_.wait(lock);
    }
  }
}

void Queue::close() {
  {
    std::unique_lock<std::mutex> lock(mutex_);
    leaves_ = true;
    changed_.notify_all();
    changed_.wait(lock, [&] { return entries_.empty() && runner_ == std::thread::id(); });
  }
  threads_.clear();
}

}  // namespace tpk
