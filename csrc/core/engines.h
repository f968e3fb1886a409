// The GEMM engines of the CPU, and which of them a group has measured to be the fastest for a shape. Torch-free.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <string>

#include "types.h"

namespace tpk {

enum class Engine : uint8_t { Aten, OneDnn, Gemv };

const char* name_of(Engine engine);
Engine engine_of(const std::string& name);  // throws std::invalid_argument

// y[M, N] = x[M, K] @ w[N, K].T
struct GemmShape {
  DType dtype;
  int64_t M, N, K;

  bool is_empty() const { return M <= 0 || N <= 0 || K <= 0; }
  size_t product_bytes() const { return static_cast<size_t>(M * N) * size_of(dtype); }
};

// Each group has its own table, so that measuring in one group changes no bit of another.
class MeasuredEngines {
 public:
  void set(const GemmShape& shape, Engine engine);
  std::optional<Engine> find(const GemmShape& shape) const;
  void clear();

 private:
  struct Less {
    bool operator()(const GemmShape& a, const GemmShape& b) const;
  };
  mutable std::mutex mutex_;
  std::map<GemmShape, Engine, Less> engines_;
  std::atomic<bool> any_{false};  // most groups have measured nothing: no lock for them
};

}  // namespace tpk
