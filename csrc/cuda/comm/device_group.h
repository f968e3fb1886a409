// Transport `group` on CUDA: the collectives over any process group that carries device memory (NCCL). Torch-free.
//
// As on the CPU it is an exchange and a local sum in rank order, so the bits are those of every other transport. Here
// nothing waits but streams, so that the ranks cannot compare fingerprints before each call: a signature that is new to
// this rank is compared over the host, once, and trusted from then on. Every rank meets the same signatures in the same
// order, so all of them compare or none does.
//
// Waits    a stream that waits for a rank is watched by whoever owns the exchange, through marks that the stream leaves
//          in pinned memory. Where the exchange is given up, the stream traps behind it, the error that names the ranks
//          comes with the next call or with check(), and the group is broken.
#pragma once

#include <memory>
#include <set>

#include "core/exchange.h"
#include "device_communicator.h"

namespace tpk::cuda {

class DeviceGroupCommunicator final : public DeviceCommunicator {
 public:
  DeviceGroupCommunicator(std::string name, std::string label, int rank, int world_size, double timeout_s, int device,
                          std::unique_ptr<DeviceExchange> exchange);

  const char* transport() const override { return "group"; }
  void* heap_allocate(size_t) override { return nullptr; }
  void heap_free(void*) override {}
  size_t heap_bytes() const override { return 0; }

  void send_all_reduce(const CallSpec&, const Wire&, Input in, void* out, size_t n) override;
  void send_reduce_scatter(const CallSpec&, const Wire&, Input in, void* out, const Cut&, const Stretch&) override;
  void send_all_gather(const CallSpec&, const Wire&, const void* in, void* out, const Cut&, const Stretch&) override;

 protected:
  std::vector<int64_t> send_exchange(const CallSpec&) override;
  void synchronize() override;
  void do_close() override { exchange_->close(call_); }
  void raise_given_up() override;

 private:
  using Sizes = std::vector<size_t>;
  // Compares a signature that this rank has not met yet; cut: of parts that the ranks bring.
  void agree(const CallSpec&, const Cut* cut = nullptr);
  // What every rank says, compared.
  std::vector<CallSpec> ask(const CallSpec&);
  void travel(Op op, const Sizes& send, const Sizes& receive);
  void all_reduce_piece(const CallSpec&, const Wire&, const Input& in, void* out, size_t n);
  size_t piece_values(const Wire&, size_t parts) const;
  template <class Body>
  auto named(Op op, Body&& body);

  std::unique_ptr<DeviceExchange> exchange_;
  Travel* marks_ = nullptr;  // on the host; nullptr: nobody watches
  Travel* marks_on_device_ = nullptr;
  std::set<std::vector<int64_t>> met_;
};

}  // namespace tpk::cuda
