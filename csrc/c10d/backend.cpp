#include "backend.h"

#include <torch/csrc/utils/pybind.h>
#include <algorithm>
#include <optional>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>

#include <utility>

#include "core/check.h"
#include "core/errors.h"
#include "run.h"
#include "tensors.h"

namespace tpk {
namespace {

using c10d::OpType;

// Threads of the group may need the GIL before they end.
class WithoutGil {
 public:
  WithoutGil() {
    if (Py_IsInitialized() && PyGILState_Check()) released_.emplace();
  }

 private:
  std::optional<pybind11::gil_scoped_release> released_;
};

}  // namespace

Backend::Backend(Communicator& comm, std::shared_ptr<void> owner, c10::intrusive_ptr<c10d::Store> store,
                 bool is_crowded, MakeGloo make_gloo, Split split)
    : c10d::Backend(comm.rank(), comm.world_size()),
      owner_(std::move(owner)),
      comm_(comm),
      store_(std::move(store)),
      make_gloo_(std::move(make_gloo)),
      split_(std::move(split)),
      queue_(std::make_shared<Queue>()) {
  Communicator::Heaps heaps = comm_.take_heaps();
  if (heaps.bytes > 0) mailboxes_ = std::make_shared<Mailboxes>(comm_, owner_, std::move(heaps), is_crowded);
  init();
}

Backend::~Backend() {
  if (comm_.is_of_this_process()) {
    shutdown();
    return;
  }
  // A forked child: threads that do not exist here hold locks of these, which must not be destroyed.
  new std::shared_ptr<Queue>(queue_);
  new std::shared_ptr<Mailboxes>(mailboxes_);
}

// Every rank of the new back end calls it; others may.
Backend::Base Backend::split(const c10::intrusive_ptr<c10d::Store>& store, const std::vector<int>& ranks,
                             const c10::intrusive_ptr<Options>& options) {
  const auto found = std::find(ranks.begin(), ranks.end(), rank_);
  if (found == ranks.end()) return nullptr;
  // Groups of other ranks may be split off under the same name.
  const auto own = c10::make_intrusive<c10d::PrefixStore>(concat("split_", ranks[0]), store);
  return split_(own, static_cast<int>(found - ranks.begin()), static_cast<int>(ranks.size()), options->group_name,
                static_cast<double>(options->timeout.count()) * 1e-3);
}

c10::intrusive_ptr<c10d::Backend::Options> Backend::getBackendOptions() {
  const auto timeout = std::chrono::milliseconds(static_cast<int64_t>(comm_.timeout_s() * 1e3));
  return c10::make_intrusive<Options>("tpk", timeout);
}

void Backend::setTimeout(std::chrono::milliseconds timeout) {
  comm_.set_timeout(static_cast<double>(timeout.count()) * 1e-3);
}

void Backend::abort() {
  const WithoutGil no_gil;
  if (mailboxes_ != nullptr) mailboxes_->close("this rank aborted the process group");  // before its memory goes
  comm_.abort("this rank aborted the process group");
  shutdown();
}

void Backend::shutdown() {
  if (is_shut_.exchange(true)) return;
  const WithoutGil no_gil;
  queue_->close();
  if (mailboxes_ != nullptr) mailboxes_->close("this rank destroyed the process group");
  comm_.close("the process group was destroyed on this rank");
}

c10d::ErrorType Backend::getError() { return c10d::ErrorType::SUCCESS; }

std::string Backend::set_codec(const std::string& name) { return name_of(codec_.exchange(codec_of("codec", name))); }

const std::string Backend::where() const {
  return concat(" on group '", comm_.label(), "' (rank ", rank_, " of ", size_, ")");
}

void Backend::check_rank(const char* op, const char* argument, int64_t rank) const {
  TORCH_CHECK(rank >= 0 && rank < size_, op, where(), ": ", argument, " must be a rank of 0 to ", size_ - 1, ", got ",
              rank);
}

const at::Tensor& Backend::only(const char* op, const char* argument, const Tensors& tensors) const {
  TORCH_CHECK(tensors.size() == 1, op, where(), ": ", argument, " must be one tensor, got ", tensors.size());
  check_tensor(op, tensors[0]);
  return tensors[0];
}

Backend::Works Backend::kept(Works work) {
  if (coalesces_) coalesced_.push_back(work);
  return work;
}

CallSpec Backend::spec_of(Op op, const at::Tensor& like, const Wire& wire, size_t numel, int64_t mine,
                          int64_t root) const {
  const int64_t must_agree[] = {static_cast<int64_t>(like.scalar_type()), root};
  const bool moves = wire.dtype >= DType::Raw1;
  return {op,
          moves ? value_type_of(like).dtype : wire.dtype,
          moves ? ReduceOp::None : wire.op,
          wire.codec,
          numel,
          hash_of(must_agree, 2),
          mine};
}

Backend::Works Backend::barrier(const c10d::BarrierOptions& options) {
  return run(OpType::BARRIER, "tpk:barrier", options.asyncOp, {}, {}, [this] { comm_.exchange(Op::Barrier, 0); });
}

// Through the store: rank 0 waits for a key of each rank, and the others for the key with its verdict.
void Backend::monitoredBarrier(const c10d::BarrierOptions& options, bool wait_all_ranks) {
  const auto own = std::chrono::milliseconds(static_cast<int64_t>(comm_.timeout_s() * 1e3));
  const auto timeout = options.timeout == c10d::kUnsetTimeout ? own : options.timeout;
  const std::string prefix = concat("monitored_barrier/", num_barriers_++, "/"), verdict = prefix + "verdict";
  const auto key = [&](int rank) { return prefix + std::to_string(rank); };
  const auto comes = [&](const std::string& name, std::chrono::milliseconds limit) {
    try {
      store_->wait({name}, std::max(limit, std::chrono::milliseconds(1)));
      return true;
    } catch (const c10::Error&) {
      return false;
    }
  };
  const auto refuse = [&](const std::string& text) {
    TORCH_CHECK(text.empty(), "monitored_barrier", where(), ": ", text, " in ", timeout.count(), " ms");
  };
  if (rank_ != 0) {
    store_->set(key(rank_), std::vector<uint8_t>{1});
    // Rank 0 may wait as long before it answers.
    if (!comes(verdict, 2 * timeout)) return refuse("Rank 0 failed to pass monitoredBarrier");
    const std::vector<uint8_t> stored = store_->get(verdict);
    const std::string text(stored.begin() + 1, stored.end());
    // The first words are gloo's, which programs may look for.
    return refuse(text.empty() ? ""
                               : concat("Rank ", rank_,
                                        " successfully reached monitoredBarrier, but received errors while "
                                        "waiting for send/recv from rank 0: ",
                                        text));
  }
  const auto deadline = std::chrono::steady_clock::now() + timeout;
  std::string missing;
  bool is_late = false;  // before it could wait for anybody
  for (int r = 1; r < size_ && (missing.empty() || wait_all_ranks); ++r) {
    const auto left = deadline - std::chrono::steady_clock::now();
    is_late |= missing.empty() && left.count() <= 0;
    if (comes(key(r), std::chrono::duration_cast<std::chrono::milliseconds>(left)) && !is_late) continue;
    missing += concat(missing.empty() ? "Rank " : ", ", r);
  }
  const std::string text = is_late           ? "Rank 0 timed out in monitoredBarrier"
                           : missing.empty() ? ""
                                             : missing + " failed to pass monitoredBarrier";
  const std::string stored = " " + text;  // some stores have no empty values
  store_->set(verdict, std::vector<uint8_t>(stored.begin(), stored.end()));
  refuse(text);
}

// ---- messages -------------------------------------------------------------------------------------------------------

Backend::Works Backend::message(OpType type, const char* title, Tensors& tensors, int peer, int tag) {
  const bool sends = type == OpType::SEND;
  const at::Tensor& tensor = only(sends ? "send" : "recv", "tensors", tensors);
  TORCH_CHECK(!is_shut_, title, where(), ": the process group was destroyed");
  if (type != OpType::RECVANYSOURCE) {
    check_rank(sends ? "send" : "recv", "the other rank", peer);
    TORCH_CHECK(peer != rank_, sends ? "send" : "recv", where(), ": the other rank must not be this one");
  }
  const WithoutAutograd guard;
  const Values values(tensor, sends);
  if (mailboxes_ == nullptr) {
    const auto& other = gloo();
    Tensors plain{values.memory()};
    const Works work = sends                           ? other->send(plain, peer, tag)
                       : type == OpType::RECVANYSOURCE ? other->recvAnysource(plain, tag)
                                                       : other->recv(plain, peer, tag);
    if (sends || !values.is_copy()) return kept(work);
    return kept(c10::make_intrusive<WrittenBackWork>(work, [values] {
      const WithoutAutograd guard;
      values.write_back();
    }));
  }
  const auto work = c10::make_intrusive<MessageWork>(rank_, type, title, tensors, mailboxes_);
  const auto done = [work, values, sends](std::exception_ptr error, int source) {
    if (!error && !sends) {
      const WithoutAutograd guard;
      values.write_back();
    }
    work->complete(error ? as_error_of_torch(error) : nullptr, source);
  };
  Mailboxes::Message message{
      peer, tag, static_cast<uint32_t>(tensor.scalar_type()), values.data(), values.numel() * tensor.element_size(),
      done};
  if (sends) {
    mailboxes_->send(std::move(message));
  } else {
    mailboxes_->receive(std::move(message));
  }
  return kept(work);
}

Backend::Works Backend::send(Tensors& tensors, int to, int tag) {
  return message(OpType::SEND, "tpk:send", tensors, to, tag);
}

Backend::Works Backend::recv(Tensors& tensors, int from, int tag) {
  return message(OpType::RECV, "tpk:recv", tensors, from, tag);
}

Backend::Works Backend::recvAnysource(Tensors& tensors, int tag) {
  return message(OpType::RECVANYSOURCE, "tpk:recvAnySource", tensors, Mailboxes::kAnyRank, tag);
}

void Backend::startCoalescing() { coalesces_ = true; }

Backend::Works Backend::endCoalescing() {
  coalesces_ = false;
  return c10::make_intrusive<CoalescedWork>(std::exchange(coalesced_, {}));
}

const Backend::Base& Backend::gloo() {
  std::lock_guard<std::mutex> lock(gloo_mutex_);
  if (gloo_ == nullptr) gloo_ = make_gloo_();
  return gloo_;
}

}  // namespace tpk
