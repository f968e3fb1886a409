// Back end `tpk` for torch.distributed: c10d's collectives of CPU tensors by a group's communicator.
//
// A module of its own, compiled against the installed torch: c10d has no stable ABI, and _C is one build for several
// torches. The communicator is an object of _C; it is called through its virtual functions alone.
//
// A collective   is checked on the caller's thread and run in order (Queue): tensors with other strides than those of a
//                contiguous one are copied there and back.
// A message      goes through the mailboxes of ranks that share memory, over gloo between hosts.
// Sparse sums    go over gloo, too; its back end is made when it is needed.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>
#include <vector>

#include "core/communicator.h"
#include "work.h"

namespace tpk {

class Backend final : public c10d::Backend {
 public:
  using Works = c10::intrusive_ptr<c10d::Work>;
  using Base = c10::intrusive_ptr<c10d::Backend>;
  using MakeGloo = std::function<Base()>;
  using Split = std::function<Base(c10::intrusive_ptr<c10d::Store>, int rank, int size, const std::string& name,
                                   double timeout_s)>;

  // owner: of comm. is_crowded: there are more ranks than cores. make_gloo: makes its back end of the same ranks.
  // split: makes a back end like this one of some of them.
  Backend(Communicator& comm, std::shared_ptr<void> owner, c10::intrusive_ptr<c10d::Store> store, bool is_crowded,
          MakeGloo make_gloo, Split split);
  ~Backend() override;

  const std::string getBackendName() const override { return "tpk"; }
  c10::intrusive_ptr<Options> getBackendOptions() override;
  void setTimeout(std::chrono::milliseconds timeout) override;
  void setSequenceNumberForGroup() override {}
  uint64_t getSequenceNumberForGroup() override { return num_collectives_; }
  bool supportsSplitting() const override { return true; }
  Base split(const c10::intrusive_ptr<c10d::Store>&, const std::vector<int>& ranks,
             const c10::intrusive_ptr<Options>&) override;
  void abort() override;
  void shutdown() override;
  c10d::ErrorType getError() override;

  Works allreduce(Tensors&, const c10d::AllreduceOptions&) override;
  Works allreduce_sparse(Tensors&, const c10d::AllreduceOptions&) override;
  Works allreduce_coalesced(Tensors&, const c10d::AllreduceCoalescedOptions&) override;
  Works broadcast(Tensors&, const c10d::BroadcastOptions&) override;
  Works reduce(Tensors&, const c10d::ReduceOptions&) override;
  Works allgather(std::vector<Tensors>&, Tensors&, const c10d::AllgatherOptions&) override;
  Works _allgather_base(at::Tensor&, at::Tensor&, const c10d::AllgatherOptions&) override;
  Works allgather_coalesced(std::vector<Tensors>&, Tensors&, const c10d::AllgatherOptions&) override;
  Works allgather_into_tensor_coalesced(Tensors&, Tensors&, const c10d::AllgatherOptions&) override;
  Works gather(std::vector<Tensors>&, Tensors&, const c10d::GatherOptions&) override;
  Works scatter(Tensors&, std::vector<Tensors>&, const c10d::ScatterOptions&) override;
  Works reduce_scatter(Tensors&, std::vector<Tensors>&, const c10d::ReduceScatterOptions&) override;
  Works _reduce_scatter_base(at::Tensor&, at::Tensor&, const c10d::ReduceScatterOptions&) override;
  Works reduce_scatter_tensor_coalesced(Tensors&, Tensors&, const c10d::ReduceScatterOptions&) override;
  Works alltoall_base(at::Tensor&, at::Tensor&, std::vector<int64_t>&, std::vector<int64_t>&,
                      const c10d::AllToAllOptions&) override;
  Works alltoall(Tensors&, Tensors&, const c10d::AllToAllOptions&) override;
  Works send(Tensors&, int to, int tag) override;
  Works recv(Tensors&, int from, int tag) override;
  Works recvAnysource(Tensors&, int tag) override;
  Works barrier(const c10d::BarrierOptions&) override;
  void monitoredBarrier(const c10d::BarrierOptions&, bool wait_all_ranks) override;
  void startCoalescing() override;
  Works endCoalescing() override;

  // Which codec packs float sums from now on; returns the one before.
  std::string set_codec(const std::string& name);

 private:
  struct Reduction;
  const std::string where() const;
  template <class Body>
  Works run(c10d::OpType type, const char* title, bool is_async, const Tensors& inputs, const Tensors& outputs,
            Body&& body);
  Reduction reduction_of(Op op, const c10d::ReduceOp& reduce, const at::Tensor& tensor) const;
  CallSpec spec_of(Op op, const at::Tensor& like, const Wire& wire, size_t numel, int64_t mine, int64_t root) const;
  void sum_in_place(const Reduction& reduction, const at::Tensor& tensor, Op op);
  void gather_into(const at::Tensor& input, const Tensors& outputs);
  void scatter_sum(const Reduction& reduction, const Tensors& inputs, const at::Tensor& output);
  void exchange(const CallSpec& spec, const Wire& wire, const char* in, char* out, const Cut& send, const Cut& receive);
  void exchange_all(Op op, const Tensors& inputs, const Tensors& outputs, int64_t root);
  Works exchange_with_root(Op op, c10d::OpType type, const at::Tensor& one, const char* list_name,
                           const std::vector<Tensors>& list, int64_t root, bool async_op);
  Works message(c10d::OpType type, const char* title, Tensors& tensors, int peer, int tag);
  const Base& gloo();
  void check_rank(const char* op, const char* argument, int64_t rank) const;
  const at::Tensor& only(const char* op, const char* argument, const Tensors& tensors) const;
  Works kept(Works work);

  const std::shared_ptr<void> owner_;
  Communicator& comm_;
  const c10::intrusive_ptr<c10d::Store> store_;
  const MakeGloo make_gloo_;
  const Split split_;
  std::mutex gloo_mutex_;
  Base gloo_;
  const std::shared_ptr<Queue> queue_;
  std::shared_ptr<Mailboxes> mailboxes_;
  std::atomic<Codec> codec_{Codec::None};
  std::atomic<uint64_t> num_collectives_{0};
  std::atomic<bool> is_shut_{false};
  uint64_t num_barriers_ = 0;
  bool coalesces_ = false;
  std::vector<Works> coalesced_;
};

}  // namespace tpk
