// Frame of the planted bugs: a kernel with a known mistake must be found, at every seed, and its correct twin must be
// silent. So the emulator stays honest, and what it can find is written down.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "control.h"
#include "expect.h"
#include "primitives.h"

namespace tpk::planted {

constexpr int kRanks = 3;

// What a run of one body left behind.
struct Outcome {
  std::vector<emu::Report> reports;
  bool right = true;                // the values are those expected
  cudaError_t error = cudaSuccess;  // the first that the host saw

  bool has(emu::Kind kind) const {
    for (const emu::Report& report : reports) {
      if (report.kind == kind) return true;
    }
    return false;
  }
  std::string text() const {
    std::string all;
    for (const emu::Report& report : reports) all += "\n" + report.text;
    return all;
  }
};

// The body of a test: runs kernels, says whether the values are right.
using Body = std::function<bool()>;

inline Outcome run(const emu::Options& options, const Body& body) {
  emu::configure(options);
  Outcome outcome;
  outcome.right = body();
  for (int rank = 0; rank < kRanks; ++rank) {
    EXPECT(cudaSetDevice(rank) == cudaSuccess);
    const cudaError_t error = cudaDeviceSynchronize();
    if (outcome.error == cudaSuccess) outcome.error = error;
  }
  EXPECT(cudaSetDevice(0) == cudaSuccess);
  outcome.reports = emu::take_reports();
  emu::reset();
  return outcome;
}

inline emu::Options quiet(uint64_t seed) {
  emu::Options options;
  options.ranks = kRanks, options.seed = seed, options.loud = false, options.timeout_s = 0.5;
  return options;
}

// The mistake is reported as what it is.
inline void must_report(emu::Kind kind, const Body& body, int resident_blocks = 64) {
  for (uint64_t seed : {0, 1, 2}) {
    emu::Options options = quiet(seed);
    options.resident_blocks = resident_blocks;
    if (kind == emu::Kind::Deadlock) options.timeout_s = 0.1;  // all of which is waited for
    const Outcome outcome = run(options, body);
    EXPECT(outcome.has(kind), "seed ", seed, ": no report of kind ", name_of(kind), outcome.text());
  }
}

// Nothing is reported; the values are wrong.
inline void must_be_wrong(const Body& body) {
  for (uint64_t seed : {0, 1, 2}) EXPECT(!run(quiet(seed), body).right, "seed ", seed, ": the values are right");
}

// Wrong values, or a report of this kind where another order of the threads gave the right ones.
inline void must_be_found(emu::Kind kind, const Body& body) {
  for (uint64_t seed : {0, 1, 2}) {
    const Outcome outcome = run(quiet(seed), body);
    EXPECT(!outcome.right || outcome.has(kind), "seed ", seed, ": the values are right, and no report of kind ",
           name_of(kind), outcome.text());
  }
}

inline void must_be_silent(const Body& body, const std::vector<uint64_t>& seeds = {0, 1, 2, 3, 4}) {
  for (uint64_t seed : seeds) {
    const Outcome outcome = run(quiet(seed), body);
    EXPECT(outcome.reports.empty(), "seed ", seed, outcome.text());
    EXPECT(outcome.right, "seed ", seed, ": the values are wrong");
    EXPECT(outcome.error == cudaSuccess, cudaGetErrorName(outcome.error));
  }
}

// ---- memory of ranks ------------------------------------------------------------------------------------------------

// n values on the current rank, each `value`; freed by emu::reset.
template <class T>
T* filled(size_t n, T value = {}) {
  T* data = nullptr;
  EXPECT(cudaMalloc(reinterpret_cast<void**>(&data), n * sizeof(T)) == cudaSuccess);
  const std::vector<T> values(n, value);
  EXPECT(cudaMemcpy(data, values.data(), n * sizeof(T), cudaMemcpyHostToDevice) == cudaSuccess);
  return data;
}

template <class T>
std::vector<T> values_of(const T* data, size_t n) {
  std::vector<T> values(n);
  cudaMemcpy(values.data(), data, n * sizeof(T), cudaMemcpyDeviceToHost);
  return values;
}

inline cudaStream_t new_stream() {
  cudaStream_t stream = nullptr;
  EXPECT(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess);
  return stream;
}

}  // namespace tpk::planted
