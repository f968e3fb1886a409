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

  using SocketCommunicator::exchange_openings;
  using SocketCommunicator::Message;
  using SocketCommunicator::Move;
  using SocketCommunicator::Room;
  using SocketCommunicator::stream;
  // SocketCommunicator::exchange_openings of the ranks of all hosts, as a call.
  bool exchange_openings_of(Op op, const std::vector<size_t>& counts, char* openings, const std::vector<Message>& to,
                            const std::vector<Room>& from);
  // SocketCommunicator::overlap, as a call.
  void beside(Op op, const std::function<void()>& call, const std::function<void()>& work) {
    as_one_call(op, [&] { overlap(op, call, work); });
  }
  // Of a chunk that `work` makes: the thread waits for it; the calling thread hands it over.
  void wait_until_made(const std::function<bool()>& is_made) { link().wait_for_thread(call_, is_made); }
  void hand_over() { link().hand_over(); }

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
