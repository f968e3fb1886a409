// A group whose ranks are devices: what transports `peer`, `group` and `local` have in common on CUDA. Torch-free.
//
// A call enqueues on this thread's stream (runtime.h) and returns. What the device finds out is raised by a later call
// or by check(); a call launches first and raises then, so that ranks which notice at different calls stay in step.
//
// Order    the calls of a group run one after the other, on whatever streams they are made. Those that are captured
//          into a CUDA graph are ordered among themselves; a launch of the graph and the other calls of its group must
//          be ordered by the caller, the same on all ranks.
// Graphs   an op can be captured when it exchanges nothing over the host. A graph may be launched as long as its
//          group is open, and by all ranks as often. stats() counts a captured call once, when it is captured.
#pragma once

#include <algorithm>
#include <functional>

#include "core/communicator.h"
#include "cuda/kernels/kernels.h"
#include "gemm_times.h"
#include "runtime.h"

namespace tpk::cuda {

// residual_out = residual + sum over the ranks of x, y = rms_norm(residual_out) * weight        [tokens, width]
struct AddNorm {
  const void *x, *residual, *weight;
  void *y, *residual_out, *inverse_rms;
  size_t tokens, width;
  double eps;
};

// Path fused (kernels/fused_gemm.h): y = x @ w.T (+ bias) and its collective. x [rows, K], w [N, K], bias [N] or
// nullptr are this rank's; K and N multiples of 8, rows at multiples of 16 bytes. y is dense, and so is x_whole [all
// rows, K], where a gather puts the rows of all ranks.
struct FusedGemm {
  const void *x, *w, *bias;
  size_t x_stride, w_stride;  // values from a row to the next
  void *y, *x_whole;
  uint32_t N, K;
  bool w_transposed;  // w lies as [K, N]
  Cut rows;           // of the whole sum, or of the whole x, over the ranks
};

// Of every rank's part of a cut the values [begin[r], end[r]), counted from where the part begins.
struct Stretch {
  std::vector<size_t> begin, end;
  static Stretch all(const Cut& cut);
  size_t size(int rank) const { return end[static_cast<size_t>(rank)] - begin[static_cast<size_t>(rank)]; }
  size_t largest() const;
  // What the p-th piece of so many values takes of a rank's stretch: where it begins in the part, and its length.
  size_t piece_begin(int rank, size_t start) const {
    return begin[static_cast<size_t>(rank)] + std::min(start, size(rank));
  }
  size_t piece_size(int rank, size_t start, size_t piece) const {
    return start < size(rank) ? std::min(piece, size(rank) - start) : 0;
  }
};

class DeviceCommunicator : public Communicator {
 public:
  DeviceCommunicator(std::string name, std::string label, int rank, int world_size, double timeout_s, int device);

  int device() const { return device_; }
  // This rank's share of the multiprocessors: blocks that wait for each other must all be resident.
  virtual Machine machine() const {
    return {world_size(), std::max(info().multiprocessors / sharing_, 1), false, info().arch, 0, sharing_, even_};
  }
  // So many ranks of this group, this one among them, work on the device at the same time; the same on all ranks.
  void share_device(int ranks) { sharing_ = ranks; }
  // Whether all ranks' shards of a weight are of one size: false from the first uneven one on. All ranks say the same,
  // in the same order relative to their calls. Nothing said: unknown.
  void note_shards(bool even) { even_ = even && !uneven_, uneven_ |= !even; }
  const Forced& forced() const { return forced_; }
  void force(const Forced& forced) { forced_ = forced; }
  GemmChoice choose(const ShardedGemm& gemm) const { return choose_gemm(machine(), forced_, gemm, measured_paths_); }
  MeasuredPaths& measured_paths() { return measured_paths_; }

  // Where kernels count ids and targets outside a vocabulary of that size; a later call raises.
  uint32_t* bad_ids(int64_t vocab_size);
  uint32_t* bad_targets(int64_t vocab_size);

  // all_reduce, residual add and norm in one; false when this transport, or this size, has no such way.
  bool add_norm(const CallSpec&, const Wire&, const AddNorm&);

  // A GEMM and its collective in one kernel; only where choose_gemm chooses it. bias: on rank 0 alone where it is
  // summed.
  void fused_gemm(const CallSpec&, const FusedGemm&);

  // --- pipelines: one call in several parts, one of which is sent on the communication stream while the caller's
  // stream works on the next. With one part everything is on the caller's stream.
  using Part = std::function<void(int part)>;
  void produce_and_send(Op op, int parts, const Part& produce, const Part& send);
  void receive_and_consume(Op op, int parts, const Part& receive, const Part& consume);
  // One part that is sent while the caller's stream does what `meanwhile` enqueues.
  void send_beside(Op op, const Part& send, const std::function<void()>& meanwhile);

  // What a part does, inside send or receive. The fingerprint and the tensors are those of the whole call; of
  // all_reduce, whose parts are values in a row, only the fingerprint.
  virtual void send_all_reduce(const CallSpec&, const Wire&, Input in, void* out, size_t n) = 0;
  virtual void send_reduce_scatter(const CallSpec&, const Wire&, Input in, void* out, const Cut&, const Stretch&) = 0;
  virtual void send_all_gather(const CallSpec&, const Wire&, const void* in, void* out, const Cut&, const Stretch&) = 0;

 protected:
  void do_all_reduce(const CallSpec&, const Wire&, Input in, void* out, size_t n) final;
  void do_reduce_scatter(const CallSpec&, const Wire&, Input in, void* out, const Cut&) final;
  void do_all_gather(const CallSpec&, const Wire&, const void* in, void* out, const Cut&) final;
  void do_all_reduce_beside(const CallSpec&, const Wire&, void* data, size_t n,
                            const std::function<void()>& meanwhile) final;
  std::vector<int64_t> do_exchange(const CallSpec&) final;
  void do_check() final;
  void do_close() override;

  // The host waits for what the group launched last.
  virtual void synchronize();
  cudaStream_t last_stream() const { return eager_.stream; }
  virtual bool fuses_norm(const Wire&, const AddNorm&) const { return false; }
  virtual void send_add_norm(const CallSpec&, const Wire&, const AddNorm&) {}
  virtual void send_fused_gemm(const CallSpec&, const FusedGemm&) {}
  // `mine` of every rank; may wait for the device.
  virtual std::vector<int64_t> send_exchange(const CallSpec&) = 0;
  // Raises that the exchange of the device was given up.
  virtual void raise_given_up() {}
  // Raises what the device wrote down; a mismatch is forgotten thereby, a late rank stays.
  void raise_failure();
  FailureRecord* failure_on_device() const { return &static_cast<Notes*>(on_device_->notes.on_device())->failure; }
  uint64_t timeout_ns() const { return static_cast<uint64_t>(timeout_s() * 1e9); }
  // What products may take while this transport sends beside them, 0: all.
  virtual int product_share() const { return 0; }
  // The running call sends while products run.
  bool is_beside() const { return is_beside_; }
  // Launches of the running call so far.
  uint32_t next_piece() { return piece_++; }

 private:
  const DeviceInfo& info() const { return on_device_->info; }
  // What kernels write down for the host.
  struct Notes {
    FailureRecord failure;
    uint32_t bad_ids, bad_targets;
  };
  // One call: launches what `body` launches, then raises.
  void run(const std::function<void()>& body);
  // What is enqueued on this thread's stream from now on comes after the group's last call.
  void enter();
  void send_part(int part, const Part& send, cudaStream_t caller);
  // The caller's stream goes on when the communication stream is done.
  void join(cudaStream_t caller);
  // What uses both streams. Whatever it throws, the caller's stream waits for the other one.
  void with_both_streams(const std::function<void(cudaStream_t caller)>& body);
  // A graph is captured on this thread's stream, or on that of the last call: nothing can be waited for.
  bool is_being_captured() const;
  void run_beside(const Part& send, const std::function<void()>& meanwhile);
  Notes& notes() const { return *static_cast<Notes*>(on_device_->notes.on_host()); }
  void raise_bad(uint32_t& count, const char* what, int64_t vocab_size);
  [[noreturn]] void raise_late(const FailureRecord& record) const;
  [[noreturn]] void raise_mismatch(const FailureRecord& record) const;

  struct OnDevice {
    explicit OnDevice(int device) : info(device_info(device)), notes(sizeof(Notes)) {}
    const DeviceInfo info;
    PinnedMemory notes;
    PriorityStream side;  // the communication stream
    Event event;
  };

  const int device_;
  std::unique_ptr<OnDevice> on_device_;
  Forced forced_;
  MeasuredPaths measured_paths_;
  int sharing_ = 1;  // ranks of the group on this device
  bool even_ = false, uneven_ = false;
  // Where the last call was made, of those that run and of those that are captured.
  struct Last {
    bool is_there = false;
    cudaStream_t stream = nullptr;
    uint64_t capture = 0;
  };
  Last& last_on(cudaStream_t stream) { return capture_of(stream) == 0 ? eager_ : captured_; }
  Last eager_, captured_;
  uint32_t piece_ = 0;
  bool is_beside_ = false;
  int64_t ids_vocab_ = 0, targets_vocab_ = 0;  // of the last calls that have one
};

// A group of one: nothing is sent.
std::shared_ptr<Communicator> make_local(std::string name, std::string label, int device);

}  // namespace tpk::cuda
