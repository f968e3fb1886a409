// The interface of the kernels for the host: plain structs by value and launch functions that only enqueue. Torch-free.
//
// Every launch_* returns the launch's cudaError_t, allocates nothing, never waits for the device, and may be captured
// into a CUDA graph: whatever changes from call to call (the epoch) is in device memory.
//
// A peer's memory is an arena, as on the CPU:   [ Signals | slot 0 | slot 1 | heap ].   Call e uses slot e % 2.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "core/codec/codec.h"
#include "core/types.h"
#include "peer_limits.h"

namespace tpk::cuda {

constexpr uint64_t kNotInHeap = ~uint64_t{0};

// The announcement of a call; the ranks must agree in all but `brings` and `heap_units`. 32 bytes.
struct alignas(16) Announcement {
  uint32_t flag;        // the epoch: written last, released
  uint32_t kind;        // kind_of(...)
  uint64_t numel;       // of the whole call
  uint32_t shape_hash;  // of the dimensions that must agree
  uint32_t plan;        // which kernel in which launch shape: blocks of another plan would read the wrong parts
  uint32_t brings;      // values of this rank's part (all_gather), low 32 bits; others 0
  uint32_t heap_units;  // where this rank's input lies in its heap, in units of 16 bytes, or kNoUnits
};
static_assert(sizeof(Announcement) == 32, "two 16-byte words");
constexpr uint32_t kNoUnits = ~uint32_t{0};

TPK_HOST_DEVICE constexpr uint32_t kind_of(Op op, DType dtype, ReduceOp reduce_op, Codec codec) {
  return static_cast<uint32_t>(op) | static_cast<uint32_t>(dtype) << 8 | static_cast<uint32_t>(reduce_op) << 16 |
         static_cast<uint32_t>(codec) << 24;
}

// The kernels over peers, and what a launch announces of itself beside its call.
enum class Kernel : uint32_t {
  Barrier,
  OneShot,
  TwoShot,
  Multicast,
  ReduceScatter,
  AllGather,
  AllReduceAddRmsNorm,
  GemmReduceScatter,
  GemmAllReduce,
  AllGatherGemm
};
TPK_HOST_DEVICE constexpr uint32_t plan_of(Kernel kernel, uint32_t blocks, uint32_t threads) {
  return static_cast<uint32_t>(kernel) | blocks << 8 | threads << 16;
}

// First thing in an arena, zero when the group opens. Peers write into `arrived`, `stage`, `tiles` and `summed`; the
// rest is the owner's. Flags are pushed to the rank that waits, so that it polls local memory.
struct Signals {
  Announcement arrived[2][kMaxPeers][kMaxBlocks];  // [epoch % 2][from][block]
  uint32_t stage[kMaxPeers][kMaxBlocks];           // [from][block]: 4 * epoch + how far it got after its announcement
  uint32_t tiles[kMaxPeers][kMaxTiles];            // [from][tile]: 2 * epoch + 1 when it can be summed (or multiplied)
  uint32_t summed[kMaxPeers][kMaxTiles];           // [from][tile]: the same when it can be copied from that slot
  uint32_t epoch;                                  // calls finished
  uint32_t finished;                               // blocks of the running call that are done
  uint32_t gave_up;                                // blocks that waited in vain; the first one writes the record
  uint32_t refused;                                // 1 when the running call was refused: its later pieces return
  uint32_t begun;                                  // blocks of the running call that have begun, where it counts them
  uint32_t taken[2];                               // tiles of the running call that blocks have taken to sum, to copy
};
constexpr size_t kSignalBytes = size_t{128} << 10;
static_assert(sizeof(Signals) <= kSignalBytes, "signals fit in front of slot 0");

// The record of a failure on a device, for the host, in pinned memory. The first failure stays.
enum class Failure : uint32_t { None, Late, Mismatch };
struct FailureRecord {
  uint32_t failure;  // a Failure; written last
  uint32_t epoch;
  uint32_t stage;    // 1: announcements, 2: a later wait of the call
  uint32_t kind;     // of this rank's call
  uint32_t missing;  // Late: one bit for each rank that did not come
  uint32_t blamed;   // Mismatch: a rank with another announcement
  uint64_t numel;
  Announcement theirs;            // Mismatch: that announcement
  uint32_t last_seen[kMaxPeers];  // Late: the epoch at which each rank was seen last
};

// The ranks as one of them sees them.
struct Peers {
  char* arena[kMaxPeers];  // of every rank, in rank order
  char* multicast;         // the same arena through the switch, or nullptr
  int rank;
  int world_size;
  size_t slot_bytes;
  FailureRecord* failure;  // device pointer to pinned memory
  uint64_t timeout_ns;
};

TPK_HOST_DEVICE inline size_t slot_offset(const Peers& peers, uint32_t epoch) {
  return kSignalBytes + (epoch & 1) * peers.slot_bytes;
}
TPK_HOST_DEVICE inline size_t heap_offset(const Peers& peers) { return kSignalBytes + 2 * peers.slot_bytes; }

// One launch of a call. `numel`, `shape_hash` describe the whole; a message larger than a slot is several launches
// (pieces), each with an epoch of its own.
struct Call {
  Op op;
  DType dtype;
  Codec codec;
  ReduceOp reduce_op;
  uint64_t numel;
  uint32_t shape_hash;
  uint32_t brings;       // values of this rank's whole part (all_gather), low 32 bits; others 0
  uint64_t heap_offset;  // of `in` in this rank's heap, or kNotInHeap; when every rank has one, nothing is copied in
  bool packed;           // `in` is a wire already: it is copied where values would be packed; only with a codec
  uint32_t piece;        // 0 opens a call; later pieces of a call whose opening was refused must do nothing at all
};

// How values are cut over the ranks: rank r has values [first[r], first[r] + count[r]) of the whole tensor. A piece of
// a larger message gives each rank the same stretch of its part, so the parts of a piece need not touch. Where the
// input is packed, first[r] is the byte of its wire where that stretch begins: a multiple of 16 is fast.
struct DeviceCut {
  uint64_t first[kMaxPeers];
  uint64_t count[kMaxPeers];
  uint32_t brings[kMaxPeers];  // all_gather: what every rank must announce as Call::brings; 0 elsewhere
};

// ---- collectives over peers (all_reduce.cu, move.cu). n values; wire bytes of one rank's copy fit into a slot.
// Sums in fp32 (fp64 for fp64, integers exactly), in rank order, rounded once: all ranks the same bits.
// With a codec the owner packs the sum again and every rank takes the packed sum (one-shot packs it, too).
// out may be in; in all_gather and reduce_scatter this rank's part may lie in the whole tensor at its own place.
// cudaErrorInvalidValue: a combination that wire_of refuses, a message that does not fit, more than kMaxBlocks blocks.

// Every rank reads all inputs. One wait.
cudaError_t launch_one_shot(const Peers&, const Call&, const void* in, void* out, size_t n, int blocks, cudaStream_t);
// Rank r sums chunk r, then every rank reads the R sums. Two waits, the least traffic.
cudaError_t launch_two_shot(const Peers&, const Call&, const void* in, void* out, size_t n, int blocks, cudaStream_t);
// The switch sums (multimem.ld_reduce, multimem.st): codec none, sum, fp32/bf16/fp16, inputs in slots. Order is the
// switch's.
cudaError_t launch_multicast(const Peers&, const Call&, const void* in, void* out, size_t n, int blocks, cudaStream_t);
// out = this rank's part of the sum. The float sum is not packed again. A slot holds world_size parts of the largest
// part's wire bytes, each rounded up to 16.
cudaError_t launch_reduce_scatter(const Peers&, const Call&, const void* in, void* out, const DeviceCut&, int blocks,
                                  cudaStream_t);
// out = the parts of all ranks; in is this rank's.
cudaError_t launch_all_gather(const Peers&, const Call&, const void* in, void* out, const DeviceCut&, int blocks,
                              cudaStream_t);
// Nothing but announcements: a barrier on the stream.
cudaError_t launch_barrier(const Peers&, const Call&, cudaStream_t);

// residual_out = residual + sum over ranks of x,  i = 1 / rms(residual_out),  y = residual_out i weight [tokens, width]
// One-shot: the sum is rounded to the dtype as all_reduce would (and packed, with a codec), residual_out too; the
// norm is taken in fp32 (fp64 for fp64; inverse_rms is float*, double* for fp64). fp32, fp64, bf16, fp16.
// The wire of all tokens fits into a slot; a larger message is cut at tokens whose values are a multiple of the codec's
// blocks, and the bits of a token do not depend on how. Outputs are not inputs.
cudaError_t launch_all_reduce_add_rms_norm(const Peers&, const Call&, const void* x, const void* residual,
                                           const void* weight, void* y, void* residual_out, void* inverse_rms,
                                           size_t tokens, size_t width, double eps, int blocks, cudaStream_t);

// ---- local (codec.cu): the moves of wire.h on device memory, for transport `group` and for gradients
cudaError_t launch_encode(DType, Codec, const void* values, void* wire, size_t n, cudaStream_t);
cudaError_t launch_decode(DType, Codec, const void* wire, void* values, size_t n, cudaStream_t);
constexpr int kMaxWires = 64;  // ranks whose wires one launch reduces
struct WireList {
  const void* wire[kMaxWires];
};
// The wire of the reduced values, written to `wire`; the same in values, not packed again.
cudaError_t launch_reduce_wires(DType, Codec, ReduceOp, const WireList&, int num_inputs, void* wire, size_t n,
                                cudaStream_t);
cudaError_t launch_reduce_wires_to_values(DType, Codec, ReduceOp, const WireList&, int num_inputs, void* values,
                                          size_t n, cudaStream_t);
// wire = encode(scale * values + residual);  residual = scale * values + residual - decode(wire), in fp32.
// Where that difference is not finite (a NaN block) the residual stays as it was: loss scaling skips such a step. Codec
// none rounds to the dtype.
cudaError_t launch_encode_with_feedback(DType, Codec, const void* values, float* residual, void* wire, float scale,
                                        size_t n, cudaStream_t);

// ---- local (exchange_marks.cu): the progress of exchanges through a process group, in pinned memory for the host
struct ExchangeMarks {
  uint32_t begun, ended;  // exchanges that the stream has begun and ended
  uint32_t op, call;      // of the last one that has begun
  uint32_t given_up;      // written by the host: the stream must stop
};
cudaError_t launch_mark_begin(ExchangeMarks*, Op, uint32_t call, cudaStream_t);
// Traps when the exchange was given up.
cudaError_t launch_mark_end(ExchangeMarks*, cudaStream_t);

// ---- local (norm.cu). fp32, fp64, bf16, fp16; what is summed is summed in fp32, fp64 for fp64 ("sums" below).
// The local half of all_reduce_add_rms_norm, to the same bits: sum is the sum over the ranks, and may be residual_out.
cudaError_t launch_add_rms_norm(DType, const void* sum, const void* residual, const void* weight, void* y,
                                void* residual_out, void* inverse_rms, size_t tokens, size_t width, double eps,
                                cudaStream_t);
// With r = residual_out, i = inverse_rms, g = dy * weight:  dr = i (g - r i^2 mean(g r)) (+ dresidual_out),
// dweight = sum over tokens of dy r i. dr is not computed when it is nullptr, dweight when `partial` is: [blocks,
// width] sums of scratch, added in block order, so that all ranks must take as many blocks (of 1 .. 1024). dr may be dy
// or dresidual_out.
cudaError_t launch_rms_norm_backward(DType, const void* dy, const void* dresidual_out, const void* residual_out,
                                     const void* weight, const void* inverse_rms, void* dr, void* partial,
                                     void* dweight, size_t tokens, size_t width, int blocks, cudaStream_t);
struct TensorList {
  static constexpr int kMax = 64;
  const void* data[kMax];
  uint64_t numel[kMax];
  int count;
};
// total[0] += sum of squares of all values of all tensors, squares and sums in fp64. partial is [blocks] of scratch,
// blocks in 1 .. 1024. The same bits for as many blocks; NaN and infinity stay.
cudaError_t launch_squared_norm(DType, const TensorList&, double* partial, double* total, int blocks, cudaStream_t);

// ---- local (vocab.cu). ids and targets are int64, or int32 when ids_are_64 (targets_are_64) is false. bad[0] += ids
// outside [0, vocab_size) (targets: those that are not ignore_index either); such a token is treated as another rank's.
// stats, loss and dloss are fp32, fp64 for fp64 logits; lse is fp64.
cudaError_t launch_embedding(const void* ids, bool ids_are_64, const void* table, void* out, size_t tokens,
                             size_t row_bytes, int64_t vocab_start, int64_t shard, int64_t vocab_size, uint32_t* bad,
                             cudaStream_t);
// table_gradient[row] = sum over the tokens of that row, in token order, in fp32 (fp64), rounded once; rows without
// tokens become zero. order: token indices sorted (stably) by id; sorted_ids: the ids in that order.
cudaError_t launch_embedding_backward(DType, const void* dy, const int64_t* sorted_ids, const int64_t* order,
                                      void* table_gradient, size_t tokens, size_t width, int64_t vocab_start,
                                      int64_t shard, cudaStream_t);
// stats[token] = {largest, sum of exp(logit - largest), the target's logit or 0, sum of logits}
cudaError_t launch_row_stats(DType, const void* logits, const void* targets, bool targets_are_64, void* stats,
                             size_t tokens, size_t shard, int64_t vocab_start, int64_t vocab_size, int64_t ignore_index,
                             uint32_t* bad, cudaStream_t);
// From the stats of all ranks [R][tokens]: loss and lse of every token. The dtype is that of the logits.
cudaError_t launch_combine_stats(DType, const void* stats, int world_size, const void* targets, bool targets_are_64,
                                 void* loss, void* lse, size_t tokens, int64_t vocab_size, int64_t ignore_index,
                                 double label_smoothing, cudaStream_t);
// dlogits may be logits.
cudaError_t launch_loss_gradient(DType, const void* dloss, const void* logits, const void* targets, bool targets_are_64,
                                 const void* lse, void* dlogits, size_t tokens, size_t shard, int64_t vocab_start,
                                 int64_t vocab_size, int64_t ignore_index, double label_smoothing, cudaStream_t);

}  // namespace tpk::cuda
