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
  const auto work = c10::make_intrusive<Work>(rank_, type, title, inputs, outputs);
  queue_.run(work, !is_async, [body = std::forward<Body>(body)]() mutable {
    const WithoutAutograd guard;
    body();
  });
  return kept(work);
}

}  // namespace tpk
