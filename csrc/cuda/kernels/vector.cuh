// Plain values, 16 bytes at a time: how a thread copies and sums them. Also how work is dealt to threads.
//
// A format (Plain here, Coded in warp_block.cuh) defines how a tensor of one dtype is stored on the wire. It is cut
// into units of kUnitValues values and kUnitBytes bytes, each worked on by kUnitThreads threads that keep it in
// registers:
//
//   encode(values, wire, range, length)           the units of a range: values -> wire, which has room for whole units
//   copy_packed(from, wire, range, length)        the same of an input that is packed already, at any alignment
//   decode(wire, values, range, length, reach)    wire -> values
//   sum(wires, count, op, unit, length)           Sums of one unit of wires[0], wires[1], ... in that order
//   sum_each(wires, count, op, range, length, store)   store(unit, the same) for the units of a range
//   as_packed(sums)                               what decoding gives when these sums have been packed
//   store_values(sums, values, unit, length)
//   store_wire(sums, wire, unit, length)          may overwrite one of the wires that were summed
//
// Loads of a unit are all issued before the first is used: what a thread has in flight is what hides the way to a peer.
// Units are counted in 32 bits, which spares registers: a wire is at most 32 GiB.
#pragma once

#include <cstring>
#include <type_traits>

#include "core/codec/sum.h"
#include "cuda/kernels/device.cuh"
#include "kernels.h"

namespace tpk::cuda {

// n values as units: so many full ones, and the values of a shorter last one.
struct Length {
  uint32_t full, rest;
};
template <class Format>
TPK_HOST_DEVICE constexpr Length length_of(size_t n) {
  return {static_cast<uint32_t>(n / Format::kUnitValues), static_cast<uint32_t>(n % Format::kUnitValues)};
}
TPK_HOST_DEVICE constexpr uint32_t units_of(Length length) { return length.full + (length.rest > 0 ? 1 : 0); }

template <class Format>
__device__ __forceinline__ uint32_t values_in(uint32_t unit, Length length) {
  return unit < length.full ? static_cast<uint32_t>(Format::kUnitValues) : length.rest;
}

// The units first, first + stride, ... before end.
struct Range {
  uint32_t first, end, stride;
};

// This thread's (or warp's) share of the units [start, end). Every kernel deals a stretch in the same way, so that
// block b of one rank reads what block b of another has written.
template <class Format>
__device__ __forceinline__ Range share_of(uint32_t start, uint32_t end) {
  const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x, threads = gridDim.x * blockDim.x;
  return {start + thread / Format::kUnitThreads, end, threads / Format::kUnitThreads};
}

// Where part r of `units` begins when R ranks share them, the first ones taking one more.
__device__ __forceinline__ uint32_t part_start(uint32_t units, int world_size, int r) {
  const uint32_t ranks = static_cast<uint32_t>(world_size), part = static_cast<uint32_t>(r);
  return part * (units / ranks) + (part < units % ranks ? part : units % ranks);
}

__device__ __forceinline__ bool is_aligned(const void* pointer, size_t bytes = 16) {
  return (reinterpret_cast<uintptr_t>(pointer) & (bytes - 1)) == 0;
}

// Whose memory is read: another rank's may have changed since this kernel began, and is not in the first-level cache.
enum class Reach : uint32_t { Own, Peer };

// A rank's input on its way into a slot: values, or a wire that is copied as it is.
template <class Format>
__device__ __forceinline__ void bring_in(const void* in, bool packed, char* wire, Range range, Length length) {
  if constexpr (!Format::kPlain) {
    if (packed) return Format::copy_packed(static_cast<const char*>(in), wire, range, length);
  }
  Format::encode(static_cast<const typename Format::Value*>(in), wire, range, length);
}

// A dtype's values as they are. Any alignment of T will do; 16 bytes are fast.
template <class T>
struct Plain {
  using Value = T;
  static constexpr size_t kUnitValues = 16 / sizeof(T);
  static constexpr size_t kUnitBytes = 16;
  static constexpr uint32_t kUnitThreads = 1;
  static constexpr bool kPlain = true;
  // Units of a copy: 16 blocks of 512 threads, as many as there are beside a product, then have 1 MB on the way, what a
  // link of 450 GB/s takes in 2.3 us. (A model, not measured.)
  static constexpr int kInFlight = 8;

  struct Sums {
    typename Sum<T>::type of[kUnitValues];
    int num_inputs;
    ReduceOp op;
  };

  TPK_HOST_DEVICE static constexpr size_t bytes(size_t n) { return n * sizeof(T); }

  __device__ __forceinline__ static Word16 load(const T* from, uint32_t count, Reach reach) {
    if (count == kUnitValues && is_aligned(from)) return reach == Reach::Peer ? load16_peer(from) : load16(from);
    T values[kUnitValues] = {};
#pragma unroll
    for (uint32_t i = 0; i < kUnitValues; ++i) {
      if (i < count) values[i] = from[i];
    }
    Word16 word;
    memcpy(&word, values, sizeof word);
    return word;
  }

  __device__ __forceinline__ static void store(T* to, Word16 word, uint32_t count) {
    if (count == kUnitValues && is_aligned(to)) return store16(to, word);
    T values[kUnitValues];
    memcpy(values, &word, sizeof word);
#pragma unroll
    for (uint32_t i = 0; i < kUnitValues; ++i) {
      if (i < count) to[i] = values[i];
    }
  }

  __device__ __forceinline__ static void encode(const T* values, char* wire, Range range, Length length) {
    copy(
        range,
        [&](uint32_t unit) {
          return load(values + size_t{unit} * kUnitValues, values_in<Plain>(unit, length), Reach::Own);
        },
        [&](uint32_t unit, Word16 word) { store16(wire + size_t{unit} * 16, word); });
  }

  __device__ __forceinline__ static void decode(const char* wire, T* values, Range range, Length length, Reach reach) {
    const T* from = reinterpret_cast<const T*>(wire);
    copy(
        range,
        [&](uint32_t unit) { return load(from + size_t{unit} * kUnitValues, values_in<Plain>(unit, length), reach); },
        [&](uint32_t unit, Word16 word) {
          store(values + size_t{unit} * kUnitValues, word, values_in<Plain>(unit, length));
        });
  }

  template <class Wires>
  __device__ __forceinline__ static Sums sum(const Wires& wires, int count, ReduceOp op, uint32_t unit, Length length) {
    constexpr int kBatch = 8;
    Sums sums{{}, count, op};
    for (int start = 0; start < (Wires::kMost > kBatch ? count : 1); start += kBatch) {
      Word16 words[kBatch];
#pragma unroll
      for (int r = 0; r < kBatch; ++r) {
        if (start + r >= count) continue;
        const T* from = reinterpret_cast<const T*>(wires[start + r]) + size_t{unit} * kUnitValues;
        words[r] = load(from, values_in<Plain>(unit, length), Wires::kReach);
      }
      // The reduction is decided once for all words, so that it is a constant in the inner loops.
      switch (op) {
        case ReduceOp::Max: fold<ReduceOp::Max>(sums, words, start); break;
        case ReduceOp::Min: fold<ReduceOp::Min>(sums, words, start); break;
        default: fold<ReduceOp::Sum>(sums, words, start); break;
      }
    }
    return sums;
  }

  // store(unit, sums) for the units of a range, of no more than kMaxPeers wires.
  //
  // What a thread has in flight to peers is what hides the way there, about 2 us: 36 blocks of 512 threads with one
  // 16-byte load each, which one unit of two ranks would be, are 295 KB, no more than 150 GB/s. So few wires are summed
  // several units at a time, 8 loads in all, 4 to 6 of them to peers: 1.2 MB and more, above the 450 GB/s that NVLink 4
  // has each way. (A model, not measured.) All loads of a unit are issued together, so that no rank's link is asked
  // first by all ranks and waited for by the others; only the order of the sum is that of the ranks.
  template <class Wires, class Store>
  __device__ __forceinline__ static void sum_each(const Wires& wires, int count, ReduceOp op, Range range,
                                                  Length length, Store store) {
    static_assert(Wires::kMost <= 8, "the loads of a unit are one batch");
    // The dtypes of tensors that are large and the reductions that they have: the others would be code for nobody.
    if constexpr (kSumsMany) {
      if (count <= 4 && (op == ReduceOp::Sum || op == ReduceOp::Avg)) {
        return count <= 2 ? sum_many<4, 2>(wires, count, op, range, length, store)
                          : sum_many<2, 4>(wires, count, op, range, length, store);
      }
    }
    for (uint32_t unit = range.first; unit < range.end; unit += range.stride) {
      store(unit, sum(wires, count, op, unit, length));
    }
  }

  __device__ __forceinline__ static Sums as_packed(const Sums& sums) { return sums; }

  __device__ __forceinline__ static void store_values(const Sums& sums, T* values, uint32_t unit, Length length) {
    const Word16 word = sums.op == ReduceOp::Avg ? finished<ReduceOp::Avg>(sums) : finished<ReduceOp::Sum>(sums);
    store(values + size_t{unit} * kUnitValues, word, values_in<Plain>(unit, length));
  }

  __device__ __forceinline__ static void store_wire(const Sums& sums, char* wire, uint32_t unit, Length length) {
    store_values(sums, reinterpret_cast<T*>(wire), unit, length);
  }

 private:
  static constexpr bool kSumsMany = std::is_same_v<T, float> || std::is_same_v<T, Bfloat16> || std::is_same_v<T, Half>;

  template <int units, int inputs, class Wires, class Store>
  __device__ __forceinline__ static void sum_many(const Wires& wires, int count, ReduceOp op, Range range,
                                                  Length length, Store store) {
#pragma unroll 1
    for (uint32_t first = range.first; first < range.end; first += units * range.stride) {
      Word16 words[units][inputs];
#pragma unroll
      for (int u = 0; u < units; ++u) {
        const uint32_t unit = first + static_cast<uint32_t>(u) * range.stride;
#pragma unroll
        for (int r = 0; r < inputs; ++r) {
          if (unit >= range.end || r >= count) continue;
          const T* const from = reinterpret_cast<const T*>(wires[r]) + size_t{unit} * kUnitValues;
          words[u][r] = load(from, values_in<Plain>(unit, length), Wires::kReach);
        }
      }
#pragma unroll
      for (int u = 0; u < units; ++u) {
        const uint32_t unit = first + static_cast<uint32_t>(u) * range.stride;
        if (unit >= range.end) break;
        Sums sums{{}, count, op};
        fold<ReduceOp::Sum>(sums, words[u], 0);
        store(unit, sums);
      }
    }
  }

  template <class Load, class Store>
  __device__ __forceinline__ static void copy(Range range, Load load_unit, Store store_unit) {
    for (uint32_t unit = range.first; unit < range.end; unit += kInFlight * range.stride) {
      Word16 words[kInFlight];
#pragma unroll
      for (uint32_t i = 0; i < kInFlight; ++i) {
        if (unit + i * range.stride < range.end) words[i] = load_unit(unit + i * range.stride);
      }
#pragma unroll
      for (uint32_t i = 0; i < kInFlight; ++i) {
        if (unit + i * range.stride < range.end) store_unit(unit + i * range.stride, words[i]);
      }
    }
  }

  template <ReduceOp op, int count>
  __device__ __forceinline__ static void fold(Sums& sums, const Word16 (&words)[count], int start) {
#pragma unroll
    for (int r = 0; r < count; ++r) {
      if (start + r >= sums.num_inputs) continue;
      T values[kUnitValues];
      memcpy(values, &words[r], sizeof values);
#pragma unroll
      for (uint32_t i = 0; i < kUnitValues; ++i) {
        const typename Sum<T>::type value = Sum<T>::in(values[i]);
        sums.of[i] = start + r == 0 ? value : combine<T>(op, sums.of[i], value);
      }
    }
  }

  template <ReduceOp op>
  __device__ __forceinline__ static Word16 finished(const Sums& sums) {
    T values[kUnitValues];
#pragma unroll
    for (uint32_t i = 0; i < kUnitValues; ++i) values[i] = finish<T>(op, sums.of[i], sums.num_inputs);
    Word16 word;
    memcpy(&word, values, sizeof word);
    return word;
  }
};

}  // namespace tpk::cuda
