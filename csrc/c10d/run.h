// How a collective is run, for the files that implement them.
#pragma once

#include <utility>

#include "backend.h"
#include "core/check.h"
#include "tensors.h"

namespace tpk {

template <class Body>
Backend::Works Backend::run(c10d::OpType type, const char* title, bool is_async, const Tensors& inputs,
                            const Tensors& outputs, Body&& body) {
  TORCH_CHECK(!is_shut_, title, where(), ": the process group was destroyed");
  comm_.check_process(title);
  ++num_collectives_;
  auto guarded = [body = std::forward<Body>(body)]() mutable {
    const WithoutAutograd guard;
    body();
  };
  const bool is_here = !is_async && queue_->is_idle();
  if (is_here && !coalesces_ && !is_profiled()) {
    Queue::run_here(guarded);
    return nullptr;  // which torch takes for ended
  }
  const auto work = c10::make_intrusive<CollectiveWork>(rank_, type, title, inputs, outputs, queue_);
  if (is_here) {
    Queue::run_now(*work, guarded);
  } else {
    queue_->add(work, std::move(guarded));
    if (!is_async) work->wait(kNoTimeout);
  }
  return kept(work);
}

}  // namespace tpk
