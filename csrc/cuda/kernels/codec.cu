// The moves of a wire (core/wire.h) on one device: encode, decode, reduce wires, encode with error feedback.
//
// Called by  transport `group`, which lets the process group carry the wires, and by gradient compression.
// Needs      wires of a codec aligned to 16 bytes. An output may be one of the inputs.
// Sums       fp32 (fp64 in fp64, integers wrapping), in the order of the list, rounded once; codecs to the CPU's bytes.
// Traffic    each value and each wire is read and written once.
#include "core/codec/plain.h"
#include "dispatch.cuh"

namespace tpk::cuda {
namespace {

constexpr int kThreads = 256;
constexpr size_t kMaxGrid = 1024;

template <class Format>
int blocks_for(size_t n) {
  const size_t work = units_of(length_of<Format>(n)) * size_t{Format::kUnitThreads};
  const size_t blocks = (work + kThreads - 1) / kThreads;
  return static_cast<int>(blocks < 1 ? 1 : blocks < kMaxGrid ? blocks : kMaxGrid);
}

template <class Format>
TPK_KERNEL void __launch_bounds__(kThreads, 2)
    encode_kernel(const typename Format::Value* values, char* wire, size_t n) {
  const Length length = length_of<Format>(n);
  Format::encode(values, wire, share_of<Format>(0, units_of(length)), length);
}

template <class Format>
TPK_KERNEL void __launch_bounds__(kThreads, 2)
    decode_kernel(const char* wire, typename Format::Value* values, size_t n) {
  const Length length = length_of<Format>(n);
  Format::decode(wire, values, share_of<Format>(0, units_of(length)), length, Reach::Own);
}

struct ReduceArgs {
  WireList list;
  int num_inputs;
  ReduceOp op;
  void* out;
  size_t n;
};

struct Inputs {
  static constexpr int kMost = sizeof(WireList::wire) / sizeof(void*);
  static constexpr Reach kReach = Reach::Own;
  const WireList& list;
  __device__ __forceinline__ const char* operator[](int r) const { return static_cast<const char*>(list.wire[r]); }
};

template <class Format, bool to_values>
TPK_KERNEL void __launch_bounds__(kThreads, 2) reduce_kernel(ReduceArgs args) {
  const Length length = length_of<Format>(args.n);
  const Range mine = share_of<Format>(0, units_of(length));
  for (uint32_t unit = mine.first; unit < mine.end; unit += mine.stride) {
    const auto sums = Format::sum(Inputs{args.list}, args.num_inputs, args.op, unit, length);
    if (to_values) {
      Format::store_values(sums, static_cast<typename Format::Value*>(args.out), unit, length);
    } else {
      Format::store_wire(sums, static_cast<char*>(args.out), unit, length);
    }
  }
}

// The rounding error is kept for the next step, unless it is not finite: it would stay for ever.
template <class C, class T>
TPK_KERNEL void __launch_bounds__(kThreads, 2)
    feedback_kernel(const T* values, float* residual, char* wire, float scale, size_t n) {
  using Format = Coded<C, T>;
  const Length length = length_of<Format>(n);
  const Range mine = share_of<Format>(0, units_of(length));
  for (uint32_t unit = mine.first; unit < mine.end; unit += mine.stride) {
    const uint32_t count = values_in<Format>(unit, length);
    const size_t start = size_t{unit} * Format::kUnitValues;
    LaneValues sent = load_lane(values + start, count), kept = load_lane(residual + start, count);
#pragma unroll
    for (int i = 0; i < kHalves * static_cast<int>(kLaneValues); ++i) {
      float& value = sent.of[i / kLaneValues][i % kLaneValues];
      value = scale * value + kept.of[i / kLaneValues][i % kLaneValues];
    }
    const LaneWire<C> packed = LaneWire<C>::pack(sent);
    packed.store(wire + size_t{unit} * Format::kUnitBytes, count);
    const LaneValues decoded = packed.unpack();
#pragma unroll
    for (int i = 0; i < kHalves * static_cast<int>(kLaneValues); ++i) {
      const float error = sent.of[i / kLaneValues][i % kLaneValues] - decoded.of[i / kLaneValues][i % kLaneValues];
      if (magnitude_bits(error) < 0x7f800000u) kept.of[i / kLaneValues][i % kLaneValues] = error;
    }
    store_lane(kept, residual + start, count);
  }
}

bool is_aligned_wire(const void* wire) { return reinterpret_cast<uintptr_t>(wire) % 16 == 0; }

template <bool to_values>
cudaError_t reduce(DType dtype, Codec codec, ReduceOp op, const WireList& list, int num_inputs, void* out, size_t n,
                   cudaStream_t stream) {
  if (num_inputs < 1 || num_inputs > Inputs::kMost) return cudaErrorInvalidValue;
  for (int r = 0; codec != Codec::None && r < num_inputs; ++r) {
    if (!is_aligned_wire(list.wire[r])) return cudaErrorInvalidValue;
  }
  if (codec != Codec::None && !to_values && !is_aligned_wire(out)) return cudaErrorInvalidValue;
  if (n == 0) return cudaSuccess;
  return with_reduction(dtype, codec, op, [&](auto format) -> cudaError_t {
    using Format = decltype(format);
    // Plain values are their own wire: one kernel serves both.
    constexpr bool values = Format::kPlain || to_values;
    const ReduceArgs args{list, num_inputs, op, out, n};
    return TPK_LAUNCH((reduce_kernel<Format, values>), blocks_for<Format>(n), kThreads, 0, stream, args);
  });
}

cudaError_t copy(DType dtype, const void* from, void* to, size_t n, cudaStream_t stream) {
  if (dtype >= DType::Count) return cudaErrorInvalidValue;
  if (from == to || n == 0) return cudaSuccess;
  return cudaMemcpyAsync(to, from, n * size_of(dtype), cudaMemcpyDeviceToDevice, stream);
}

}  // namespace

cudaError_t launch_encode(DType dtype, Codec codec, const void* values, void* wire, size_t n, cudaStream_t stream) {
  if (codec == Codec::None) return copy(dtype, values, wire, n, stream);
  if (!is_aligned_wire(wire)) return cudaErrorInvalidValue;
  if (n == 0) return cudaSuccess;
  return with_coded(dtype, codec, [&](auto format) -> cudaError_t {
    using Format = decltype(format);
    return TPK_LAUNCH(encode_kernel<Format>, blocks_for<Format>(n), kThreads, 0, stream,
                      static_cast<const typename Format::Value*>(values), static_cast<char*>(wire), n);
  });
}

cudaError_t launch_decode(DType dtype, Codec codec, const void* wire, void* values, size_t n, cudaStream_t stream) {
  if (codec == Codec::None) return copy(dtype, wire, values, n, stream);
  if (!is_aligned_wire(wire)) return cudaErrorInvalidValue;
  if (n == 0) return cudaSuccess;
  return with_coded(dtype, codec, [&](auto format) -> cudaError_t {
    using Format = decltype(format);
    return TPK_LAUNCH(decode_kernel<Format>, blocks_for<Format>(n), kThreads, 0, stream, static_cast<const char*>(wire),
                      static_cast<typename Format::Value*>(values), n);
  });
}

cudaError_t launch_reduce_wires(DType dtype, Codec codec, ReduceOp op, const WireList& list, int num_inputs, void* wire,
                                size_t n, cudaStream_t stream) {
  return reduce<false>(dtype, codec, op, list, num_inputs, wire, n, stream);
}

cudaError_t launch_reduce_wires_to_values(DType dtype, Codec codec, ReduceOp op, const WireList& list, int num_inputs,
                                          void* values, size_t n, cudaStream_t stream) {
  return reduce<true>(dtype, codec, op, list, num_inputs, values, n, stream);
}

cudaError_t launch_encode_with_feedback(DType dtype, Codec codec, const void* values, float* residual, void* wire,
                                        float scale, size_t n, cudaStream_t stream) {
  if (!is_aligned_wire(wire)) return cudaErrorInvalidValue;
  if (n == 0) return cudaSuccess;
  const auto launch = [&](auto first) -> cudaError_t {
    using T = decltype(first);
    const auto packed = [&](auto c) -> cudaError_t {
      using C = decltype(c);
      return TPK_LAUNCH((feedback_kernel<C, T>), (blocks_for<Coded<C, T>>(n)), kThreads, 0, stream,
                        static_cast<const T*>(values), residual, static_cast<char*>(wire), scale, n);
    };
    return codec == Codec::None ? packed(PlainCodec<T>{}) : with_codec(codec, packed);
  };
  switch (dtype) {
    case DType::F32: return launch(float{});
    case DType::BF16: return launch(Bfloat16{});
    case DType::F16: return launch(Half{});
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace tpk::cuda
