// Values under a codec: a block of 512 in the registers of a warp, 16 values a lane.
//
// Lane l holds values [8 l, 8 l + 8) of each half of the block, so that the payloads of a lane are one 16-byte access
// (8 for one-byte payloads) and neighbours lie side by side. A scale is the largest magnitude of its values: of the
// whole warp, or of the lanes that share it.
#pragma once

#include "vector.cuh"

namespace tpk::cuda {

constexpr int kWarp = 32;
constexpr int kHalves = 2;
constexpr uint32_t kLaneValues = 8;  // of each half
static_assert(kHalves * kWarp * kLaneValues == kCodecBlockValues, "a warp holds a block");

__device__ __forceinline__ uint32_t lane() { return threadIdx.x % kWarp; }

// The first of this lane's values in a half of a block, and how many of them a block of `count` values has.
__device__ __forceinline__ uint32_t lane_start(int half) { return (half * kWarp + lane()) * kLaneValues; }
__device__ __forceinline__ uint32_t lane_count(int half, uint32_t count) {
  const uint32_t start = lane_start(half);
  return count <= start ? 0 : count - start < kLaneValues ? count - start : kLaneValues;
}

struct alignas(8) Word8 {
  uint32_t x, y;
};
__device__ __forceinline__ Word8 load_word(const Word8* from, Reach) { return *from; }
__device__ __forceinline__ Word16 load_word(const Word16* from, Reach reach) {
  return reach == Reach::Peer ? load16_peer(from) : load16(from);
}
__device__ __forceinline__ void store_word(Word8* to, Word8 word) { *to = word; }
__device__ __forceinline__ void store_word(Word16* to, Word16 word) { store16(to, word); }

// Eight values of a lane, in accesses as wide as they are and as their alignment allows; what is missing is zero.
template <class T>
struct Eight {
  T of[kLaneValues];
  using Word = std::conditional_t<sizeof(T) == 1, Word8, Word16>;
  static constexpr size_t kWords = sizeof(of) / sizeof(Word);

  __device__ __forceinline__ static Eight load(const T* from, uint32_t count, Reach reach) {
    Eight values;
    if (count == kLaneValues && is_aligned(from, sizeof(Word))) {
      Word words[kWords];
#pragma unroll
      for (size_t w = 0; w < kWords; ++w) words[w] = load_word(reinterpret_cast<const Word*>(from) + w, reach);
      memcpy(values.of, words, sizeof words);
      return values;
    }
#pragma unroll
    for (uint32_t i = 0; i < kLaneValues; ++i) values.of[i] = i < count ? from[i] : T{};
    return values;
  }

  __device__ __forceinline__ void store(T* to, uint32_t count) const {
    if (count == kLaneValues && is_aligned(to, sizeof(Word))) {
      Word words[kWords];
      memcpy(words, of, sizeof words);
#pragma unroll
      for (size_t w = 0; w < kWords; ++w) store_word(reinterpret_cast<Word*>(to) + w, words[w]);
      return;
    }
#pragma unroll
    for (uint32_t i = 0; i < kLaneValues; ++i) {
      if (i < count) to[i] = of[i];
    }
  }
};

// This lane's values of a block.
struct LaneValues {
  float of[kHalves][kLaneValues];
};

template <class T>
__device__ __forceinline__ LaneValues load_lane(const T* values, uint32_t count) {
  LaneValues mine;
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
    const Eight<T> raw = Eight<T>::load(values + lane_start(half), lane_count(half, count), Reach::Own);
#pragma unroll
    for (uint32_t i = 0; i < kLaneValues; ++i) mine.of[half][i] = to_float(raw.of[i]);
  }
  return mine;
}

template <class T>
__device__ __forceinline__ void store_lane(const LaneValues& mine, T* values, uint32_t count) {
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
    Eight<T> raw;
#pragma unroll
    for (uint32_t i = 0; i < kLaneValues; ++i) raw.of[i] = from_float<T>(mine.of[half][i]);
    raw.store(values + lane_start(half), lane_count(half, count));
  }
}

// This lane's part of a packed block.
template <class C>
struct LaneWire {
  Eight<typename C::Payload> payload[kHalves];
  typename C::Scale scale[kHalves];

  // All lanes of the warp call; values that are missing are zero.
  __device__ __forceinline__ static LaneWire pack(const LaneValues& values) {
    LaneWire wire;
    uint32_t largest[kHalves] = {};
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
#pragma unroll
      for (uint32_t i = 0; i < kLaneValues; ++i) {
        const uint32_t magnitude = magnitude_bits(values.of[half][i]);
        largest[half] = magnitude > largest[half] ? magnitude : largest[half];
      }
    }
    if constexpr (C::kScaled && C::kScaleValues == kCodecBlockValues) {
      largest[0] = largest[1] = warp_max(largest[0] > largest[1] ? largest[0] : largest[1]);
    } else if constexpr (C::kScaled) {
      largest[0] = lanes_max(largest[0]), largest[1] = lanes_max(largest[1]);
    }
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      wire.scale[half] = C::scale_of(largest[half]);
      const typename C::Factors factors = C::packing(wire.scale[half]);
#pragma unroll
      for (uint32_t i = 0; i < kLaneValues; ++i) {
        const auto payload = static_cast<typename C::Payload>(C::pack(values.of[half][i], factors));
        wire.payload[half].of[i] = C::is_finite(wire.scale[half]) ? payload : typename C::Payload{};
      }
    }
    return wire;
  }

  __device__ __forceinline__ LaneValues unpack() const {
    LaneValues values;
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const typename C::Factors factors = C::unpacking(scale[half]);
#pragma unroll
      for (uint32_t i = 0; i < kLaneValues; ++i) values.of[half][i] = C::unpack(payload[half].of[i], factors);
    }
    return values;
  }

  __device__ __forceinline__ static LaneWire load(const char* block, uint32_t count, Reach reach) {
    LaneWire wire;
    const auto* payloads = reinterpret_cast<const typename C::Payload*>(block + C::kHeaderBytes);
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      wire.scale[half] = read_scale<C>(block, lane_start(half) / C::kScaleValues);
      wire.payload[half] =
          Eight<typename C::Payload>::load(payloads + lane_start(half), lane_count(half, count), reach);
    }
    return wire;
  }

  __device__ __forceinline__ void store(char* block, uint32_t count) const {
    store_header(block, count);
    auto* payloads = reinterpret_cast<typename C::Payload*>(block + C::kHeaderBytes);
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      payload[half].store(payloads + lane_start(half), lane_count(half, count));
    }
  }

 private:
  // Over the lanes that share a scale.
  __device__ __forceinline__ static uint32_t lanes_max(uint32_t value) {
    static_assert(C::kScaleValues % kLaneValues == 0, "the values of a lane's half share a scale");
    for (size_t distance = C::kScaleValues / kLaneValues / 2; distance > 0; distance /= 2) {
      const uint32_t other = __shfl_xor_sync(0xffffffffu, value, static_cast<int>(distance));
      value = other > value ? other : value;
    }
    return value;
  }

  __device__ __forceinline__ void store_header(char* block, uint32_t count) const {
    using Scale = typename C::Scale;
    constexpr size_t kScales = kCodecBlockValues / C::kScaleValues;
    if constexpr (C::kScaled && kScales == 1) {
      static_assert(C::kHeaderBytes == 16, "one scale and zeros are one store");
      Word16 header{};
      memcpy(&header, &scale[0], sizeof(Scale));
      if (lane() == 0) store16(block, header);
    } else if constexpr (C::kScaled) {
      static_assert(C::kHeaderBytes == kScales * sizeof(Scale), "scales fill the header");
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {  // by the first lane of each; zero where a short block has no values
        if (lane_start(half) % C::kScaleValues != 0) continue;
        reinterpret_cast<Scale*>(block)[lane_start(half) / C::kScaleValues] =
            lane_start(half) < count ? scale[half] : Scale{};
      }
    }
  }
};

// A tensor of T under codec C. Wires are aligned to 16 bytes, values as T is.
template <class C, class T>
struct Coded {
  using Value = T;
  static constexpr size_t kUnitValues = kCodecBlockValues;
  static constexpr size_t kUnitBytes = C::kBlockBytes;
  static constexpr uint32_t kUnitThreads = kWarp;
  static constexpr bool kPlain = false;
  static_assert(C::kBlockValues == kCodecBlockValues && C::kBlockBytes % 16 == 0, "blocks stay aligned");

  struct Sums {
    LaneValues of;
  };

  TPK_HOST_DEVICE static constexpr size_t bytes(size_t n) { return C::bytes(n); }

  __device__ __forceinline__ static void encode(const T* values, char* wire, Range range, Length length) {
    for (uint32_t unit = range.first; unit < range.end; unit += range.stride) {
      const LaneValues mine = load_lane(values + size_t{unit} * kUnitValues, values_in<Coded>(unit, length));
      LaneWire<C>::pack(mine).store(wire + size_t{unit} * kUnitBytes, values_in<Coded>(unit, length));
    }
  }

  __device__ __forceinline__ static void copy_packed(const char* from, char* wire, Range range, Length length) {
    const bool aligned = is_aligned(from);
    for (uint32_t unit = range.first; unit < range.end; unit += range.stride) {
      const char* const block = from + size_t{unit} * kUnitBytes;
      char* const to = wire + size_t{unit} * kUnitBytes;
      const uint32_t size = static_cast<uint32_t>(bytes(values_in<Coded>(unit, length)));
      const uint32_t words = aligned ? size / 16 : 0;
      for (uint32_t i = lane(); i < words; i += kWarp) store16(to + i * 16, load16(block + i * 16));
      for (uint32_t i = words * 16 + lane(); i < size; i += kWarp) to[i] = block[i];
    }
  }

  __device__ __forceinline__ static void decode(const char* wire, T* values, Range range, Length length, Reach reach) {
    for (uint32_t unit = range.first; unit < range.end; unit += range.stride) {
      const LaneWire<C> packed =
          LaneWire<C>::load(wire + size_t{unit} * kUnitBytes, values_in<Coded>(unit, length), reach);
      store_lane(packed.unpack(), values + size_t{unit} * kUnitValues, values_in<Coded>(unit, length));
    }
  }

  template <class Wires>
  __device__ __forceinline__ static Sums sum(const Wires& wires, int count, ReduceOp op, uint32_t unit, Length length) {
    constexpr int kBatch = 4;
    Sums sums;
#pragma unroll(Wires::kMost <= kMaxPeers ? Wires::kMost / kBatch : 1)
    for (int start = 0; start < Wires::kMost; start += kBatch) {
      if (start >= count) break;
      LaneWire<C> blocks[kBatch];
#pragma unroll
      for (int r = 0; r < kBatch; ++r) {
        if (start + r >= count) continue;
        const char* block = wires[start + r] + size_t{unit} * kUnitBytes;
        blocks[r] = LaneWire<C>::load(block, values_in<Coded>(unit, length), Wires::kReach);
      }
#pragma unroll
      for (int r = 0; r < kBatch; ++r) {
        if (start + r < count) add(sums.of, blocks[r].unpack(), start + r == 0);
      }
    }
    if (op == ReduceOp::Avg) divide(sums.of, static_cast<float>(count));
    return sums;
  }

  template <class Wires, class Store>
  __device__ __forceinline__ static void sum_each(const Wires& wires, int count, ReduceOp op, Range range,
                                                  Length length, Store store) {
    for (uint32_t unit = range.first; unit < range.end; unit += range.stride) {
      store(unit, sum(wires, count, op, unit, length));
    }
  }

  __device__ __forceinline__ static Sums as_packed(const Sums& sums) { return {LaneWire<C>::pack(sums.of).unpack()}; }

  __device__ __forceinline__ static void store_values(const Sums& sums, T* values, uint32_t unit, Length length) {
    store_lane(sums.of, values + size_t{unit} * kUnitValues, values_in<Coded>(unit, length));
  }

  __device__ __forceinline__ static void store_wire(const Sums& sums, char* wire, uint32_t unit, Length length) {
    __syncwarp();  // every lane has read the header
    LaneWire<C>::pack(sums.of).store(wire + size_t{unit} * kUnitBytes, values_in<Coded>(unit, length));
  }

 private:
  __device__ __forceinline__ static void add(LaneValues& sums, const LaneValues& values, bool first) {
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
#pragma unroll
      for (uint32_t i = 0; i < kLaneValues; ++i) {
        sums.of[half][i] = first ? values.of[half][i] : sums.of[half][i] + values.of[half][i];
      }
    }
  }

  __device__ __forceinline__ static void divide(LaneValues& sums, float by) {
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
#pragma unroll
      for (uint32_t i = 0; i < kLaneValues; ++i) sums.of[half][i] /= by;
    }
  }
};

}  // namespace tpk::cuda
