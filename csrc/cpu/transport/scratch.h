// Memory for a call, from the pool of outputs. Torch-free.
#pragma once

#include <memory>

#include "core/bytes.h"
#include "cpu/output_pool.h"

namespace tpk {

class Scratch {
 public:
  explicit Scratch(size_t bytes) : memory_(bytes > 0 ? pool_allocate(bytes) : nullptr, Free{bytes}) {}
  char* at(size_t bytes) const { return static_cast<char*>(memory_.get()) + bytes; }

 private:
  struct Free {
    size_t bytes;
    void operator()(void* memory) const { pool_free(memory, bytes); }
  };
  std::unique_ptr<void, Free> memory_;
};

}  // namespace tpk
