// The leaders of a slice of transport `hierarchical`, one a host. Their calls are parts of calls in which all ranks
// have agreed, and need no opening. Torch-free.
#pragma once

#include <vector>

#include "core/bytes.h"
#include "socket_transport.h"

namespace tpk {

class Leaders final : public SocketCommunicator {
 public:
  using SocketCommunicator::SocketCommunicator;

  // The records of the ranks that each leader speaks for. counts[h]: those of host h; out: of all hosts in order.
  void gather_records_of(Op op, const char* mine, const std::vector<size_t>& counts, size_t record_bytes, char* out);

 protected:
  void do_reduce_scatter(const CallSpec& spec, const Wire& wire, Input in, void* out, const Cut& cut) override {
    send_reduce_scatter(spec, wire, in, out, cut);
  }
  void do_all_gather(const CallSpec& spec, const Wire& wire, const void* in, void* out, const Cut& cut) override {
    send_all_gather(spec, wire, in, out, cut);
  }
  void do_all_to_all(const CallSpec& spec, const Wire& wire, const void* in, void* out, const Cut& send,
                     const Cut& receive) override;
};

}  // namespace tpk
