// Ranks that are threads of one test, and values whose sums are exact.
#pragma once

#include <exception>
#include <functional>
#include <random>
#include <thread>
#include <vector>

#include "core/communicator.h"

namespace tpk {

// Runs body(rank) once for each rank, each in a thread, and throws what the first of them threw.
inline void each_in_a_thread(size_t world_size, const std::function<void(size_t)>& body) {
  std::vector<std::exception_ptr> errors(world_size);
  std::vector<std::thread> threads;
  for (size_t r = 0; r < world_size; ++r) {
    threads.emplace_back([&, r] {
      try {
        body(r);
      } catch (...) {
        errors[r] = std::current_exception();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

inline CallSpec spec_for(Op op, const Wire& wire, size_t n, int64_t mine = 0) {
  return {op, wire.dtype, wire.op, wire.codec, n, 0, mine};
}

// Small integers: exact in every float type and codec, whatever is summed.
inline std::vector<float> values_of(int rank, size_t n, uint32_t seed) {
  std::mt19937 random(seed * 131u + static_cast<uint32_t>(rank));
  std::vector<float> values(n);
  for (float& value : values) value = static_cast<float>(static_cast<int>(random() % 17) - 8);
  return values;
}

inline std::vector<float> sum_of(int world_size, size_t n, uint32_t seed) {
  std::vector<float> sums(n, 0.0f);
  for (int r = 0; r < world_size; ++r) {
    const std::vector<float> values = values_of(r, n, seed);
    for (size_t i = 0; i < n; ++i) sums[i] += values[i];
  }
  return sums;
}

}  // namespace tpk
