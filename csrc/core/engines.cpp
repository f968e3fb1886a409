#include "engines.h"

#include <cmath>
#include <tuple>

#include "check.h"

namespace tpk {
namespace {

constexpr size_t kMostFound = 4096;  // shapes whose nearest point is kept

void check(const MeasuredProduct& measured) {
  const GemmShape& s = measured.shape;
  TPK_CHECK(s.dtype <= DType::F16 && !s.is_empty(), "measured product: needs a floating dtype and positive sizes, got ",
            name_of(s.dtype), " ", s.M, "x", s.N, "x", s.K);
}

double distance(const GemmShape& a, const GemmShape& b) {
  const auto octaves = [](int64_t x, int64_t y) {
    return std::abs(std::log2(static_cast<double>(x)) - std::log2(static_cast<double>(y)));
  };
  return octaves(a.M, b.M) + octaves(a.N, b.N) + octaves(a.K, b.K);
}

}  // namespace

const char* name_of(Engine engine) {
  switch (engine) {
    case Engine::OneDnn: return "onednn";
    case Engine::Gemv: return "gemv";
    default: return "aten";
  }
}

Engine engine_of(const std::string& name) {
  for (const Engine engine : kAllEngines) {
    if (name == name_of(engine)) return engine;
  }
  throw std::invalid_argument(concat("engine must be aten, onednn or gemv, got '", name, "'"));
}

bool MeasuredEngines::Less::operator()(const GemmShape& a, const GemmShape& b) const {
  return std::tie(a.dtype, a.M, a.N, a.K) < std::tie(b.dtype, b.M, b.N, b.K);
}

void MeasuredEngines::add_shape(const MeasuredProduct& measured) {
  check(measured);
  std::lock_guard<std::mutex> lock(mutex_);
  shapes_[measured.shape] = measured;
  any_ = true;
}

void MeasuredEngines::add_point(const MeasuredProduct& measured) {
  check(measured);
  std::lock_guard<std::mutex> lock(mutex_);
  points_.push_back(measured);
  found_.clear();
  any_ = true;
}

const MeasuredProduct* MeasuredEngines::nearest(const GemmShape& shape) const {
  const MeasuredProduct* best = nullptr;
  double least = std::numeric_limits<double>::infinity();
  for (const MeasuredProduct& point : points_) {
    if (point.shape.dtype != shape.dtype) continue;
    const double far = distance(point.shape, shape);
    if (far < least) {
      least = far;
      best = &point;
    }
  }
  return best;
}

std::optional<MeasuredProduct> MeasuredEngines::find(const GemmShape& shape) const {
  if (!any_ || shape.is_empty()) return {};
  std::lock_guard<std::mutex> lock(mutex_);
  for (const Table* table : std::array<const Table*, 2>{&shapes_, &found_}) {
    const auto found = table->find(shape);
    if (found != table->end()) return found->second;
  }
  const MeasuredProduct* const point = nearest(shape);
  if (point == nullptr) return {};
  if (found_.size() >= kMostFound) found_.clear();
  found_[shape] = *point;
  return *point;
}

void MeasuredEngines::clear() {
  std::lock_guard<std::mutex> lock(mutex_);
  shapes_.clear();
  points_.clear();
  found_.clear();
  any_ = false;
}

}  // namespace tpk
