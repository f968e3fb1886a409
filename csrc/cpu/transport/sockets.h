// The exchange of transport `group` over a TCP connection to each other rank: no thread has to be woken but the one
// that waits, and bytes go from and to the memory where they lie. Torch-free.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "core/exchange.h"

namespace tpk {

class SocketExchange final : public Exchange {
 public:
  // Knows of failures of other ranks that a socket does not show.
  class Watch {
   public:
    virtual ~Watch() = default;
    // Throws TimeoutFailure or PeerLost when a rank is known to be lost; always when the deadline has passed (`late`)
    // or the connection has ended (`ended`). `what`: the symptom.
    virtual void look(uint64_t call, bool late, bool ended, const std::string& what) = 0;
    virtual void leave(uint64_t last_call) noexcept = 0;
  };

  // sockets[r]: a connection to rank r, which is ours to close from now on; that of this rank is not used.
  SocketExchange(std::vector<int> sockets, int rank, size_t capacity, double timeout_s, std::unique_ptr<Watch> watch);
  ~SocketExchange() override;
  SocketExchange(const SocketExchange&) = delete;
  SocketExchange& operator=(const SocketExchange&) = delete;

  char* send_buffer() override { return send_.get(); }
  const char* receive_buffer() override { return receive_.get(); }
  size_t capacity() const override { return capacity_; }
  void start(const std::vector<size_t>& send_bytes, const std::vector<size_t>& receive_bytes) override;
  void wait(uint64_t call) override;
  void close(uint64_t last_call) override;

  // Message by message: what one rank sends to another in some order, that one receives in this order. The memory is
  // accessed until the message has been moved or a wait has failed.
  void send(size_t rank, const void* from, size_t bytes);
  void receive(size_t rank, void* to, size_t bytes);
  // How far the messages to or from a rank have been moved.
  struct Mark {
    std::vector<uint64_t> sent, received;
  };
  Mark everything_posted() const;
  bool is_sent(const Mark& mark) const;
  bool is_received(const Mark& mark) const;
  bool is_received(const Mark& mark, size_t from) const { return peers_[from].received >= mark.received[from]; }
  // Moves what can be moved without waiting.
  bool move();
  // Moves bytes until `is_there()`, which the other ranks bring about before the deadline.
  void wait_for_ranks(uint64_t call, const std::function<bool()>& is_there);
  // The same for what another thread of this rank brings about, which then calls `hand_over`; without a deadline.
  void wait_for_thread(uint64_t call, const std::function<bool()>& is_there);
  // Returns when the thread that waits has done what it can and sleeps again, after a while where it has other cores,
  // or when there is none (`set_moving`). A wake-up alone does not give it the core that it shares with a thread that
  // computes: the scheduler may keep it waiting for 100 ms.
  void hand_over();
  // Whether that thread is awake, or sleeps with messages to move.
  bool is_busy() const { return busy_; }
  // Whether a thread moves bytes now.
  void set_moving(bool moving);
  // From another thread: every wait throws from now on.
  void abandon() noexcept;

 private:
  struct Message {
    char* at;
    size_t bytes;
  };
  struct Peer {
    int socket;
    std::deque<Message> out{}, in{};
    uint64_t sent = 0, received = 0;  // messages
    int enough = 1;                   // bytes to receive that are worth waking up for
  };
  bool send_some(Peer& peer);
  bool receive_some(Peer& peer);
  void lost(const Peer& peer, const std::string& how);
  void check_connections(uint64_t call);
  void check_abandoned() const;
  bool is_done() const;
  bool sleep();
  void disconnect();
  void wake() noexcept;

  std::vector<Peer> peers_;
  const size_t rank_, capacity_;
  const double timeout_s_;
  const std::unique_ptr<Watch> watch_;
  const int wake_fd_;
  std::atomic<bool> abandoned_{false}, busy_{true};
  std::mutex mutex_;  // of the two below
  std::condition_variable slept_;
  uint64_t sleeps_ = 0;  // of the waiting thread
  bool moving_ = false;
  std::unique_ptr<char[]> send_, receive_;
  std::string lost_;  // the symptom of the first broken connection
};

}  // namespace tpk
