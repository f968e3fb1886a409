// Transport `group`: the same collectives over any c10d process group (gloo between hosts), through the buffers of an
// exchange; socket_transport.h is the same over connections. Torch-free.
//
// It is built on one primitive, an exchange in which every rank sends bytes to every other one. Sums are local and in
// rank order, not the backend's own all-reduce, so that the bits are those of every other transport. The first exchange
// of a call has a fixed size and carries the fingerprint (and the message itself when it is small): backends abort or
// hang when the sizes disagree, so nothing else may be sent before the ranks have agreed.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "core/communicator.h"
#include "core/exchange.h"
#include "scratch.h"

namespace tpk {

class GroupCommunicator : public Communicator {
 public:
  GroupCommunicator(std::string name, std::string label, int rank, int world_size, double timeout_s,
                    std::unique_ptr<Exchange> exchange);

  const char* transport() const override { return "group"; }
  void* heap_allocate(size_t) override { return nullptr; }
  void heap_free(void*) override {}
  size_t heap_bytes() const override { return 0; }

 protected:
  void do_all_reduce(const CallSpec&, const Wire&, Input in, void* out, size_t n) override;
  void do_reduce_scatter(const CallSpec&, const Wire&, Input in, void* out, const Cut&) override;
  void do_all_gather(const CallSpec&, const Wire&, const void* in, void* out, const Cut&) override;
  void do_all_to_all(const CallSpec&, const Wire&, const void* in, void* out, const Cut& send,
                     const Cut& receive) override;
  std::vector<int64_t> do_exchange(const CallSpec&) override;
  void do_all_reduce_beside(const CallSpec&, const Wire&, void* data, size_t n,
                            const std::function<void()>& meanwhile) override;
  void do_close() override { exchange_->close(call_); }

  using Sizes = std::vector<size_t>;
  // The opening exchange: fingerprints, and a payload that is_inline; returns the specs of all ranks.
  std::vector<CallSpec> open_call(const CallSpec&, const Wire* wire = nullptr, const Input* payload = nullptr,
                                  size_t n = 0);
  // What follows the opening; `meanwhile` runs while bytes are under way.
  virtual void send_all_reduce(const CallSpec&, const Wire&, const Input& in, void* out, size_t n,
                               const std::function<void()>* meanwhile);
  virtual void send_reduce_scatter(const CallSpec&, const Wire&, const Input& in, void* out, const Cut&);
  virtual void send_all_gather(const CallSpec&, const Wire&, const void* in, void* out, const Cut&);
  // Whether a message goes with the opening, and the room in every opening for one of so many bytes.
  virtual bool is_inline(const Wire& wire, size_t n) const { return wire.bytes(n) <= kInline; }
  virtual size_t room_of([[maybe_unused]] size_t payload_bytes) const { return kInline; }
  // The records of all ranks, each an opening with room for a payload.
  virtual void gather_records(Op op, const char* mine, size_t record_bytes, char* all);
  Exchange& exchange() { return *exchange_; }
  // Runs body, and adds the call to the text of its errors.
  void described(Op op, const std::function<void()>& body);

 private:
  void all_reduce_inline(const CallSpec&, const Wire&, const Input& in, void* out, size_t n);
  void run(Op op, const Sizes& send, const Sizes& receive, const std::function<void()>* meanwhile = nullptr);
  void all_reduce_piece(const CallSpec&, const Wire&, const Input& in, void* out, size_t n,
                        const std::function<void()>* meanwhile);
  size_t piece_values(const Wire&, size_t parts) const;

  std::unique_ptr<Exchange> exchange_;
  static constexpr size_t kInline = 1024;
  std::optional<Scratch> records_;  // of this call
};

}  // namespace tpk
