// Groups of emulated ranks for tests of kernels over peers: arenas, inputs, expected results from the CPU's wires.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <memory>
#include <random>

#include "core/wire.h"
#include "cuda/kernels/kernels.h"
#include "emu/control.h"
#include "expect.h"

namespace tpk::testing {

using cuda::Announcement;
using cuda::Call;
using cuda::DeviceCut;
using cuda::FailureRecord;
using cuda::kMaxPeers;
using cuda::kNotInHeap;
using cuda::Peers;
using cuda::Signals;

using Bytes = std::vector<char>;

// Memory of a rank with values in it, `shift` bytes behind a multiple of 16.
class DeviceBytes {
 public:
  DeviceBytes(int rank, const Bytes& values, size_t shift = 0) : shift_(shift), bytes_(values.size()) {
    EXPECT(cudaSetDevice(rank) == cudaSuccess);
    EXPECT(cudaMalloc(reinterpret_cast<void**>(&base_), shift + bytes_ + 1) == cudaSuccess);
    std::copy(values.begin(), values.end(), base_ + shift);
    base_[shift + bytes_] = kFence;
  }
  char* data() const { return base_ + shift_; }
  Bytes values() const {
    EXPECT(base_[shift_ + bytes_] == kFence, "written behind the end");
    return Bytes(data(), data() + bytes_);
  }

 private:
  static constexpr char kFence = 0x5a;
  char* base_ = nullptr;  // freed with everything else by emu::reset()
  size_t shift_, bytes_;
};

struct GroupOptions {
  size_t slot_bytes = size_t{64} << 10;
  size_t heap_bytes = size_t{256} << 10;
  double timeout_s = 20.0;
  bool multicast = false;
};

// One group: an arena and a record for each rank. Valid until emu::reset().
class EmulatedGroup {
 public:
  explicit EmulatedGroup(int ranks, GroupOptions options = {}) : ranks_(ranks), options_(options) {
    const size_t bytes = cuda::kSignalBytes + 2 * options.slot_bytes + options.heap_bytes;
    std::vector<void*> arenas;
    for (int r = 0; r < ranks; ++r) {
      EXPECT(cudaSetDevice(r) == cudaSuccess);
      EXPECT(cudaMalloc(reinterpret_cast<void**>(&all_.arena[r]), bytes) == cudaSuccess);
      std::memset(all_.arena[r], 0, cuda::kSignalBytes);
      EXPECT(cudaMallocHost(reinterpret_cast<void**>(&records_[r]), sizeof(FailureRecord)) == cudaSuccess);
      std::memset(records_[r], 0, sizeof(FailureRecord));
      arenas.push_back(all_.arena[r]);
    }
    if (options.multicast) all_.multicast = static_cast<char*>(emu::multicast(arenas, bytes));
    all_.world_size = ranks;
    all_.slot_bytes = options.slot_bytes;
    wait_for(options.timeout_s);
  }

  int ranks() const { return ranks_; }
  // From now on.
  void wait_for(double timeout_s) { all_.timeout_ns = static_cast<uint64_t>(timeout_s * 1e9); }
  Peers peers(int rank) const {
    Peers peers = all_;
    peers.rank = rank;
    peers.failure = records_[rank];
    return peers;
  }
  FailureRecord& record(int rank) const { return *records_[rank]; }
  Signals& signals(int rank) const { return *reinterpret_cast<Signals*>(all_.arena[rank]); }
  char* heap(int rank) const { return all_.arena[rank] + cuda::heap_offset(all_); }
  size_t heap_bytes() const { return options_.heap_bytes; }

  void expect_no_failure() const {
    for (int r = 0; r < ranks_; ++r) EXPECT(records_[r]->failure == 0, "rank ", r, " has a failure record");
  }

 private:
  int ranks_;
  GroupOptions options_;
  Peers all_{};
  FailureRecord* records_[kMaxPeers] = {};
};

inline void expect_no_reports(const std::string& what) {
  for (const emu::Report& report : emu::take_reports()) EXPECT(false, what, ": ", report.text);
}

inline void configure(int ranks, uint64_t seed, int resident_blocks = 64) {
  emu::Options options;
  options.ranks = ranks, options.seed = seed, options.resident_blocks = resident_blocks;
  emu::configure(options);
}

// ---- values
// ----------------------------------------------------------------------------------------------------------

inline void put(DType dtype, Bytes& bytes, size_t i, double value) {
  const auto as = [&](auto converted) {
    std::memcpy(bytes.data() + i * sizeof converted, &converted, sizeof converted);
  };
  switch (dtype) {
    case DType::F32: return as(static_cast<float>(value));
    case DType::F64: return as(value);
    case DType::BF16: return as(to_bfloat16(static_cast<float>(value)));
    case DType::F16: return as(to_half(static_cast<float>(value)));
    default: EXPECT(false, "no floating dtype");
  }
}

inline double value_at(DType dtype, const Bytes& bytes, size_t i) {
  const auto as = [&](auto raw) {
    std::memcpy(&raw, bytes.data() + i * sizeof raw, sizeof raw);
    return raw;
  };
  switch (dtype) {
    case DType::F64: return as(double{});
    case DType::BF16: return to_float(as(Bfloat16{}));
    case DType::F16: return to_float(as(Half{}));
    default: return as(float{});
  }
}

inline bool is_floating(DType dtype) { return dtype <= DType::F16; }

// Floats over many decades with zeros, some of both signs, and a rare value that is not finite; integers of all bits.
inline Bytes random_values(DType dtype, size_t n, uint64_t seed, bool all_finite = false) {
  std::mt19937_64 random(seed * 2654435761u + 12345u);
  Bytes bytes(n * size_of(dtype));
  if (!is_floating(dtype)) {
    for (char& byte : bytes) byte = static_cast<char>(random());
    return bytes;
  }
  std::normal_distribution<double> normal;
  for (size_t i = 0; i < n; ++i) {
    const uint64_t kind = random() % 64;
    double value = std::ldexp(normal(random), static_cast<int>(random() % 12) - 6);
    if (kind == 0) value = 0.0;
    if (kind == 1) value = -0.0;
    if (kind == 2 && random() % 64 == 0 && !all_finite) value = random() % 2 == 0 ? NAN : INFINITY;
    put(dtype, bytes, i, value);
  }
  return bytes;
}

// The same bits, or NaN on both sides: what arithmetic makes of a NaN's bits is not promised.
inline bool same_values(DType dtype, const Bytes& a, const Bytes& b, std::string* where = nullptr) {
  const size_t size = size_of(dtype);
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < a.size() / size; ++i) {
    if (std::memcmp(a.data() + i * size, b.data() + i * size, size) == 0) continue;
    if (is_floating(dtype) && std::isnan(value_at(dtype, a, i)) && std::isnan(value_at(dtype, b, i))) continue;
    if (where != nullptr) *where = concat("value ", i, " of ", a.size() / size);
    return false;
  }
  return true;
}

// ---- what the CPU makes of it
// ----------------------------------------------------------------------------------------

inline Bytes encoded(const Wire& wire, const Bytes& values) {
  const size_t n = values.size() / wire.value_bytes;
  Bytes packed(wire.bytes(n));
  wire.encode(values.data(), packed.data(), n);
  return packed;
}

inline Bytes decoded(const Wire& wire, const Bytes& packed, size_t n) {
  Bytes values(n * wire.value_bytes);
  wire.decode(packed.data(), values.data(), n);
  return values;
}

// Some codec that packs: another one for each i, so that a test need not take all of them with everything.
inline Codec packing_codec(size_t i) { return static_cast<Codec>(1 + i % (static_cast<size_t>(Codec::Count) - 1)); }

inline std::vector<const void*> pointers_to(const std::vector<Bytes>& all) {
  std::vector<const void*> pointers;
  for (const Bytes& one : all) pointers.push_back(one.data());
  return pointers;
}

inline std::vector<Bytes> all_encoded(const Wire& wire, const std::vector<Bytes>& inputs) {
  std::vector<Bytes> wires;
  for (const Bytes& input : inputs) wires.push_back(encoded(wire, input));
  return wires;
}

// The reduced values, not packed again.
inline Bytes reduced(const Wire& wire, const std::vector<Bytes>& inputs) {
  const size_t n = inputs[0].size() / wire.value_bytes;
  const std::vector<Bytes> wires = all_encoded(wire, inputs);
  Bytes values(n * wire.value_bytes);
  wire.reduce_to_values(pointers_to(wires).data(), static_cast<int>(wires.size()), values.data(), n);
  return values;
}

// What all_reduce gives every rank: the owner packs the sum again.
inline Bytes all_reduced(const Wire& wire, const std::vector<Bytes>& inputs) {
  if (wire.is_plain()) return reduced(wire, inputs);
  const size_t n = inputs[0].size() / wire.value_bytes;
  const std::vector<Bytes> wires = all_encoded(wire, inputs);
  Bytes packed(wire.bytes(n));
  void* const output = packed.data();
  wire.reduce(pointers_to(wires).data(), static_cast<int>(wires.size()), &output, 1, n);
  return decoded(wire, packed, n);
}

inline Bytes slice(const Bytes& bytes, size_t start, size_t size) {
  return Bytes(bytes.begin() + static_cast<long>(start), bytes.begin() + static_cast<long>(start + size));
}

}  // namespace tpk::testing
