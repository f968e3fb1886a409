// Transport `group` on CUDA: the collectives over any process group that carries device memory (NCCL). Torch-free.
//
// As on the CPU it is an exchange and a local sum in rank order, so the bits are those of every other transport. Here
// only streams wait, so that the ranks cannot compare fingerprints before each call: the first call of a signature is
// compared over the host, later ones are trusted. Every rank makes the same calls in the same order, so either all
// ranks compare or none does.
//
// Waits    the owner of the exchange polls marks in pinned memory that the stream writes. Where an exchange is given
//          up, the stream traps behind it, the next call or check() raises the error that names the ranks, and the
//          group is broken.
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
  // Compares the first call of a signature; cut: of the parts that the ranks send.
  void agree(const CallSpec&, const Cut* cut = nullptr);
  // The specs of all ranks, compared.
  std::vector<CallSpec> all_gather_specs(const CallSpec&);
  void transfer(Op op, const Sizes& send, const Sizes& receive);
  void all_reduce_piece(const CallSpec&, const Wire&, const Input& in, void* out, size_t n);
  size_t piece_values(const Wire&, size_t parts) const;
  template <class Body>
  auto named(Op op, Body&& body);

  std::unique_ptr<DeviceExchange> exchange_;
  ExchangeMarks* marks_ = nullptr;  // on the host; nullptr: not polled
  ExchangeMarks* marks_on_device_ = nullptr;
  std::set<std::vector<int64_t>> agreed_;
};

}  // namespace tpk::cuda
