// All-reduce over peer memory, three ways.
//
//   one_shot    every rank reads all inputs and sums them: one wait, for small messages. Two where it reads heaps.
//   two_shot    rank r sums chunk r of all ranks, then every rank reads the R sums: two waits.
//   multicast   the switch sums chunk r for rank r and hands the sum to all ranks; needs a multicast mapping.
//
// Called by  csrc/cuda/comm/peer_communicator.cpp when choose.h chooses it.
// Needs      what peer.cuh needs; multicast: an arena that is mapped through the switch, and sm_90.
// Order      peer.cuh's. A chunk's owner writes the sum over its own input, which no other rank reads.
// Sums       fp32 (fp64 in fp64, integers wrapping), ranks 0..R-1, so all ranks hold the same bits. With a codec the
//            owner packs the sum again, and all take what it packed; one_shot packs and unpacks in registers to the
//            same bits. multicast: fp32 in the order of the switch, rounded by it.
// Traffic    one_shot (R - 1) n values into each rank; two_shot 2 (R - 1) / R n, the least without a switch; multicast
//            n / R into and n out of each rank.
// Left out   messages whose values are their own flags, which spare one_shot the wait for its announcements, 2 to 3 us
// of
//            a small sum: such a buffer must be cleared after each use, and a rank that disagrees would not be found.
#include "dispatch.cuh"
#include "peer.cuh"

namespace tpk::cuda {
namespace {

struct Args {
  Peers peers;
  Call call;
  const void* in;
  void* out;
  size_t n;
  uint32_t heap_units;
};

template <class Format>
TPK_KERNEL void __launch_bounds__(kMaxThreads, 1) one_shot_kernel(Args args) {
  using T = typename Format::Value;
  Turn turn(args.peers, args.call, Kernel::OneShot);
  const Length length = length_of<Format>(args.n);
  const Range mine = share_of<Format>(0, units_of(length));
  const auto copy_in = [&] { bring_in<Format>(args.in, args.call.packed, turn.slot(turn.rank()), mine, length); };
  if (Format::kPlain ? turn.bring_or_leave(args.heap_units, copy_in) : turn.bring(copy_in)) {
    const Sources inputs(args.peers, turn, 0);
    Format::sum_each(inputs, turn.world_size(), args.call.reduce_op, mine, length,
                     [&](uint32_t unit, const typename Format::Sums& sums) {
                       Format::store_values(Format::as_packed(sums), static_cast<T*>(args.out), unit, length);
                     });
    if (turn.reads_heaps()) turn.step(kDone);
  }
  turn.end();
}

template <class Format>
TPK_KERNEL void __launch_bounds__(kMaxThreads, 1) two_shot_kernel(Args args) {
  using T = typename Format::Value;
  T* const out = static_cast<T*>(args.out);
  Turn turn(args.peers, args.call, Kernel::TwoShot);
  const int me = turn.rank(), ranks = turn.world_size();
  const Length length = length_of<Format>(args.n);
  const uint32_t units = units_of(length);
  const auto chunk = [&](int r) {
    return share_of<Format>(part_start(units, ranks, r), part_start(units, ranks, r + 1));
  };
  const auto copy_in = [&] {
    for (int r = 0; r < ranks; ++r) bring_in<Format>(args.in, args.call.packed, turn.slot(me), chunk(r), length);
  };
  if (Format::kPlain ? turn.bring_or_leave(args.heap_units, copy_in) : turn.bring(copy_in)) {
    const Sources inputs(args.peers, turn, 0);
    Format::sum_each(inputs, ranks, args.call.reduce_op, chunk(me), length,
                     [&](uint32_t unit, const typename Format::Sums& sums) {
                       Format::store_wire(sums, turn.slot(me), unit, length);
                       if (Format::kPlain) Format::store_values(sums, out, unit, length);
                     });
    if (turn.step(kDone)) {
      for (int k = Format::kPlain ? 1 : 0; k < ranks;
           ++k) {  // each rank begins with another peer, so that no link serves all at once
        const int r = (me + k) % ranks;
        Format::decode(turn.slot(r), out, chunk(r), length, Reach::Peer);
      }
    }
  }
  turn.end();
}

// Words are summed whole: what lies behind the last value in its word is zero.
template <class T>
TPK_KERNEL void __launch_bounds__(kMaxThreads, 1) multicast_kernel(Args args) {
  using Format = Plain<T>;
  Turn turn(args.peers, args.call, Kernel::Multicast);
  const int me = turn.rank(), ranks = turn.world_size();
  const Length length = length_of<Format>(args.n);
  const uint32_t units = units_of(length);
  const auto chunk = [&](int r) {
    return share_of<Format>(part_start(units, ranks, r), part_start(units, ranks, r + 1));
  };
  const auto copy_in = [&] {
    for (int r = 0; r < ranks; ++r) {
      Format::encode(static_cast<const T*>(args.in), turn.slot(me), chunk(r), length);
    }
  };
  if (turn.bring(copy_in)) {
    fence_alias();  // inputs were written to addresses of one rank, and are read through the switch
    const Range mine = chunk(me);
    for (uint32_t unit = mine.first; unit < mine.end; unit += mine.stride) {
      char* const everywhere = turn.multicast_slot() + size_t{unit} * 16;
      multicast_store16(everywhere, multicast_add16<T>(everywhere));
    }
    fence_alias();  // and the sums the other way round
    if (turn.step(kDone)) {
      fence_alias();
      for (int r = 0; r < ranks; ++r) {
        Format::decode(turn.slot(me), static_cast<T*>(args.out), chunk(r), length, Reach::Peer);
      }
    }
  }
  turn.end();
}

bool overlap(const void* a, const void* b, size_t bytes) {
  const auto first = reinterpret_cast<uintptr_t>(a), second = reinterpret_cast<uintptr_t>(b);
  return first < second + bytes && second < first + bytes;
}

template <class Format>
bool fits(const Peers& peers, size_t n) {
  return rounded_up(Format::bytes(n)) <= peers.slot_bytes;
}

template <class T>
cudaError_t multicast(const Args& args, int blocks, cudaStream_t stream) {
  if (!fits<Plain<T>>(args.peers, args.n)) return cudaErrorInvalidValue;
  const int threads = threads_for<Plain<T>>(args.n, blocks);
  return TPK_LAUNCH(multicast_kernel<T>, blocks, threads, 0, stream, args);
}

}  // namespace

cudaError_t launch_one_shot(const Peers& peers, const Call& call, const void* in, void* out, size_t n, int blocks,
                            cudaStream_t stream) {
  if (!is_usable(peers, blocks)) return cudaErrorInvalidValue;
  return with_reduction(call.dtype, call.codec, call.reduce_op, [&](auto format) -> cudaError_t {
    using Format = decltype(format);
    if (!fits<Format>(peers, n)) return cudaErrorInvalidValue;
    const int threads = threads_for<Format>(n, blocks);
    // Every rank reads all of every input, so an output over it must not be written before all have.
    const uint32_t units = overlap(in, out, n * sizeof(typename Format::Value)) ? kNoUnits : heap_units_of(call);
    const Args args{peers, call, in, out, n, units};
    return TPK_LAUNCH(one_shot_kernel<Format>, blocks, threads, 0, stream, args);
  });
}

cudaError_t launch_two_shot(const Peers& peers, const Call& call, const void* in, void* out, size_t n, int blocks,
                            cudaStream_t stream) {
  if (!is_usable(peers, blocks)) return cudaErrorInvalidValue;
  return with_reduction(call.dtype, call.codec, call.reduce_op, [&](auto format) -> cudaError_t {
    using Format = decltype(format);
    if (!fits<Format>(peers, n)) return cudaErrorInvalidValue;
    const int threads = threads_for<Format>(n, blocks);
    const Args args{peers, call, in, out, n, heap_units_of(call)};
    return TPK_LAUNCH(two_shot_kernel<Format>, blocks, threads, 0, stream, args);
  });
}

cudaError_t launch_multicast(const Peers& peers, const Call& call, const void* in, void* out, size_t n, int blocks,
                             cudaStream_t stream) {
  if (!is_usable(peers, blocks) || peers.multicast == nullptr) return cudaErrorInvalidValue;
  if (call.codec != Codec::None || call.reduce_op != ReduceOp::Sum) return cudaErrorInvalidValue;
  const Args args{peers, call, in, out, n, kNoUnits};
  switch (call.dtype) {
    case DType::F32: return multicast<float>(args, blocks, stream);
    case DType::BF16: return multicast<Bfloat16>(args, blocks, stream);
    case DType::F16: return multicast<Half>(args, blocks, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace tpk::cuda
