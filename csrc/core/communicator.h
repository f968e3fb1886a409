// A communicator is a group on one device: the only long-lived state. Torch-free.
//
// Every collective is one call with one fingerprint; all ranks make the same calls in the same order. A communicator
// that failed (a rank lost, a deadline passed) refuses further calls with the first error; a mismatch between ranks is
// seen by all of them in the same call, before any data is read, and leaves the communicator usable.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "engines.h"
#include "types.h"
#include "wire.h"

namespace tpk {

// The fingerprint of a call. numel and shape_hash must agree over the ranks; `mine` is each rank's own number.
struct CallSpec {
  Op op;
  DType dtype;
  ReduceOp reduce_op;
  Codec codec;
  uint64_t numel;
  uint32_t shape_hash;
  int64_t mine;
};

// Of the dimensions that must agree, for CallSpec::shape_hash.
inline uint32_t hash_of(const int64_t* sizes, size_t num_dims) {
  uint32_t hash = 2166136261u;
  for (size_t i = 0; i < num_dims; ++i) hash = (hash ^ static_cast<uint32_t>(sizes[i])) * 16777619u;
  return hash;
}

// How values are cut over the ranks: rank r has [starts[r], starts[r + 1]).
struct Cut {
  std::vector<size_t> starts;

  // n items of `item` values each; the first n % R ranks have one item more.
  static Cut even(size_t n, int world_size, size_t item = 1);
  static Cut of_sizes(const std::vector<int64_t>& sizes);
  Cut times(size_t item) const;
  size_t start(int rank) const { return starts[static_cast<size_t>(rank)]; }
  size_t size(int rank) const { return starts[static_cast<size_t>(rank) + 1] - starts[static_cast<size_t>(rank)]; }
  size_t total() const { return starts.back(); }
  size_t largest() const;
};

// A tensor that the calling thread computes while a collective sends it.
struct Chunks {
  // Values [begin, end) of the part of one rank; of an all_reduce there is one part, the full tensor. begin is a
  // multiple of the codec's block.
  struct Chunk {
    size_t begin, end;
    int part = 0;
  };
  std::vector<Chunk> list;  // in the order in which they are computed
  // Computes one; returns where its values are until the call has ended. An all_reduce writes the sums there, a
  // reduce_scatter only reads.
  std::function<void*(size_t chunk)> make;
  // Runs on any thread, in order, when the sums of a chunk (of a reduce_scatter: one of this rank's) are there.
  std::function<void(size_t chunk)> use = [](size_t) {};
};

// An average over the ranks with error feedback on both ways (tpkernels/data_parallel/feedback.py has the formula).
struct FeedbackAverage {
  const void* in;   // of the dtype of the wire
  float* residual;  // of every value
  float scale;      // 1 / R
  void* out;
  Cut cut;  // the owners of the sums
};

struct OpStats {
  uint64_t calls = 0;
  uint64_t wire_bytes = 0;   // sent by this rank; what k ranks read counts k times
  uint64_t nanoseconds = 0;  // inside the collective, waiting included
  uint64_t wait_nanoseconds = 0;
  uint64_t heap_inputs = 0;  // calls whose input lay in the arena's heap and was not copied
};

// Over shared memory, the largest message that every rank sums (one wait) instead of a part of it (two waits), where
// nothing was measured; and the most that may be.
constexpr size_t kOneShotBytes = 1024, kMostOneShotBytes = size_t{32} << 10;

class Communicator {
 public:
  Communicator(std::string name, std::string label, int rank, int world_size, double timeout_s);
  virtual ~Communicator() = default;
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

  // Virtual functions that no transport overrides: the module of the back end for torch.distributed calls them by
  // pointer, and links nothing of this one.
  const std::string& name() const { return name_; }
  const std::string& label() const { return label_; }
  int rank() const { return rank_; }
  int world_size() const { return world_size_; }
  double timeout_s() const { return timeout_s_.load(std::memory_order_relaxed); }
  virtual void set_timeout(double timeout_s) { timeout_s_.store(timeout_s, std::memory_order_relaxed); }
  virtual const char* transport() const = 0;

  // out[n] = reduction over the ranks of in[n]. in == out is allowed. Only with a codec is an input packed.
  virtual void all_reduce(const CallSpec& spec, const Wire& wire, Input in, void* out, size_t n);
  // out = this rank's part of the reduction of in, cut as in `cut`.
  virtual void reduce_scatter(const CallSpec& spec, const Wire& wire, Input in, void* out, const Cut& cut);
  // out = the parts of all ranks, in rank order; in is this rank's.
  virtual void all_gather(const CallSpec& spec, const Wire& wire, const void* in, void* out, const Cut& cut);
  // Part r of in, cut as in `send`, goes to rank r; out = what the ranks send to this one, cut as in `receive`. The
  // cuts of the ranks must agree with each other; spec.numel need not be their total. The wire is plain.
  virtual void all_to_all(const CallSpec& spec, const Wire& wire, const void* in, void* out, const Cut& send,
                          const Cut& receive);
  // Whether average_with_feedback may be called, the same on all ranks.
  virtual bool averages_with_feedback() const { return false; }
  // The wire sums, and has a codec. Where the ranks disagree the residual is not changed.
  void average_with_feedback(const CallSpec& spec, const Wire& wire, const FeedbackAverage& call);
  // `mine` of every rank, in rank order.
  virtual std::vector<int64_t> exchange(Op op, int64_t mine);
  // find_wire of wire.h.
  virtual const Wire* wire(DType dtype, Codec codec, ReduceOp op) const;
  // An all_reduce in place whose waiting happens after `meanwhile` has run.
  void all_reduce_beside(const CallSpec& spec, const Wire& wire, void* data, size_t n,
                         const std::function<void()>& meanwhile);

  // Whether the calls below move bytes by a thread of the group while the calling thread computes; otherwise none of
  // them may be used.
  virtual bool has_thread() const { return false; }
  // An all_reduce in place of `chunks`, which cover all values in order; `meanwhile` runs when the last one is made.
  void all_reduce_chunks(const CallSpec& spec, const Wire& wire, const Chunks& chunks,
                         const std::function<void()>& meanwhile);
  // A reduce_scatter of `chunks`; those of each part are in order, parts in that of `parts_in_order`. Only where
  // cuts_parts().
  void reduce_scatter_chunks(const CallSpec& spec, const Wire& wire, const Chunks& chunks, void* out, const Cut& cut,
                             const std::function<void()>& meanwhile);
  // An all_gather in which use(i) runs when values [0, ends[i]) of every part are in out, or the whole of smaller
  // parts; `meanwhile` runs before, when the parts of near_ranks() are in out. Ranks may have other ends, or call
  // all_gather.
  void all_gather_chunks(const CallSpec& spec, const Wire& wire, const void* in, void* out, const Cut& cut,
                         const std::vector<size_t>& ends, const std::function<void()>& meanwhile,
                         const std::function<void(size_t)>& use);
  virtual bool cuts_parts() const { return has_thread(); }
  // All ranks, in the order in which a reduce_scatter makes their parts. Ranks of one set have theirs made in turns,
  // chunk by chunk; the last set is that of near_ranks().
  virtual std::vector<std::vector<int>> parts_in_order() const;
  // The ranks whose parts take no way over the link, this one among them.
  std::vector<int> near_ranks() const { return parts_in_order().back(); }
  // The share of a tensor that a rank sends over the link when all ranks gather or scatter it.
  virtual double share_of_link() const { return 1.0 - 1.0 / world_size_; }
  // Whether an all_reduce, or a reduce_scatter, of n values that are there is one exchange over the link.
  virtual bool sums_in_one_exchange(const Wire&, size_t, [[maybe_unused]] bool scatters) const { return false; }
  // The same of a gather of so many bytes in all.
  virtual bool gathers_in_one_exchange(size_t) const { return false; }
  // Between parts of what the calling thread computes in these calls, each a millisecond or a few: the thread of the
  // group may wait for the core that computes.
  virtual void let_thread_run() {}
  // The number of chunks of every fused GEMM, where its rows allow it; 0: the rule's. For tests.
  int forced_chunks = 0;
  // Measured when the group was opened, the same on all ranks; 0: not measured. A hop is a small message to all others.
  double link_bytes_per_s = 0, link_hop_s = 0;
  // Of the machine's profile, the same on all ranks. The bits are the same either way.
  size_t one_shot_bytes = kOneShotBytes;
  bool is_one_shot_measured = false;
  bool is_one_shot(const Wire& wire, size_t n) const { return wire.bytes(n) <= one_shot_bytes; }

  // The heap of every rank as one stretch, in rank order, which the heap's own blocks no longer use: all ranks call it
  // before any has allocated. Empty where the transport has none.
  struct Heaps {
    std::vector<char*> of_rank;
    size_t bytes = 0;
  };
  virtual Heaps take_heaps() { return {}; }
  // Why no more bytes come from that rank ("died (process 7)"); empty while there is no reason.
  virtual std::string loss_of(int) const { return ""; }

  // Memory that the other ranks can read directly; nullptr when this transport has none or it is full.
  virtual void* heap_allocate(size_t bytes) = 0;
  virtual void heap_free(void* pointer) = 0;
  virtual size_t heap_bytes() const = 0;

  // The GEMM engines that this group has measured, on the CPU.
  MeasuredEngines& measured_engines() { return measured_engines_; }
  const MeasuredEngines& measured_engines() const { return measured_engines_; }

  // Raises errors of a device, where calls return before they have run. Nothing to do on the CPU.
  void check();
  // A call failed of which those of this group are a part: ranks that wait here for this one fail alike.
  virtual void give_up([[maybe_unused]] bool late) {}
  // `why`: the error text of later calls on this rank.
  virtual void close(const std::string& why = "this rank closed the group");
  // The same while another thread of this rank is in a call, which throws PeerLost soon.
  virtual void abort(const std::string& why);
  // Whether this is the process that opened the group. One that was forked since has the parent's memory, locks that
  // threads of the parent held, and none of those threads: it must not touch the rest of this object.
  virtual bool is_of_this_process() const;
  // Whether this process opened the group and has not closed it; takes no lock.
  bool is_open() const { return is_of_this_process() && !is_closed_; }
  // Throws std::invalid_argument unless it is; `what`: the op that was called.
  virtual void check_process(const char* what) const;
  std::array<OpStats, kOps> stats();
  void reset_stats();

 protected:
  virtual void do_all_reduce(const CallSpec&, const Wire&, Input in, void* out, size_t n) = 0;
  virtual void do_reduce_scatter(const CallSpec&, const Wire&, Input in, void* out, const Cut&) = 0;
  virtual void do_all_gather(const CallSpec&, const Wire&, const void* in, void* out, const Cut&) = 0;
  virtual void do_all_to_all(const CallSpec&, const Wire&, const void* in, void* out, const Cut& send,
                             const Cut& receive);
  virtual void do_average_with_feedback(const CallSpec&, const Wire&, const FeedbackAverage&);
  virtual std::vector<int64_t> do_exchange(const CallSpec&) = 0;
  virtual void do_all_reduce_beside(const CallSpec&, const Wire&, void* data, size_t n,
                                    const std::function<void()>& meanwhile);
  virtual void do_all_reduce_chunks(const CallSpec&, const Wire&, const Chunks&,
                                    const std::function<void()>& meanwhile);
  virtual void do_reduce_scatter_chunks(const CallSpec&, const Wire&, const Chunks&, void* out, const Cut&,
                                        const std::function<void()>& meanwhile);
  virtual void do_all_gather_chunks(const CallSpec&, const Wire&, const void* in, void* out, const Cut&,
                                    const std::vector<size_t>& ends, const std::function<void()>& meanwhile,
                                    const std::function<void(size_t)>& use);
  virtual void do_check() {}
  // From another thread than that of the call in progress.
  virtual void do_abort() {}
  bool is_aborted() const { return is_aborted_.load(std::memory_order_acquire); }
  virtual void do_close() = 0;

  // Everything that `body` sends counts as one call.
  void as_one_call(Op op, const std::function<void()>& body);
  std::string describe_call(Op op) const { return describe_call(op, call_); }
  std::string describe_call(Op op, uint64_t call) const;
  [[noreturn]] void mismatch(uint64_t call, const CallSpec& mine, int other_rank, const CallSpec& other) const;
  // Of a wait that passed the deadline; last_seen: the call at which the first of the late ranks was seen last.
  std::string late_text(Op op, uint64_t call, const std::vector<int>& late, const std::vector<int>& came,
                        uint64_t last_seen) const;
  // Compares the specs of all ranks; throws RankMismatch, the same on every rank.
  void check_agreement(const CallSpec& mine, const std::vector<CallSpec>& all) const;
  // Of a gather: each rank's `mine` must be its size in the cut.
  void check_parts(const CallSpec& mine, const std::vector<CallSpec>& all, const Cut& cut) const;
  // The sizes of an all_to_all, in values: row s of `sends` are those that rank s sends, row r of `receives` those that
  // rank r expects. The same on every rank; throws RankMismatch. Returns the largest.
  uint64_t check_pairs(const CallSpec& mine, const std::vector<const uint64_t*>& sends,
                       const std::vector<const uint64_t*>& receives) const;
  // Lets every later call fail with this text.
  void break_off(const std::string& why) { broken_ = why; }
  void count(uint64_t wire_bytes) { current_->wire_bytes += wire_bytes; }
  void count_heap_input() { current_->heap_inputs += 1; }
  void count_wait(uint64_t nanoseconds) { current_->wait_nanoseconds += nanoseconds; }

  uint64_t call_ = 0;  // number of the call in progress, 1 for the first

 private:
  class Turn;
  template <class Body>
  void remember_failure(Body&& body);

  const std::string name_, label_;
  const int rank_, world_size_;
  std::atomic<double> timeout_s_;
  const uint64_t owner_;  // which process: see process_generation
  std::mutex mutex_;
  std::string closed_;  // why; empty while the group is open
  std::atomic<bool> is_closed_{false}, is_aborted_{false};
  std::string broken_;  // the first fatal error
  std::array<OpStats, kOps> stats_{};
  OpStats* current_ = nullptr;
  MeasuredEngines measured_engines_;
};

uint64_t now_nanoseconds();

// The communicators of this process, by the group name that ops carry.
void register_communicator(const std::shared_ptr<Communicator>& communicator);
void unregister_communicator(const std::string& name);
std::shared_ptr<Communicator> find_communicator(const std::string& name, const char* op);

// A group of one rank: nothing is sent.
std::shared_ptr<Communicator> make_local(std::string name, std::string label);

}  // namespace tpk
