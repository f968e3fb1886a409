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

  using SocketCommunicator::Message;
  using SocketCommunicator::Room;
  // SocketCommunicator::exchange_openings of the ranks of all hosts, as a call.
  bool exchange_openings_of(Op op, const std::vector<size_t>& counts, char* openings, const std::vector<Message>& to,
                            const std::vector<Room>& from);

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
