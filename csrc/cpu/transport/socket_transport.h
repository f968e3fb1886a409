// Transport `group` over connections: its collectives are streams (streams.h), which a thread of the group can move
// while the calling thread computes what they send or uses what they bring. Torch-free.
//
// Thread   the calling thread holds the group's turn until the thread has ended the call, and multiplies meanwhile.
// What
//          the thread throws reaches the caller. Where the caller's own work throws, the call cannot be ended: this
//          rank closes the group for the others, which wait for its bytes.
#pragma once

#include <memory>

#include "communication_thread.h"
#include "group_transport.h"
#include "streams.h"

namespace tpk {

class SocketCommunicator : public GroupCommunicator {
 public:
  SocketCommunicator(std::string name, std::string label, int rank, int world_size, double timeout_s,
                     std::unique_ptr<SocketExchange> link);
  ~SocketCommunicator() override;

  bool has_thread() const override { return true; }
  bool averages_with_feedback() const override { return true; }
  bool sums_in_one_exchange(const Wire&, size_t n, bool scatters) const override;
  void let_thread_run() override {
    if (link_.is_busy()) link_.hand_over();
  }

 protected:
  void do_all_reduce_beside(const CallSpec&, const Wire&, void* data, size_t n,
                            const std::function<void()>& meanwhile) override;
  void do_all_reduce_chunks(const CallSpec&, const Wire&, const Chunks&,
                            const std::function<void()>& meanwhile) override;
  void do_reduce_scatter_chunks(const CallSpec&, const Wire&, const Chunks&, void* out, const Cut&,
                                const std::function<void()>& meanwhile) override;
  void do_all_gather_chunks(const CallSpec&, const Wire&, const void* in, void* out, const Cut&,
                            const std::vector<size_t>& ends, const std::function<void()>& meanwhile,
                            const std::function<void(size_t)>& use) override;
  void do_average_with_feedback(const CallSpec&, const Wire&, const FeedbackAverage&) override;
  void do_close() override;
  void do_abort() override { link_.abandon(); }
  void send_all_reduce(const CallSpec&, const Wire&, const Input& in, void* out, size_t n,
                       const std::function<void()>* meanwhile) override;
  void send_reduce_scatter(const CallSpec&, const Wire&, const Input& in, void* out, const Cut&) override;
  void send_all_gather(const CallSpec&, const Wire&, const void* in, void* out, const Cut&) override;
  // One way over the link where it would be three.
  bool is_inline(const Wire& wire, size_t n) const override { return sums_in_one_exchange(wire, n, false); }
  size_t room_of(size_t payload_bytes) const override { return payload_bytes; }
  void gather_records(Op op, const char* mine, size_t record_bytes, char* all) override;
  struct Message {
    const char* at = nullptr;
    size_t bytes = 0;
  };
  struct Room {
    char* at = nullptr;
    size_t bytes = 0;
  };
  // Openings of all ranks, counts[r] of them of rank r, where those of this rank are; with them to[r] (none: nothing)
  // goes to each other rank r, as one message. from[r]: where as much from rank r is put; whether all ranks have sent
  // what there is room for. What has another size is dropped.
  bool exchange_openings(Op op, const std::vector<size_t>& counts, char* openings, const std::vector<Message>& to,
                         const std::vector<Room>& from);
  SocketExchange& link() { return link_; }

  using Move = std::function<void(Stream&)>;
  // Runs `move` on this thread, and counts what it sends.
  void stream(Op op, const Wire&, const Move& move);
  // Runs `call` on the thread of the group while `work` runs here. `work` may return early when the thread has ended.
  void overlap(Op op, const std::function<void()>& call, const std::function<void()>& work);

 private:
  // A sum of `chunks`, which this thread makes while `move` sends them.
  void sum_chunks(const CallSpec&, const Wire&, const Chunks&, const std::function<void(Stream&, const Source&)>& move,
                  const std::function<void()>& meanwhile);

  SocketExchange& link_;
  std::unique_ptr<CommunicationThread> thread_;
};

}  // namespace tpk
