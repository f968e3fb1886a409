// From a call's dtype and codec to the format that its kernel is compiled for, and the shape of its launch. For .cu
// files.
#pragma once

#include "cuda/kernels/launch.h"
#include "kernels.h"
#include "vector.cuh"
#include "warp_block.cuh"

namespace tpk::cuda {

constexpr int kMaxThreads = 512;  // of a block

// Threads of each of so many blocks over which n values are dealt: no more warps than have work.
template <class Format>
int threads_for(size_t n, int blocks) {
  const size_t work = (n + Format::kUnitValues - 1) / Format::kUnitValues * Format::kUnitThreads;
  const size_t each = (work + static_cast<size_t>(blocks) - 1) / static_cast<size_t>(blocks);
  if (each >= kMaxThreads) return kMaxThreads;
  return each <= kWarp ? kWarp : static_cast<int>((each + kWarp - 1) / kWarp) * kWarp;
}

constexpr size_t rounded_up(size_t bytes) { return (bytes + 15) / 16 * 16; }

inline bool is_usable(const Peers& peers, int blocks) {
  return peers.world_size >= 1 && peers.world_size <= kMaxPeers && peers.rank >= 0 && peers.rank < peers.world_size &&
         blocks >= 1 && blocks <= kMaxBlocks && peers.slot_bytes % 16 == 0;
}

// Where an input can be read from its heap: plain values at a multiple of 16 bytes.
inline uint32_t heap_units_of(const Call& call) {
  if (call.codec != Codec::None || call.heap_offset == kNotInHeap || call.heap_offset % 16 != 0) return kNoUnits;
  return call.heap_offset / 16 < kNoUnits ? static_cast<uint32_t>(call.heap_offset / 16) : kNoUnits;
}

// action(C{}) for the codec.
template <class Action>
cudaError_t with_codec(Codec codec, Action action) {
  switch (codec) {
#define TPK_CODEC_CASE(name, id, type) \
  case Codec::id: return action(type{});
    TPK_CODECS(TPK_CODEC_CASE)
#undef TPK_CODEC_CASE
    default: return cudaErrorInvalidValue;
  }
}

// action(Coded<C, T>{}): codecs pack float, bfloat16 and half.
template <class Action>
cudaError_t with_coded(DType dtype, Codec codec, Action action) {
  return with_codec(codec, [&](auto c) -> cudaError_t {
    using C = decltype(c);
    switch (dtype) {
      case DType::F32: return action(Coded<C, float>{});
      case DType::BF16: return action(Coded<C, Bfloat16>{});
      case DType::F16: return action(Coded<C, Half>{});
      default: return cudaErrorInvalidValue;
    }
  });
}

// action(Format{}) for what wire_of (core/wire.h) reduces; the rest has no meaning and is refused.
template <class Action>
cudaError_t with_reduction(DType dtype, Codec codec, ReduceOp op, Action action) {
  if (codec != Codec::None) {
    if (op != ReduceOp::Sum && op != ReduceOp::Avg) return cudaErrorInvalidValue;
    return with_coded(dtype, codec, action);
  }
  if (op > ReduceOp::Min || (op == ReduceOp::Avg && dtype > DType::F16)) return cudaErrorInvalidValue;
  switch (dtype) {
    case DType::F32: return action(Plain<float>{});
    case DType::F64: return action(Plain<double>{});
    case DType::BF16: return action(Plain<Bfloat16>{});
    case DType::F16: return action(Plain<Half>{});
    case DType::I8: return action(Plain<int8_t>{});
    case DType::U8: return action(Plain<uint8_t>{});
    case DType::I16: return action(Plain<int16_t>{});
    case DType::I32: return action(Plain<int32_t>{});
    case DType::I64: return action(Plain<int64_t>{});
    default: return cudaErrorInvalidValue;
  }
}

// action(Format{}, times): plain values are moved as integers of their size, those of 16 bytes as two each.
template <class Action>
cudaError_t with_move(DType dtype, Codec codec, Action action) {
  if (codec != Codec::None) return with_coded(dtype, codec, [&](auto format) { return action(format, size_t{1}); });
  if (dtype >= DType::Count) return cudaErrorInvalidValue;
  switch (size_of(dtype)) {
    case 1: return action(Plain<uint8_t>{}, size_t{1});
    case 2: return action(Plain<uint16_t>{}, size_t{1});
    case 4: return action(Plain<uint32_t>{}, size_t{1});
    case 8: return action(Plain<uint64_t>{}, size_t{1});
    default: return action(Plain<uint64_t>{}, size_t{2});
  }
}

}  // namespace tpk::cuda
