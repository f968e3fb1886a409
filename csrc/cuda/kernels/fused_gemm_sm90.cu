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
// Warps      of every block: 0 loads, 1 is the signal warp, 2 and 3 store the tiles of a reduction, 4 .. 11 are the
//            product threads, which also move.
// Sums       fp32 in rank order, rounded once, of products that were rounded once: the bits that reduce_scatter and
//            two_shot make of the same products, under a codec, too (coded_tiles.cuh).
// Traffic    a reduction pushes (R - 1) / R M N values out of each rank, all_reduce pulls as many into it besides; a
//            gather pulls (R - 1) / R M K.
#include <atomic>

#include "dispatch.cuh"
#include "fused_block.cuh"
#include "reduce_block.cuh"

namespace tpk::cuda {
namespace {

// ---- all_gather_gemm ------------------------------------------------------------------------------------------------

template <class T, int N>
class GatherBlock : public Block<T, N> {
  using Base = Block<T, N>;
  using Base::args_, Base::me, Base::ranks, Base::ring_, Base::turn_;

 public:
  __device__ __forceinline__ GatherBlock(const GatherArgs& args, char* dynamic_shared)
      : Base(args, Kernel::AllGatherGemm, 0, dynamic_shared),
        gather_(args),
        order_(TileOrder::of_gather(args.cut, args.peers.world_size, args.peers.rank, args.gemm.N, N)),
        slices_(divided_up(args.gemm.K, kGatherColumns)) {}

  // This rank's rows are read in place; those of others, and all under a codec, when their items have arrived, if the
  // ranks agree.
  __device__ __forceinline__ void load() {
    Place<N> place;
    for (uint32_t i = Base::first_tile(); i < order_.total(); i += Base::tile_step()) {
      const Tile tile = order_.by_part(i);
      if (!is_to_be_multiplied(tile)) return;
      const auto await_x = [&](uint32_t step) { return lies_there(tile) || await_item(tile, step); };
      if (!load_stages(args_.gemm, tile, ring_, Base::barriers(), place, await_x)) return;
    }
  }

  __device__ __forceinline__ void send_signals() { turn_.await_announcements(&Base::barriers().announced); }

  __device__ __forceinline__ void multiply_and_send() {
    Place<N> place;
    float d[N / 2] = {};
    for (uint32_t i = Base::first_tile(); i < order_.total(); i += Base::tile_step()) {
      const Tile tile = order_.by_part(i);
      if (!is_to_be_multiplied(tile)) return;
      Base::multiply_tile(d, place);
      if (Base::have_agreed()) Base::store(d, tile, static_cast<T*>(args_.y) + Base::place_in_whole(tile));
    }
  }

  // Only the communicating blocks: the multiplying blocks wait for these copies, which must not wait for products.
  __device__ __forceinline__ void move() {
    if (Base::multiplies() || !Base::have_agreed()) return;
    switch (args_.call.codec) {
#define TPK_CODEC_CASE(name, id, type) \
  case Codec::id: return bring_and_fetch<type>();
      TPK_CODECS(TPK_CODEC_CASE)
#undef TPK_CODEC_CASE
      default: return bring_and_fetch<NoCodec>();
    }
  }

 private:
  __device__ __forceinline__ bool lies_there(const Tile& tile) const {
    return Base::is_mine(tile) && args_.call.codec == Codec::None;
  }
  __device__ __forceinline__ bool is_to_be_multiplied(const Tile& tile) const {
    return lies_there(tile) || Base::have_agreed();
  }

  // Items are numbered row block by row block, slice by slice.
  __device__ __forceinline__ bool await_item(const Tile& tile, uint32_t step) {
    constexpr uint32_t kSteps = kGatherColumns / kTileDepth;
    if (step % kSteps != 0) return true;
    const uint32_t item = tile.row_block * slices_ + step / kSteps;
    if (!turn_.await_tile(static_cast<int>(tile.owner), item)) return turn_.give_up_waiting(true), false;
    fence_async();  // generic stores wrote them, the loads are of the asynchronous kind
    return true;
  }

  __device__ __forceinline__ uint32_t items_of(uint32_t owner) const { return order_.row_blocks(owner) * slices_; }
  __device__ __forceinline__ Dealt<kGatherColumns> dealt_item(uint32_t owner, uint32_t item) const {
    const uint32_t row = item / slices_ * kTileRows, column = item % slices_ * kGatherColumns;
    return {smaller(kTileRows, args_.cut.count[owner] - row), smaller(kGatherColumns, args_.gemm.K - column) / 8};
  }
  // Rows of K values, at an item.
  __device__ __forceinline__ Rows item_at(const void* rows, size_t row_bytes, uint32_t item) const {
    const size_t row = size_t{item / slices_} * kTileRows, column = size_t{item % slices_} * kGatherColumns;
    return {static_cast<char*>(const_cast<void*>(rows)) + row * row_bytes + column * sizeof(T), row_bytes};
  }
  __device__ __forceinline__ size_t row_bytes() const { return size_t{args_.gemm.K} * sizeof(T); }
  __device__ __forceinline__ Rows in_whole(uint32_t owner, uint32_t item) const {
    const size_t first = size_t{args_.cut.first[owner]} * row_bytes();
    return item_at(static_cast<char*>(gather_.x_whole) + first, row_bytes(), item);
  }

  template <class C>
  __device__ __forceinline__ PackedRows<C> packed_at(uint32_t owner, uint32_t item) const {
    using Row = SentRow<C>;
    const size_t row = size_t{item / slices_} * kTileRows, column = size_t{item % slices_} * kGatherColumns;
    const size_t K = args_.gemm.K, stride = Row::scale_bytes(args_.gemm.K);
    char* const slot = turn_.slot(static_cast<int>(owner));
    char* const scales = slot + args_.cut.count[owner] * K + row * stride;
    return {slot + row * K + column, scales + column / Row::kUnit * sizeof(typename C::Scale), K, stride};
  }

  template <class C>
  __device__ __forceinline__ void bring_and_fetch() {
    bring_own_rows<C>();
    fetch_rows<C>();
  }

  // Items are alike, so that each communicating block has every so manieth: to take them from a common counter would be
  // an atomic and two barriers for each.
  template <class C>
  __device__ __forceinline__ void bring_own_rows() {
    const uint32_t owner = static_cast<uint32_t>(me());
    const int thread = static_cast<int>(product_thread());
    for (uint32_t item = blockIdx.x; item < items_of(owner); item += args_.communicating) {
      bring_item<C>(owner, item);
      if (args_.call.codec != Codec::None) fence_async();
      sync_product_threads();
      if (thread < ranks() && thread != me()) turn_.raise_summed(thread, item);
      if (thread == me() && args_.call.codec != Codec::None) turn_.raise_gathered(owner, item);
    }
  }

  // Into the slot, and into x_whole as all ranks have them.
  template <class C>
  __device__ __forceinline__ void bring_item(uint32_t owner, uint32_t item) const {
    const Dealt<kGatherColumns> dealt = dealt_item(owner, item);
    const Rows from = item_at(gather_.x_part, gather_.x_row_bytes, item), whole = in_whole(owner, item);
    const Rows in_slot = item_at(turn_.slot(me()), row_bytes(), item);
    if constexpr (SentRow<C>::kPacked) {
      pack_rows<C, T, kGatherColumns>(dealt.rows, dealt.units * 8 / SentRow<C>::kUnit, from, packed_at<C>(owner, item),
                                      whole);
    } else if constexpr (C::kScaled) {
      sum_blocks<C, T>(dealt.rows, from, 0, 1, whole, in_slot, false);
    } else if constexpr (std::is_same_v<C, NoCodec>) {
      copy_rows(dealt, from, in_slot, whole);
    } else {
      copy_rows(dealt, from, in_slot, whole, AsPacked<C, T>{});
    }
  }

  template <class C>
  __device__ __forceinline__ void fetch_rows() {
    uint32_t before = 0, distance = 1;  // items of the ranks up to me + distance
    for (uint32_t i = blockIdx.x; distance < static_cast<uint32_t>(ranks());) {
      const uint32_t owner = (static_cast<uint32_t>(me()) + distance) % static_cast<uint32_t>(ranks());
      if (i - before >= items_of(owner)) {
        before += items_of(owner), ++distance;
        continue;
      }
      if (!fetch_item<C>(owner, i - before)) return;
      i += args_.communicating;
    }
  }

  template <class C>
  __device__ __forceinline__ bool fetch_item(uint32_t owner, uint32_t item) {
    if (product_thread() == 0) turn_.await_summed(static_cast<int>(owner), item);
    sync_product_threads();
    if (turn_.is_late()) return turn_.give_up_waiting(product_thread() == 0), false;
    const Dealt<kGatherColumns> dealt = dealt_item(owner, item);
    const Rows whole = in_whole(owner, item);
    if constexpr (SentRow<C>::kPacked) {
      copy_packed_rows<C, T, kGatherColumns>(dealt.rows, dealt.units * 8 / SentRow<C>::kUnit, packed_at<C>(owner, item),
                                             whole);
    } else {
      copy_rows(dealt, item_at(turn_.slot(static_cast<int>(owner)), row_bytes(), item), whole);
    }
    fence_async();
    sync_product_threads();
    if (product_thread() == 0) turn_.raise_gathered(owner, item);
    return true;
  }

  const GatherArgs& gather_;
  TileOrder order_;
  uint32_t slices_;
};

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
    } else {
      block.store_for_products();
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
