#include "communicator.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstring>

#include "check.h"
#include "errors.h"

namespace tpk {

namespace {

// The number of forks between the first process and this one. A system call for the process at every call would
// cost as much as a small collective.
std::atomic<uint64_t> process_generation{0};
[[maybe_unused]] const int counts_forks =
    pthread_atfork(nullptr, nullptr, [] { process_generation.fetch_add(1, std::memory_order_relaxed); });

}  // namespace

Cut Cut::even(size_t n, int world_size, size_t item) {
  Cut cut;
  const size_t ranks = static_cast<size_t>(world_size);
  for (size_t r = 0; r <= ranks; ++r) cut.starts.push_back((r * (n / ranks) + std::min(r, n % ranks)) * item);
  return cut;
}

Cut Cut::of_sizes(const std::vector<int64_t>& sizes) {
  Cut cut;
  cut.starts.push_back(0);
  for (int64_t size : sizes) cut.starts.push_back(cut.starts.back() + static_cast<size_t>(size));
  return cut;
}

Cut Cut::times(size_t item) const {
  Cut cut = *this;
  for (size_t& start : cut.starts) start *= item;
  return cut;
}

size_t Cut::largest() const {
  size_t largest = 0;
  for (size_t r = 0; r + 1 < starts.size(); ++r) largest = std::max(largest, starts[r + 1] - starts[r]);
  return largest;
}

Communicator::Communicator(std::string name, std::string label, int rank, int world_size, double timeout_s)
    : name_(std::move(name)),
      label_(std::move(label)),
      rank_(rank),
      world_size_(world_size),
      timeout_s_(timeout_s),
      owner_(process_generation) {}

// One collective call: exclusive, numbered, timed, and what breaks it breaks the communicator.
class Communicator::Turn {
 public:
  Turn(Communicator& comm, Op op) : comm_(checked(comm, op)), lock_(comm.mutex_), start_(now_nanoseconds()) {
    if (!comm.closed_.empty()) throw PeerLost(concat(name_of(op), " on group '", comm.label_, "': ", comm.closed_));
    if (!comm.broken_.empty()) {
      throw PeerLost(concat(name_of(op), " on group '", comm.label_,
                            "': the group is broken since an earlier call: ", comm.broken_));
    }
    ++comm.call_;
    comm.current_ = &comm.stats_[static_cast<size_t>(op)];
  }
  ~Turn() {
    comm_.current_->calls += 1;
    comm_.current_->nanoseconds += now_nanoseconds() - start_ - excluded_;
  }
  template <class Body>
  void run(Body&& body) {
    comm_.remember_failure(body);
  }
  // The same function; what it takes is not communication.
  template <class Signature>
  auto uncounted(const std::function<Signature>& function) {
    return [this, &function](auto... args) {
      const uint64_t start = now_nanoseconds();
      const Excluding excluding{*this, start};
      return function(args...);
    };
  }

 private:
  static Communicator& checked(Communicator& comm, Op op) {
    comm.check_process(name_of(op));  // before the lock: in a forked child it may stay locked for ever
    return comm;
  }

  struct Excluding {
    Turn& turn;
    const uint64_t start;
    ~Excluding() { turn.excluded_ += now_nanoseconds() - start; }
  };

  Communicator& comm_;
  std::lock_guard<std::mutex> lock_;
  const uint64_t start_;
  uint64_t excluded_ = 0;
};

template <class Body>
void Communicator::remember_failure(Body&& body) {
  try {
    body();
  } catch (const TimeoutFailure& error) {
    broken_ = error.what();
    throw;
  } catch (const PeerLost& error) {
    broken_ = error.what();
    throw;
  }
}

void Communicator::as_one_call(Op op, const std::function<void()>& body) { Turn(*this, op).run(body); }

bool Communicator::is_of_this_process() const { return process_generation == owner_; }

void Communicator::check_process(const char* what) const {
  TPK_CHECK(is_of_this_process(), what, " on group '", label_,
            "': this process was forked after the group was opened, which stays its parent's; open the group in the "
            "process that uses it");
}

void Communicator::check() {
  check_process("check");
  std::lock_guard<std::mutex> lock(mutex_);
  if (closed_.empty() && broken_.empty()) remember_failure([&] { do_check(); });
}

void Communicator::all_reduce(const CallSpec& spec, const Wire& wire, Input in, void* out, size_t n) {
  Turn(*this, spec.op).run([&] { do_all_reduce(spec, wire, in, out, n); });
}

void Communicator::reduce_scatter(const CallSpec& spec, const Wire& wire, Input in, void* out, const Cut& cut) {
  Turn(*this, spec.op).run([&] { do_reduce_scatter(spec, wire, in, out, cut); });
}

void Communicator::all_gather(const CallSpec& spec, const Wire& wire, const void* in, void* out, const Cut& cut) {
  Turn(*this, spec.op).run([&] { do_all_gather(spec, wire, in, out, cut); });
}

void Communicator::all_to_all(const CallSpec& spec, const Wire& wire, const void* in, void* out, const Cut& send,
                              const Cut& receive) {
  Turn(*this, spec.op).run([&] { do_all_to_all(spec, wire, in, out, send, receive); });
}

void Communicator::average_with_feedback(const CallSpec& spec, const Wire& wire, const FeedbackAverage& call) {
  Turn(*this, spec.op).run([&] { do_average_with_feedback(spec, wire, call); });
}

std::vector<std::vector<int>> Communicator::parts_in_order() const {
  std::vector<std::vector<int>> order;
  for (int i = 1; i <= world_size_; ++i) order.push_back({(rank_ + i) % world_size_});
  return order;
}

const Wire* Communicator::wire(DType dtype, Codec codec, ReduceOp op) const { return find_wire(dtype, codec, op); }

std::vector<int64_t> Communicator::exchange(Op op, int64_t mine) {
  std::vector<int64_t> all;
  Turn(*this, op).run([&] { all = do_exchange({op, DType::I64, ReduceOp::None, Codec::None, 0, 0, mine}); });
  return all;
}

void Communicator::all_reduce_beside(const CallSpec& spec, const Wire& wire, void* data, size_t n,
                                     const std::function<void()>& meanwhile) {
  Turn turn(*this, spec.op);
  bool ran = false;
  const auto uncounted = turn.uncounted(meanwhile);
  const auto once = [&] {
    ran = true;
    uncounted();
  };
  turn.run([&] { do_all_reduce_beside(spec, wire, data, n, once); });
  if (!ran) once();
}

void Communicator::all_reduce_chunks(const CallSpec& spec, const Wire& wire, const Chunks& chunks,
                                     const std::function<void()>& meanwhile) {
  Turn turn(*this, spec.op);
  const Chunks uncounted{chunks.list, turn.uncounted(chunks.make), chunks.use};
  turn.run([&] { do_all_reduce_chunks(spec, wire, uncounted, turn.uncounted(meanwhile)); });
}

void Communicator::reduce_scatter_chunks(const CallSpec& spec, const Wire& wire, const Chunks& chunks, void* out,
                                         const Cut& cut, const std::function<void()>& meanwhile) {
  Turn turn(*this, spec.op);
  const Chunks uncounted{chunks.list, turn.uncounted(chunks.make), chunks.use};
  turn.run([&] { do_reduce_scatter_chunks(spec, wire, uncounted, out, cut, turn.uncounted(meanwhile)); });
}

void Communicator::all_gather_chunks(const CallSpec& spec, const Wire& wire, const void* in, void* out, const Cut& cut,
                                     const std::vector<size_t>& ends, const std::function<void()>& meanwhile,
                                     const std::function<void(size_t)>& use) {
  Turn turn(*this, spec.op);
  turn.run(
      [&] { do_all_gather_chunks(spec, wire, in, out, cut, ends, turn.uncounted(meanwhile), turn.uncounted(use)); });
}

namespace {

[[noreturn]] void no_thread() { throw std::logic_error("this transport has no communication thread"); }

}  // namespace

void Communicator::do_average_with_feedback(const CallSpec& spec, const Wire&, const FeedbackAverage&) {
  throw std::logic_error(concat("transport ", transport(), " has no ", name_of(spec.op)));
}

void Communicator::do_all_reduce_chunks(const CallSpec&, const Wire&, const Chunks&, const std::function<void()>&) {
  no_thread();
}

void Communicator::do_reduce_scatter_chunks(const CallSpec&, const Wire&, const Chunks&, void*, const Cut&,
                                            const std::function<void()>&) {
  no_thread();
}

void Communicator::do_all_gather_chunks(const CallSpec&, const Wire&, const void*, void*, const Cut&,
                                        const std::vector<size_t>&, const std::function<void()>&,
                                        const std::function<void(size_t)>&) {
  no_thread();
}

void Communicator::do_all_to_all(const CallSpec& spec, const Wire&, const void*, void*, const Cut&, const Cut&) {
  throw std::logic_error(concat("transport ", transport(), " has no ", name_of(spec.op)));
}

void Communicator::do_all_reduce_beside(const CallSpec& spec, const Wire& wire, void* data, size_t n,
                                        const std::function<void()>& meanwhile) {
  do_all_reduce(spec, wire, data, data, n);
  meanwhile();
}

void Communicator::close(const std::string& why) {
  if (!is_of_this_process()) return;  // the parent's group stays as it is
  std::lock_guard<std::mutex> lock(mutex_);
  if (closed_.empty()) do_close();
  if (closed_.empty()) closed_ = why;
  is_closed_ = true;
}

void Communicator::abort(const std::string& why) {
  if (!is_of_this_process()) return;
  is_aborted_ = true;
  if (!is_closed_) do_abort();
  close(why);
}

std::array<OpStats, kOps> Communicator::stats() {
  check_process("stats");
  std::lock_guard<std::mutex> lock(mutex_);
  return stats_;
}

void Communicator::reset_stats() {
  check_process("reset_stats");
  std::lock_guard<std::mutex> lock(mutex_);
  stats_.fill({});
}

std::string Communicator::describe_call(Op op, uint64_t call) const {
  return concat(name_of(op), " on group '", label_, "' (rank ", rank_, " of ", world_size_, "), call ", call);
}

namespace {

std::string describe(const CallSpec& spec) {
  return concat(name_of(spec.op), "(", spec.numel, " values of ", name_of(spec.dtype),
                spec.reduce_op == ReduceOp::None ? "" : concat(", op ", name_of(spec.reduce_op)), ", codec ",
                name_of(spec.codec), ")");
}

bool agree(const CallSpec& a, const CallSpec& b) {
  return a.op == b.op && a.dtype == b.dtype && a.reduce_op == b.reduce_op && a.codec == b.codec && a.numel == b.numel &&
         a.shape_hash == b.shape_hash;
}

}  // namespace

void Communicator::mismatch(uint64_t call, const CallSpec& mine, int other_rank, const CallSpec& other) const {
  const std::string left = describe(mine), right = describe(other);
  throw RankMismatch(concat(describe_call(mine.op, call), ": the ranks disagree: rank ", rank_, " called ", left,
                            ", rank ", other_rank, " called ", right, left == right ? " with other dimensions" : "",
                            ". Nothing was read."));
}

namespace {

std::string list_of(const std::vector<int>& ranks) {
  std::string text = "[";
  for (size_t i = 0; i < ranks.size(); ++i) text += (i ? ", " : "") + std::to_string(ranks[i]);
  return text + "]";
}

}  // namespace

std::string Communicator::late_text(Op op, uint64_t call, const std::vector<int>& late, const std::vector<int>& came,
                                    uint64_t last_seen) const {
  return concat(describe_call(op, call), ": ranks ", list_of(late), " did not signal within ", timeout_s_, " s. Ranks ",
                list_of(came), " did. Rank ", late.empty() ? rank_ : late.front(), " was last seen at call ", last_seen,
                ". If it is only slow, raise Group.open(timeout_s=...).");
}

void Communicator::check_agreement(const CallSpec& mine, const std::vector<CallSpec>& all) const {
  // Every rank compares the specs of all ranks, so that either every rank raises or no rank does.
  for (int r = 0; r < world_size_; ++r) {
    if (!agree(all[static_cast<size_t>(r)], mine)) mismatch(call_, mine, r, all[static_cast<size_t>(r)]);
  }
}

void Communicator::check_parts(const CallSpec& mine, const std::vector<CallSpec>& all, const Cut& cut) const {
  for (int r = 0; r < world_size_; ++r) {
    const int64_t brings = all[static_cast<size_t>(r)].mine;
    if (brings == static_cast<int64_t>(cut.size(r))) continue;
    throw RankMismatch(concat(describe_call(mine.op), ": rank ", r, " brings ", brings, " values where the cut of ",
                              cut.total(), " over ", world_size_, " ranks gives it ", cut.size(r),
                              "; dim_size (or the shard) is wrong. Nothing was read."));
  }
}

uint64_t Communicator::check_pairs(const CallSpec& mine, const std::vector<const uint64_t*>& sends,
                                   const std::vector<const uint64_t*>& receives) const {
  uint64_t largest = 0;
  for (size_t s = 0; s < sends.size(); ++s) {
    for (size_t r = 0; r < receives.size(); ++r) {
      const uint64_t sent = sends[s][r], expected = receives[r][s];
      largest = std::max(largest, sent);
      if (sent == expected) continue;
      throw RankMismatch(concat(describe_call(mine.op), ": the ranks disagree: rank ", s, " sends ", sent,
                                " values to rank ", r, ", which expects ", expected, ". Nothing was read."));
    }
  }
  return largest;
}

namespace {

class LocalCommunicator final : public Communicator {
 public:
  LocalCommunicator(std::string name, std::string label) : Communicator(std::move(name), std::move(label), 0, 1, 0.0) {}
  const char* transport() const override { return "local"; }
  void* heap_allocate(size_t) override { return nullptr; }
  void heap_free(void*) override {}
  size_t heap_bytes() const override { return 0; }

 protected:
  void do_all_reduce(const CallSpec&, const Wire& wire, Input in, void* out, size_t n) override {
    take(wire, in, out, n);
  }
  void do_reduce_scatter(const CallSpec&, const Wire& wire, Input in, void* out, const Cut& cut) override {
    take(wire, in, out, cut.total());
  }
  void do_all_gather(const CallSpec& spec, const Wire& wire, const void* in, void* out, const Cut& cut) override {
    check_parts(spec, {spec}, cut);
    copy(in, out, cut.total() * wire.value_bytes);
  }
  void do_all_to_all(const CallSpec& spec, const Wire& wire, const void* in, void* out, const Cut& send,
                     const Cut& receive) override {
    const uint64_t sent = send.total(), expected = receive.total();
    check_pairs(spec, {&sent}, {&expected});
    copy(in, out, send.total() * wire.value_bytes);
  }
  std::vector<int64_t> do_exchange(const CallSpec& spec) override { return {spec.mine}; }
  void do_close() override {}

 private:
  static void take(const Wire& wire, const Input& in, void* out, size_t n) {
    if (in.is_packed()) return wire.decode(in.values(), out, n);
    copy(in.values(), out, n * wire.value_bytes);
  }
  static void copy(const void* in, void* out, size_t bytes) {
    if (in != out && bytes > 0) std::memcpy(out, in, bytes);
  }
};

}  // namespace

std::shared_ptr<Communicator> make_local(std::string name, std::string label) {
  return std::make_shared<LocalCommunicator>(std::move(name), std::move(label));
}

}  // namespace tpk
