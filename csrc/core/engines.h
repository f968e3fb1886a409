// The GEMM engines of the CPU, and the times that were measured for them. Torch-free.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <limits>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "types.h"

namespace tpk {

enum class Engine : uint8_t { Aten, OneDnn, Gemv, Count };
constexpr std::array<Engine, static_cast<size_t>(Engine::Count)> kAllEngines{Engine::Aten, Engine::OneDnn,
                                                                             Engine::Gemv};

const char* name_of(Engine engine);
Engine engine_of(const std::string& name);  // throws std::invalid_argument

// y[M, N] = x[M, K] @ w[N, K].T
struct GemmShape {
  DType dtype;
  int64_t M, N, K;

  bool is_empty() const { return M <= 0 || N <= 0 || K <= 0; }
};

constexpr double kNotMeasured = std::numeric_limits<double>::infinity();

// Microseconds by engine.
struct EngineTimes {
  std::array<double, kAllEngines.size()> us{kNotMeasured, kNotMeasured, kNotMeasured};

  double& operator[](Engine engine) { return us[static_cast<size_t>(engine)]; }
  double operator[](Engine engine) const { return us[static_cast<size_t>(engine)]; }
};

// What was measured at a shape.
struct MeasuredProduct {
  GemmShape shape;
  EngineTimes times;
};

// Each group has its own table, so that measuring in one group changes no bit of another. A shape of its own decides
// for that shape alone; a point of the machine's profile for all shapes to which it is the nearest.
class MeasuredEngines {
 public:
  // Both throw std::invalid_argument for a dtype without arithmetic or an empty shape.
  void add_shape(const MeasuredProduct& measured);
  void add_point(const MeasuredProduct& measured);
  // The measurement that decides for this shape: its own, else of the nearest point, by the sum of the logarithms of
  // the ratios of M, N and K; of two at one distance the one that was added first.
  std::optional<MeasuredProduct> find(const GemmShape& shape) const;
  void clear();

 private:
  struct Less {
    bool operator()(const GemmShape& a, const GemmShape& b) const;
  };
  using Table = std::map<GemmShape, MeasuredProduct, Less>;

  const MeasuredProduct* nearest(const GemmShape& shape) const;

  mutable std::mutex mutex_;
  Table shapes_;
  std::vector<MeasuredProduct> points_;
  mutable Table found_;           // nearest points of shapes that were asked for
  std::atomic<bool> any_{false};  // most groups have measured nothing: no lock for them
};

}  // namespace tpk
