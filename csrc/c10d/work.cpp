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
  if (has_ended) settle(*future_, outputs_, error);
  return future_;
}

void Work::settle(c10::ivalue::Future& future, const Tensors& outputs, const std::exception_ptr& error) {
  if (error) {
    future.setError(error);
  } else {
    future.markCompleted(c10::IValue(outputs));
  }
}

void Work::complete(std::exception_ptr error, int source) {
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
  if (future != nullptr) settle(*future, outputs_, error);
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

void Queue::add(const c10::intrusive_ptr<Work>& work, std::function<void()> body) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(!leaves_, "tpk: the process group was shut down");
    ++length_;
    entries_.push_back({work, std::move(body)});
    if (!std::exchange(has_thread_, true)) thread_->start([this] { serve(); });
  }
  changed_.notify_one();
}

void Queue::run_first(std::unique_lock<std::mutex>& lock) {
  Entry entry = std::move(entries_.front());
  entries_.pop_front();
  const std::thread::id before = std::exchange(runner_, std::this_thread::get_id());
  lock.unlock();
  const std::exception_ptr error = error_of(entry.body);
  entry.body = nullptr;
  // Before the work ends: who has waited for it calls the next one on its own thread.
  --length_;
  entry.work->complete(error);
  lock.lock();
  runner_ = before;
  if (leaves_ || !entries_.empty()) changed_.notify_all();
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
  while (true) {
    changed_.wait(lock, [&] { return may_run() || (leaves_ && entries_.empty()); });
    if (entries_.empty()) return;
    run_first(lock);
  }
}

void Queue::close() {
  {
    std::unique_lock<std::mutex> lock(mutex_);
    leaves_ = true;
    changed_.notify_all();
    changed_.wait(lock, [&] { return entries_.empty() && runner_ == std::thread::id(); });
  }
  thread_.reset();
}

}  // namespace tpk
