// The fused GEMMs of Hopper: products, transfers and sums in one kernel. Compiled for sm_90a alone.
//
//   gemm_reduce_scatter  every tile of x @ w.T goes, rounded, into the slot of the rank that owns its rows, which sums
//                        the tiles of all ranks as they come.
//   gemm_all_reduce      the same; the sum is also written to the owner's slot, and all ranks copy it from there.
//   all_gather_gemm      every rank copies its rows into its slot, all ranks copy them into x_whole as they arrive, and
//                        multiply the rows that have arrived.
//
// Called by  csrc/cuda/fused_gemm.cpp and fused_gemm_backward.cpp, through the communicator.
// Needs      as in fused_gemm.h and tile_turn.cuh. Blocks [0, communicating) sum or gather, the others multiply.
// Slots      a reduction: [from rank][rows of the owner, N], so R parts; a gather: the owner's rows [rows, K].
// Warps      of every block: 0 loads, 1 is the signal warp, 2 stores tiles, 3 has nothing to do, 4 .. 11 are the
// product
//            threads, which also move: sums and packed rows themselves, other rows by bulk copies (bulk_rows.cuh).
// Sums       fp32 in rank order, rounded once, of products that were rounded once: the bits that reduce_scatter and
//            two_shot make of the same products, under a codec, too (coded_tiles.cuh).
// Traffic    a reduction pushes (R - 1) / R M N values out of each rank, all_reduce pulls as many into it besides; a
//            gather pulls (R - 1) / R M K.
#include <atomic>

#include "dispatch.cuh"
#include "fused_block.cuh"
#include "gather_block.cuh"
#include "reduce_block.cuh"

namespace tpk::cuda {
namespace {

// ---- the kernels ----------------------------------------------------------------------------------------------------

template <class Block>
__device__ __forceinline__ void run(Block& block) {
  if (block.is_skipped()) return;
  block.begin();
  if (threadIdx.x < kWarpgroup) {
    registers_lower<kLoadRegisters>();
    if (threadIdx.x < 32) {
      if (block.multiplies() && one_of_warp()) block.load();
      __syncwarp();
    } else if (threadIdx.x < 64) {
      block.send_signals();
    } else if (threadIdx.x < 96) {
      if (block.multiplies() && one_of_warp()) block.store();
      __syncwarp();
    }
  } else {
    registers_raise<kProductRegisters>();
    if (block.multiplies()) block.multiply_and_send();
    block.move();
  }
  block.end();
}

template <class T, int N, class C>
TPK_KERNEL void __launch_bounds__(kTileThreads, 1) gemm_reduce_kernel(const __grid_constant__ ReduceArgs args) {
  TPK_DYNAMIC_SHARED(char, dynamic_shared);
  ReduceBlock<T, N, C> block(args, dynamic_shared);
  run(block);
}

template <class T, int N>
TPK_KERNEL void __launch_bounds__(kTileThreads, 1) all_gather_gemm_kernel(const __grid_constant__ GatherArgs args) {
  TPK_DYNAMIC_SHARED(char, dynamic_shared);
  GatherBlock<T, N> block(args, dynamic_shared);
  run(block);
}

// ---- launches -------------------------------------------------------------------------------------------------------

static_assert(sizeof(ReduceArgs) <= 4096 && sizeof(GatherArgs) <= 4096, "what a launch takes on any driver of CUDA 12");

bool is_multiple_of_16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// What must hold of every launch but what its slot must have room for.
bool is_usable(const Args& args, const FusedGrid& grid) {
  const GemmOperands& gemm = args.gemm;
  return is_usable(args.peers, 1) && grid.communicating >= 1 && grid.multiplying >= 1 &&
         args.call.codec < Codec::Count && gemm.N > 0 && gemm.N % 8 == 0 && gemm.K > 0 && gemm.K % 8 == 0 &&
         is_multiple_of_16(args.y);
}

Args args_of(const Peers& peers, const Call& call, const GemmOperands& gemm, void* y, const RowCut& cut,
             const FusedGrid& grid) {
  uint32_t rows = 0;
  for (int r = 0; r < peers.world_size; ++r) rows += cut.count[r];
  return {peers, call, gemm, y, cut, rows, static_cast<uint32_t>(grid.communicating)};
}

uint32_t largest_of(const RowCut& cut, int ranks) {
  uint32_t largest = 0;
  for (int r = 0; r < ranks; ++r) largest = cut.count[r] > largest ? cut.count[r] : largest;
  return largest;
}

// Allows a kernel its shared memory, once on each device: a call of the driver takes 1 to 2 us of the host.
cudaError_t allow_shared(const void* kernel, int bytes, std::atomic<uint64_t>& devices) {
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if ((devices.load(std::memory_order_relaxed) & bit) != 0) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) devices.fetch_or(bit, std::memory_order_relaxed);
  return error;
}

template <auto kernel, int N, class KernelArgs>
cudaError_t launch_kernel(const KernelArgs& args, const FusedGrid& grid, cudaStream_t stream) {
  constexpr int kBytes = static_cast<int>(Ring<N>::kBytes);
  static std::atomic<uint64_t> allowed{0};
  const cudaError_t error = allow_shared(reinterpret_cast<const void*>(kernel), kBytes, allowed);
  if (error != cudaSuccess) return error;
  const int blocks = grid.communicating + grid.multiplying;
  return TPK_LAUNCH(kernel, blocks, kTileThreads, kBytes, stream, args);
}

// action(T{}, Columns<N>{})
template <int N>
struct Columns {
  static constexpr int kCount = N;
};
template <class Action>
cudaError_t with_tile(DType dtype, uint32_t columns, Action action) {
  if (dtype == DType::BF16 && columns == 128) return action(Bfloat16{}, Columns<128>{});
  if (dtype == DType::BF16 && columns == 256) return action(Bfloat16{}, Columns<256>{});
  if (dtype == DType::F16 && columns == 128) return action(Half{}, Columns<128>{});
  if (dtype == DType::F16 && columns == 256) return action(Half{}, Columns<256>{});
  return cudaErrorInvalidValue;
}

// action(C{}) for the codec under which values of T are sent; one that sends them as they are is none.
template <class T, class Action>
cudaError_t with_sent(Codec codec, Action action) {
  if (codec == Codec::None) return action(NoCodec{});
  return with_codec(codec, [&](auto c) {
    using C = decltype(c);
    if constexpr (!C::kScaled && std::is_same_v<typename C::Payload, T>) {
      return action(NoCodec{});
    } else {
      return action(c);
    }
  });
}

cudaError_t launch_reduce(const ReduceArgs& args, const FusedGrid& grid, cudaStream_t stream) {
  const GemmOperands& gemm = args.gemm;
  const Codec codec = args.call.codec;
  if (!is_usable(args, grid) || args.call.reduce_op != ReduceOp::Sum) return cudaErrorInvalidValue;
  const int ranks = args.peers.world_size;
  const uint32_t most = most_reduced_rows(args.peers.slot_bytes, ranks, gemm.N, gemm.tile_columns, codec);
  if (gemm.N % sent_unit(codec) != 0 || largest_of(args.cut, ranks) > most) return cudaErrorInvalidValue;
  return with_tile(args.call.dtype, gemm.tile_columns, [&](auto value, auto columns) {
    using T = decltype(value);
    constexpr int N = decltype(columns)::kCount;
    return with_sent<T>(
        codec, [&](auto c) { return launch_kernel<gemm_reduce_kernel<T, N, decltype(c)>, N>(args, grid, stream); });
  });
}

}  // namespace

cudaError_t launch_gemm_reduce_scatter(const Peers& peers, const Call& call, const GemmOperands& gemm, void* y_part,
                                       const RowCut& cut, FusedGrid grid, cudaStream_t stream) {
  return launch_reduce({args_of(peers, call, gemm, y_part, cut, grid), false}, grid, stream);
}

cudaError_t launch_gemm_all_reduce(const Peers& peers, const Call& call, const GemmOperands& gemm, void* y,
                                   const RowCut& cut, FusedGrid grid, cudaStream_t stream) {
  return launch_reduce({args_of(peers, call, gemm, y, cut, grid), true}, grid, stream);
}

cudaError_t launch_all_gather_gemm(const Peers& peers, const Call& call, const void* x_part, uint64_t x_row_stride,
                                   void* x_whole, const GemmOperands& gemm, void* y, const RowCut& cut, FusedGrid grid,
                                   cudaStream_t stream) {
  GatherArgs args{args_of(peers, call, gemm, y, cut, grid), x_part, x_whole, static_cast<size_t>(x_row_stride) * 2};
  if (!is_usable(args, grid) || !is_multiple_of_16(x_part) || !is_multiple_of_16(x_whole) || x_row_stride % 8 != 0) {
    return cudaErrorInvalidValue;
  }
  const uint32_t most = most_gathered_rows(peers.slot_bytes, gemm.K, call.codec);
  if (gemm.K % sent_unit(call.codec) != 0 || largest_of(cut, peers.world_size) > most) return cudaErrorInvalidValue;
  // The ranks will refuse a part that the cut does not give; nothing behind its end is read until then.
  if (call.brings != cut.brings[peers.rank]) args.cut.count[peers.rank] = 0;
  return with_tile(call.dtype, gemm.tile_columns, [&](auto value, auto columns) {
    constexpr int N = decltype(columns)::kCount;
    return launch_kernel<all_gather_gemm_kernel<decltype(value), N>, N>(args, grid, stream);
  });
}

}  // namespace tpk::cuda
