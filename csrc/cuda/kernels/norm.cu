// The residual add and RMSNorm after an all-reduce, in one kernel with it or alone.
//
// Called by  csrc/cuda/norm.cpp and peer_communicator.cpp.
// Needs      all_reduce_add_rms_norm: what peer.cuh needs. A block owns whole tokens, as many on every rank, and at a
//            time so many that their values fill units of the wire: a block's data stays with its number.
// Order      peer.cuh's. The sum goes through residual_out, where the block that wrote it reads it after a barrier.
// Sums       over the ranks as one_shot takes them; over a row in fp32 (fp64) in the order of rows.cuh. All ranks
//            hold the same bits, fused or not.
// Traffic    fused: (R - 1) x into each rank; x, residual, weight, y once, residual_out twice from the cache.
#include "peer.cuh"
#include "rows.cuh"

namespace tpk::cuda {
namespace {

// ---- add and norm --------------------------------------------------------------------------------------------------

// All of [tokens, width].
template <class T>
struct AddNormArgs {
  const T* sum;  // may be residual_out
  const T* residual;
  const T* weight;
  T* y;
  T* residual_out;
  SumOf<T>* inverse_rms;
  size_t width;
  SumOf<T> eps;
};

// sum + residual, rounded, and the squares of what is left.
template <class T>
__device__ __forceinline__ Word16 add_and_square(Word16 sum, Word16 residual, SumOf<T>& squares) {
  UnitValues<T> total(sum);
  const UnitValues<T> added(residual);
#pragma unroll
  for (uint32_t i = 0; i < total.kValues; ++i) total.of[i] += added.of[i];
  const Word16 rounded = total.rounded();
  const UnitValues<T> values(rounded);
#pragma unroll
  for (uint32_t i = 0; i < values.kValues; ++i) squares += values.of[i] * values.of[i];
  return rounded;
}

template <class T>
__device__ __forceinline__ UnitValues<T> normed(Word16 word, SumOf<T> inverse, Word16 weight) {
  UnitValues<T> values(word);
  const UnitValues<T> scale(weight);
#pragma unroll
  for (uint32_t i = 0; i < values.kValues; ++i) values.of[i] = values.of[i] * inverse * scale.of[i];
  return values;
}

template <class T>
__device__ __forceinline__ void add_norm_row(const AddNormArgs<T>& args, size_t token, BlockFold& folds) {
  const Row<T> row(args.width);
  const size_t start = token * args.width;
  const uint32_t units = row.units(), first = threadIdx.x, stride = blockDim.x;
  Word16 sums[kKept], residuals[kKept];
#pragma unroll
  for (uint32_t k = 0; k < kKept; ++k) {
    if (first + k * stride >= units) continue;
    sums[k] = row.load(args.sum + start, first + k * stride);
    residuals[k] = row.load(args.residual + start, first + k * stride);
  }
  SumOf<T> squares = 0;
#pragma unroll
  for (uint32_t k = 0; k < kKept; ++k) {
    if (first + k * stride >= units) continue;
    sums[k] = add_and_square<T>(sums[k], residuals[k], squares);
    row.store(args.residual_out + start, first + k * stride, sums[k]);
  }
  for (uint32_t unit = first + kKept * stride; unit < units; unit += stride) {
    const Word16 sum = row.load(args.sum + start, unit), residual = row.load(args.residual + start, unit);
    row.store(args.residual_out + start, unit, add_and_square<T>(sum, residual, squares));
  }
  const SumOf<T> mean = args.width == 0 ? SumOf<T>(0) : folds.sum(squares) / static_cast<SumOf<T>>(args.width);
  const SumOf<T> inverse = SumOf<T>(1) / std::sqrt(mean + args.eps);
  if (threadIdx.x == 0) args.inverse_rms[token] = inverse;
#pragma unroll
  for (uint32_t k = 0; k < kKept; ++k) {
    const uint32_t unit = first + k * stride;
    if (unit < units) row.store(args.y + start, unit, normed<T>(sums[k], inverse, row.load(args.weight, unit)));
  }
  for (uint32_t unit = first + kKept * stride; unit < units; unit += stride) {
    const Word16 total = row.load(args.residual_out + start, unit);
    row.store(args.y + start, unit, normed<T>(total, inverse, row.load(args.weight, unit)));
  }
}

template <class T>
TPK_KERNEL void __launch_bounds__(kMaxThreads) add_norm_kernel(AddNormArgs<T> args, size_t tokens) {
  BlockFold folds;
  for (size_t token = blockIdx.x; token < tokens; token += gridDim.x) add_norm_row(args, token, folds);
}

template <class T>
struct FusedArgs {
  Peers peers;
  Call call;
  const T* x;
  AddNormArgs<T> norm;
  uint32_t tokens;
  uint32_t at_once;  // tokens whose values fill whole units of the wire
};

template <class Format>
TPK_KERNEL void __launch_bounds__(kMaxThreads, 1) all_reduce_add_norm_kernel(FusedArgs<typename Format::Value> args) {
  using T = typename Format::Value;
  Turn turn(args.peers, args.call, Kernel::AllReduceAddRmsNorm);
  const size_t width = args.norm.width;
  const Length length = length_of<Format>(args.tokens * width);
  const auto first_token = [&](uint32_t block) {
    const uint32_t portions = (args.tokens + args.at_once - 1) / args.at_once;
    const uint32_t token = part_start(portions, static_cast<int>(gridDim.x), static_cast<int>(block)) * args.at_once;
    return token < args.tokens ? token : args.tokens;
  };
  const uint32_t begin = first_token(blockIdx.x), end = first_token(blockIdx.x + 1);
  const Range mine{static_cast<uint32_t>(begin * width / Format::kUnitValues) + threadIdx.x / Format::kUnitThreads,
                   begin == end ? 0 : units_of(length_of<Format>(end * width)), blockDim.x / Format::kUnitThreads};
  if (turn.bring([&] { Format::encode(args.x, turn.slot(turn.rank()), mine, length); })) {
    const Sources inputs(args.peers, turn, 0);
    for (uint32_t unit = mine.first; unit < mine.end; unit += mine.stride) {
      const auto sums = Format::sum(inputs, turn.world_size(), ReduceOp::Sum, unit, length);
      Format::store_values(Format::as_packed(sums), args.norm.residual_out, unit, length);
    }
    __syncthreads();
    BlockFold folds;
    for (uint32_t token = begin; token < end; ++token) add_norm_row<T>(args.norm, token, folds);
  }
  turn.end();
}

uint32_t common_divisor(size_t a, size_t b) {
  while (b != 0) {
    const size_t rest = a % b;
    a = b, b = rest;
  }
  return static_cast<uint32_t>(a);
}

template <class Format>
cudaError_t launch_fused(FusedArgs<typename Format::Value> args, int blocks, cudaStream_t stream) {
  using T = typename Format::Value;
  if (rounded_up(Format::bytes(args.tokens * args.norm.width)) > args.peers.slot_bytes) return cudaErrorInvalidValue;
  constexpr size_t kUnit = Format::kUnitValues;
  args.at_once = static_cast<uint32_t>(kUnit) / common_divisor(kUnit, args.norm.width);
  return TPK_LAUNCH(all_reduce_add_norm_kernel<Format>, blocks, threads_for_row<T>(args.norm.width), 0, stream, args);
}

template <class T>
AddNormArgs<T> add_norm_args(const void* sum, const void* residual, const void* weight, void* y, void* residual_out,
                             void* inverse_rms, size_t width, double eps) {
  return {static_cast<const T*>(sum),
          static_cast<const T*>(residual),
          static_cast<const T*>(weight),
          static_cast<T*>(y),
          static_cast<T*>(residual_out),
          static_cast<SumOf<T>*>(inverse_rms),
          width,
          static_cast<SumOf<T>>(eps)};
}

}  // namespace

cudaError_t launch_all_reduce_add_rms_norm(const Peers& peers, const Call& call, const void* x, const void* residual,
                                           const void* weight, void* y, void* residual_out, void* inverse_rms,
                                           size_t tokens, size_t width, double eps, int blocks, cudaStream_t stream) {
  if (!is_usable(peers, blocks) || tokens > UINT32_MAX / 2) return cudaErrorInvalidValue;
  const auto launch = [&](auto format) {
    using T = typename decltype(format)::Value;
    const auto norm = add_norm_args<T>(residual_out, residual, weight, y, residual_out, inverse_rms, width, eps);
    return launch_fused<decltype(format)>(
        {peers, call, static_cast<const T*>(x), norm, static_cast<uint32_t>(tokens), 1}, blocks, stream);
  };
  if (call.codec != Codec::None) return with_coded(call.dtype, call.codec, launch);
  return with_floating(call.dtype, [&](auto value) { return launch(Plain<decltype(value)>{}); });
}

cudaError_t launch_add_rms_norm(DType dtype, const void* sum, const void* residual, const void* weight, void* y,
                                void* residual_out, void* inverse_rms, size_t tokens, size_t width, double eps,
                                cudaStream_t stream) {
  return with_floating(dtype, [&](auto value) -> cudaError_t {
    using T = decltype(value);
    if (tokens == 0) return cudaSuccess;
    const auto args = add_norm_args<T>(sum, residual, weight, y, residual_out, inverse_rms, width, eps);
    return TPK_LAUNCH(add_norm_kernel<T>, blocks_for_rows(tokens), threads_for_row<T>(width), 0, stream, args, tokens);
  });
}

}  // namespace tpk::cuda
