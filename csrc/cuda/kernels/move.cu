// Reduce-scatter, all-gather and the barrier over peer memory.
//
//   reduce_scatter   every rank reads its part of all inputs and sums it.
//   all_gather       every rank reads the parts of all others.
//   barrier          announcements and nothing else.
//
// Called by  csrc/cuda/comm/peer_communicator.cpp.
// Needs      what peer.cuh needs. Parts may be uneven and empty, and lie anywhere in the whole tensor (DeviceCut).
// Order      peer.cuh's; a kernel that reads heaps takes one more step, so that no rank changes an input that another
//            still reads.
// Sums       as all_reduce.cu. The sum is not packed again: it is sent no further.
// Traffic    (R - 1) / R n values into each rank.
#include "dispatch.cuh"
#include "peer.cuh"

namespace tpk::cuda {
namespace {

struct ScatterArgs {
  Peers peers;
  Call call;
  const void* in;
  void* out;
  DeviceCut cut;
  size_t part_bytes;  // from one part to the next in a slot
  uint32_t heap_units;
};

template <class Format>
TPK_KERNEL void __launch_bounds__(kMaxThreads, 1) reduce_scatter_kernel(ScatterArgs args) {
  using T = typename Format::Value;
  Turn turn(args.peers, args.call, Kernel::ReduceScatter);
  const int me = turn.rank(), ranks = turn.world_size();
  const auto copy_in = [&] {
    for (int r = 0; r < ranks; ++r) {
      const Length length = length_of<Format>(args.cut.count[r]);
      const void* part = args.call.packed
                             ? static_cast<const char*>(args.in) + args.cut.first[r]
                             : static_cast<const void*>(static_cast<const T*>(args.in) + args.cut.first[r]);
      char* to = turn.slot(me) + static_cast<size_t>(r) * args.part_bytes;
      bring_in<Format>(part, args.call.packed, to, share_of<Format>(0, units_of(length)), length);
    }
  };
  if (Format::kPlain ? turn.bring_or_leave(args.heap_units, copy_in) : turn.bring(copy_in)) {
    const Length length = length_of<Format>(args.cut.count[me]);
    const size_t in_heap = args.cut.first[me] * sizeof(T), in_slot = static_cast<size_t>(me) * args.part_bytes;
    const Sources inputs(args.peers, turn, turn.reads_heaps() ? in_heap : in_slot);
    Format::sum_each(inputs, ranks, args.call.reduce_op, share_of<Format>(0, units_of(length)), length,
                     [&](uint32_t unit, const typename Format::Sums& sums) {
                       Format::store_values(sums, static_cast<T*>(args.out), unit, length);
                     });
    if (turn.reads_heaps()) turn.step(kDone);
  }
  turn.end();
}

struct GatherArgs {
  Peers peers;
  Call call;
  const void* in;
  void* out;
  DeviceCut cut;
  uint32_t heap_units;
};

// This rank's part goes straight to the output, except under a codec: there every rank takes the packed values.
template <class Format>
TPK_KERNEL void __launch_bounds__(kMaxThreads, 1) all_gather_kernel(GatherArgs args) {
  using T = typename Format::Value;
  const T* const in = static_cast<const T*>(args.in);
  T* const out = static_cast<T*>(args.out);
  const uint32_t listens_to = threadIdx.x;
  Turn turn(args.peers, args.call, Kernel::AllGather, listens_to < kMaxPeers ? args.cut.brings[listens_to] : 0);
  const int me = turn.rank(), ranks = turn.world_size();
  const auto copy_in = [&] {
    const Length length = length_of<Format>(args.cut.count[me]);
    Format::encode(in, turn.slot(me), share_of<Format>(0, units_of(length)), length);
  };
  if (Format::kPlain ? turn.bring_or_leave(args.heap_units, copy_in) : turn.bring(copy_in)) {
    for (int k = 0; k < ranks; ++k) {  // each rank begins with another peer, so that no link serves all at once
      const int r = (me + k) % ranks;
      const Length length = length_of<Format>(args.cut.count[r]);
      T* const part = out + args.cut.first[r];
      const bool direct = Format::kPlain && r == me;
      if (direct && part == in) continue;
      const char* from = direct ? reinterpret_cast<const char*>(in) : turn.source(r);
      Format::decode(from, part, share_of<Format>(0, units_of(length)), length, Reach::Peer);
    }
    if (turn.reads_heaps()) turn.step(kDone);
  }
  turn.end();
}

struct BarrierArgs {
  Peers peers;
  Call call;
};

TPK_KERNEL void __launch_bounds__(kMaxThreads, 1) barrier_kernel(BarrierArgs args) {
  Turn turn(args.peers, args.call, Kernel::Barrier);
  turn.bring([] {});
  turn.end();
}

size_t largest_of(const DeviceCut& cut, int ranks) {
  size_t largest = 0;
  for (int r = 0; r < ranks; ++r) largest = cut.count[r] > largest ? cut.count[r] : largest;
  return largest;
}

}  // namespace

cudaError_t launch_reduce_scatter(const Peers& peers, const Call& call, const void* in, void* out, const DeviceCut& cut,
                                  int blocks, cudaStream_t stream) {
  if (!is_usable(peers, blocks)) return cudaErrorInvalidValue;
  return with_reduction(call.dtype, call.codec, call.reduce_op, [&](auto format) -> cudaError_t {
    using Format = decltype(format);
    const size_t ranks = static_cast<size_t>(peers.world_size), largest = largest_of(cut, peers.world_size);
    const size_t part_bytes = rounded_up(Format::bytes(largest));
    if (part_bytes > peers.slot_bytes / ranks) return cudaErrorInvalidValue;
    const int threads = threads_for<Format>(largest, blocks);
    const ScatterArgs args{peers, call, in, out, cut, part_bytes, heap_units_of(call)};
    return TPK_LAUNCH(reduce_scatter_kernel<Format>, blocks, threads, 0, stream, args);
  });
}

cudaError_t launch_all_gather(const Peers& peers, const Call& call, const void* in, void* out, const DeviceCut& cut,
                              int blocks, cudaStream_t stream) {
  if (!is_usable(peers, blocks)) return cudaErrorInvalidValue;
  return with_move(call.dtype, call.codec, [&](auto format, size_t times) -> cudaError_t {
    using Format = decltype(format);
    GatherArgs args{peers, call, in, out, cut, heap_units_of(call)};
    for (int r = 0; r < peers.world_size; ++r) args.cut.first[r] *= times, args.cut.count[r] *= times;
    const size_t largest = largest_of(args.cut, peers.world_size);
    // The ranks will refuse a part that the cut does not give; nothing behind its end is read until then.
    if (call.brings != cut.brings[peers.rank]) args.cut.count[peers.rank] = 0;
    if (rounded_up(Format::bytes(largest)) > peers.slot_bytes) return cudaErrorInvalidValue;
    return TPK_LAUNCH(all_gather_kernel<Format>, blocks, threads_for<Format>(largest, blocks), 0, stream, args);
  });
}

cudaError_t launch_barrier(const Peers& peers, const Call& call, cudaStream_t stream) {
  if (!is_usable(peers, 1)) return cudaErrorInvalidValue;
  return TPK_LAUNCH(barrier_kernel, 1, kWarp, 0, stream, BarrierArgs{peers, call});
}

}  // namespace tpk::cuda
