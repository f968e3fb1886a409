#include "engines.h"

#include <tuple>

#include "check.h"

namespace tpk {

const char* name_of(Engine engine) {
  switch (engine) {
    case Engine::OneDnn: return "onednn";
    case Engine::Gemv: return "gemv";
    default: return "aten";
  }
}

Engine engine_of(const std::string& name) {
  for (Engine engine : {Engine::Aten, Engine::OneDnn, Engine::Gemv}) {
    if (name == name_of(engine)) return engine;
  }
  throw std::invalid_argument(concat("engine must be aten, onednn or gemv, got '", name, "'"));
}

bool MeasuredEngines::Less::operator()(const GemmShape& a, const GemmShape& b) const {
  return std::tie(a.dtype, a.M, a.N, a.K) < std::tie(b.dtype, b.M, b.N, b.K);
}

void MeasuredEngines::set(const GemmShape& shape, Engine engine) {
  std::lock_guard<std::mutex> lock(mutex_);
  engines_[shape] = engine;
  any_ = true;
}

std::optional<Engine> MeasuredEngines::find(const GemmShape& shape) const {
  if (!any_) return {};
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = engines_.find(shape);
  return found == engines_.end() ? std::nullopt : std::optional<Engine>(found->second);
}

void MeasuredEngines::clear() {
  std::lock_guard<std::mutex> lock(mutex_);
  engines_.clear();
  any_ = false;
}

}  // namespace tpk
