// What the fused GEMMs send under a codec, and how that is summed (reduce_block.cuh) or gathered (fused_gemm_sm90.cu).
//
//   bf16        values of bf16 (gemm_sm90.cuh, tile_moves.cuh)
//   int8, fp8   a byte a value, packed by the sender in registers, and scales: a row of a tile has whole groups of 32
//   fp16        values of T, 2 bytes in place of 2.03: the 512 values of a scale lie in several tiles, so that no
//               sender has their largest; who sums waits for these tiles and rounds as packing would. Rows that are
//               gathered are rounded by their owner
//
// Bits   those of the same call in two steps. A product is rounded to T, and that is packed; gemm_all_reduce packs the
//        sum, and all ranks have what is unpacked of it, of rows that are gathered, too, the owner included. Groups and
//        blocks are those of the flat tensor, because N is a multiple of them (SentRow::kUnit).
// Loads  all payloads of a unit before the first is used, as in tile_moves.cuh.
#pragma once

#include "tile_moves.cuh"
#include "warp_block.cuh"

namespace tpk::cuda {

// The type of values of 2 bytes that are sent of a tensor of T.
template <class C, class T>
struct SentValues {
  using type = std::conditional_t<C::kScaled, T, typename C::Payload>;
};
template <class T>
struct SentValues<NoCodec, T> {
  using type = T;
};

// ---- int8, fp8 ------------------------------------------------------------------------------------------------------

// Rows of payloads and their scales, from the first ones of a tile on.
template <class C>
struct PackedRows {
  char *payloads, *scales;
  size_t stride, scale_stride;

  __device__ __forceinline__ char* payload(uint32_t row, uint32_t group) const {
    return payloads + row * stride + group * C::kScaleValues;
  }
  __device__ __forceinline__ typename C::Scale* scale(uint32_t row, uint32_t group) const {
    return reinterpret_cast<typename C::Scale*>(scales + row * scale_stride) + group;
  }
  __device__ __forceinline__ PackedRows further(size_t bytes) const {
    return {payloads + bytes, scales + bytes, stride, scale_stride};
  }
};

// The values of one scale, in the registers of a thread.
template <class C>
struct PackedGroup {
  static constexpr uint32_t kValues = C::kScaleValues, kWords = kValues / 16;
  Word16 words[kWords];
  typename C::Scale scale;

  __device__ __forceinline__ static PackedGroup load(const PackedRows<C>& from, uint32_t row, uint32_t group) {
    PackedGroup packed;
#pragma unroll
    for (uint32_t w = 0; w < kWords; ++w) packed.words[w] = load16_peer(from.payload(row, group) + 16 * w);
    packed.scale = *from.scale(row, group);
    return packed;
  }
  __device__ __forceinline__ void store(const PackedRows<C>& to, uint32_t row, uint32_t group) const {
#pragma unroll
    for (uint32_t w = 0; w < kWords; ++w) store16(to.payload(row, group) + 16 * w, words[w]);
    *to.scale(row, group) = scale;
  }

  __device__ __forceinline__ static PackedGroup pack(const float (&values)[kValues]) {
    uint32_t largest = 0;
#pragma unroll
    for (uint32_t i = 0; i < kValues; ++i) {
      const uint32_t magnitude = magnitude_bits(values[i]);
      largest = magnitude > largest ? magnitude : largest;
    }
    PackedGroup packed;
    packed.scale = C::scale_of(largest);
    const typename C::Factors factors = C::packing(packed.scale);
    typename C::Payload payloads[kValues];
#pragma unroll
    for (uint32_t i = 0; i < kValues; ++i) {
      const auto payload = static_cast<typename C::Payload>(C::pack(values[i], factors));
      payloads[i] = C::is_finite(packed.scale) ? payload : typename C::Payload{};
    }
    memcpy(packed.words, payloads, sizeof packed.words);
    return packed;
  }

  // take(i, value) for each.
  template <class Take>
  __device__ __forceinline__ void unpack(Take take) const {
    const typename C::Factors factors = C::unpacking(scale);
    typename C::Payload payloads[kValues];
    memcpy(payloads, words, sizeof payloads);
#pragma unroll
    for (uint32_t i = 0; i < kValues; ++i) take(i, C::unpack(payloads[i], factors));
  }

  // As T, from the group's place in `row` on.
  template <class T>
  __device__ __forceinline__ static void store_values(const float (&values)[kValues], const Rows& to, uint32_t row,
                                                      uint32_t group) {
    T rounded[kValues];
#pragma unroll
    for (uint32_t i = 0; i < kValues; ++i) rounded[i] = from_float<T>(values[i]);
    Word16 out[kValues / 8];
    memcpy(out, rounded, sizeof out);
#pragma unroll
    for (uint32_t w = 0; w < kValues / 8; ++w) store16(to.at(row, group * (kValues / 8) + w), out[w]);
  }
};

// The scales of a row of a tile, as they are stored.
template <size_t bytes>
using ScaleWord = std::conditional_t<bytes == 16, Word16, std::conditional_t<bytes == 8, Word8, uint32_t>>;

__device__ __forceinline__ void store_word(uint32_t* to, uint32_t word) { *to = word; }

// The 16 rows that a warp has of a tile, of which `rows` and `columns` lie inside y: packed into boxes, as in
// stage_boxes, and their scales stored in `to`. The four lanes that have a row have all of each group. Scales behind
// the last column are of zeros, and lie in what fills a row of scales up to 16 bytes.
template <class C, class T, int N>
__device__ __forceinline__ void stage_packed_rows(const float (&d)[N / 2], const PackedRows<C>& to, uint32_t rows,
                                                  uint32_t columns, const T* bias, uint32_t warp, const Ring<N>& ring) {
  constexpr uint32_t kValues = C::kScaleValues, kGroups = N / kValues, kPairs = kValues / 8;
  static_assert(kValues == 32 && N / 128 <= kStagedBoxes);
  const uint32_t lane = threadIdx.x % 32, row = 16 * warp + lane / 4;
  const auto word_at = [&](uint32_t r, uint32_t word) { return word_of_box(ring.box(word / 8, 0), r, word % 8); };
  typename C::Scale scales[2][kGroups];
#pragma unroll
  for (uint32_t g = 0; g < kGroups; ++g) {
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
      uint32_t pairs[kPairs], largest = 0;
#pragma unroll
      for (uint32_t j = 0; j < kPairs; ++j) {
        pairs[j] = product_pair<T, N>(d, kPairs * g + j, half == 1, bias, columns);
        const uint32_t first = magnitude_bits(first_of<T>(pairs[j])), second = magnitude_bits(second_of<T>(pairs[j]));
        largest = first > largest ? first : largest;
        largest = second > largest ? second : largest;
      }
#pragma unroll
      for (int distance = 1; distance < 4; distance *= 2) {
        const uint32_t other = __shfl_xor_sync(0xffffffffu, largest, distance);
        largest = other > largest ? other : largest;
      }
      const typename C::Scale scale = C::scale_of(largest);
      const typename C::Factors factors = C::packing(scale);
      scales[half][g] = scale;
#pragma unroll
      for (uint32_t j = 0; j < kPairs; ++j) {
        const uint32_t first = C::pack(first_of<T>(pairs[j]), factors) & 0xffu;
        const uint32_t second = C::pack(second_of<T>(pairs[j]), factors) & 0xffu;
        char* const word = word_at(row + 8 * half, 2 * g + j / 2);
        reinterpret_cast<uint16_t*>(word)[4 * (j % 2) + lane % 4] =
            C::is_finite(scale) ? static_cast<uint16_t>(first | second << 8) : uint16_t{0};
      }
    }
  }
  using Scales = ScaleWord<sizeof scales[0]>;
#pragma unroll
  for (uint32_t half = 0; half < 2; ++half) {
    const uint32_t r = row + 8 * half;
    Scales word;
    static_assert(sizeof word == sizeof scales[0]);
    memcpy(&word, scales[half], sizeof word);
    if (lane % 4 == half && r < rows) store_word(reinterpret_cast<Scales*>(to.scale(r, 0)), word);
  }
}

// to = the sum over the ranks of parts + r * part_bytes, for rows x groups of them; with `sent`, packed there and
// unpacked again. `sent` may be one of the parts: a thread writes what it alone has read.
template <class C, class T, int N>
__device__ __forceinline__ void sum_packed_rows(uint32_t rows, uint32_t groups, const PackedRows<C>& parts,
                                                size_t part_bytes, int ranks, const Rows& to, bool is_sent,
                                                const PackedRows<C>& sent) {
  using Group = PackedGroup<C>;
  constexpr uint32_t kGroups = N / Group::kValues;
#pragma unroll 1
  for (uint32_t i = product_thread(); i < rows * kGroups; i += kProductThreads) {
    const uint32_t row = i / kGroups, group = i % kGroups;
    if (group >= groups) continue;
    Group packed[kMaxPeers];
#pragma unroll
    for (int r = 0; r < kMaxPeers; ++r) {
      if (r < ranks) packed[r] = Group::load(parts.further(static_cast<size_t>(r) * part_bytes), row, group);
    }
    float sums[Group::kValues];
#pragma unroll
    for (int r = 0; r < kMaxPeers; ++r) {
      if (r >= ranks) continue;
      packed[r].unpack([&](uint32_t k, float value) { sums[k] = r == 0 ? value : sums[k] + value; });
    }
    if (is_sent) {
      const Group sum = Group::pack(sums);
      sum.store(sent, row, group);
      sum.unpack([&](uint32_t k, float value) { sums[k] = value; });
    }
    Group::template store_values<T>(sums, to, row, group);
  }
}

// to = from, unpacked.
template <class C, class T, int N>
__device__ __forceinline__ void copy_packed_rows(uint32_t rows, uint32_t groups, const PackedRows<C>& from,
                                                 const Rows& to) {
  using Group = PackedGroup<C>;
  constexpr uint32_t kGroups = N / Group::kValues, kInFlight = kTileRows * kGroups / kProductThreads;
  const auto has = [=](uint32_t i) { return i < rows * kGroups && i % kGroups < groups; };
  Group packed[kInFlight];
#pragma unroll
  for (uint32_t k = 0; k < kInFlight; ++k) {
    const uint32_t i = product_thread() + k * kProductThreads;
    if (has(i)) packed[k] = Group::load(from, i / kGroups, i % kGroups);
  }
#pragma unroll
  for (uint32_t k = 0; k < kInFlight; ++k) {
    const uint32_t i = product_thread() + k * kProductThreads;
    if (!has(i)) continue;
    float values[Group::kValues];
    packed[k].unpack([&](uint32_t n, float value) { values[n] = value; });
    Group::template store_values<T>(values, to, i / kGroups, i % kGroups);
  }
}

// to = from, packed; whole = what is unpacked of it.
template <class C, class T, int N>
__device__ __forceinline__ void pack_rows(uint32_t rows, uint32_t groups, const Rows& from, const PackedRows<C>& to,
                                          const Rows& whole) {
  using Group = PackedGroup<C>;
  constexpr uint32_t kGroups = N / Group::kValues, kWords = Group::kValues / 8;
#pragma unroll 2
  for (uint32_t i = product_thread(); i < rows * kGroups; i += kProductThreads) {
    const uint32_t row = i / kGroups, group = i % kGroups;
    if (group >= groups) continue;
    Word16 words[kWords];
#pragma unroll
    for (uint32_t w = 0; w < kWords; ++w) words[w] = load16_peer(from.at(row, group * kWords + w));
    T of[Group::kValues];
    memcpy(of, words, sizeof of);
    float values[Group::kValues];
#pragma unroll
    for (uint32_t k = 0; k < Group::kValues; ++k) values[k] = to_float(of[k]);
    const Group packed = Group::pack(values);
    packed.store(to, row, group);
    packed.unpack([&](uint32_t k, float value) { values[k] = value; });
    Group::template store_values<T>(values, whole, row, group);
  }
}

// ---- bf16 -----------------------------------------------------------------------------------------------------------

// Eight values of T as a codec without scales leaves them.
template <class C, class T>
struct AsPacked {
  __device__ __forceinline__ Word16 operator()(Word16 word) const {
    T of[8];
    memcpy(of, &word, sizeof of);
#pragma unroll
    for (T& value : of) value = from_float<T>(C::unpack(C::pack(to_float(value), {}), {}));
    memcpy(&word, of, sizeof of);
    return word;
  }
};

// ---- fp16 -----------------------------------------------------------------------------------------------------------

// to (and second) = the sum over the ranks of parts + r * part_bytes, for rows of a whole block, each as packing and
// unpacking leaves it; a sum that is sent, too. A warp has a row.
template <class C, class T>
__device__ __forceinline__ void sum_blocks(uint32_t rows, const Rows& parts, size_t part_bytes, int ranks,
                                           const Rows& to, const Rows& second, bool is_sent) {
  static_assert(C::kScaleValues == kCodecBlockValues && sizeof(T) == 2);
#pragma unroll 1
  for (uint32_t row = product_thread() / kWarp; row < rows; row += kProductWarps) {
    Word16 words[kMaxPeers][kHalves];
#pragma unroll
    for (int r = 0; r < kMaxPeers; ++r) {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        const char* const from = parts.at(row, half * kWarp + lane());
        if (r < ranks) words[r][half] = load16_peer(from + static_cast<size_t>(r) * part_bytes);
      }
    }
    LaneValues sums;
#pragma unroll
    for (int r = 0; r < kMaxPeers; ++r) {
      if (r >= ranks) continue;
      LaneValues values;
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        T of[kLaneValues];
        memcpy(of, &words[r][half], sizeof of);
#pragma unroll
        for (uint32_t i = 0; i < kLaneValues; ++i) values.of[half][i] = to_float(of[i]);
      }
      values = LaneWire<C>::pack(values).unpack();
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
#pragma unroll
        for (uint32_t i = 0; i < kLaneValues; ++i) {
          sums.of[half][i] = r == 0 ? values.of[half][i] : sums.of[half][i] + values.of[half][i];
        }
      }
    }
    if (is_sent) sums = LaneWire<C>::pack(sums).unpack();
    store_lane(sums, reinterpret_cast<T*>(to.at(row, 0)), kCodecBlockValues);
    if (second.first != nullptr) store_lane(sums, reinterpret_cast<T*>(second.at(row, 0)), kCodecBlockValues);
  }
}

}  // namespace tpk::cuda
