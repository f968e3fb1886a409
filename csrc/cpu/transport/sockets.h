// The exchange of transport `group` over a TCP connection to each other rank, by the calling thread: no
// thread has to be woken but the one that waits, and bytes go from and to the memory where they lie. Torch-free.
#pragma once

#include <memory>
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
  ~SocketExchange() override { disconnect(); }
  SocketExchange(const SocketExchange&) = delete;
  SocketExchange& operator=(const SocketExchange&) = delete;

  char* send_buffer() override { return send_.get(); }
  const char* receive_buffer() override { return receive_.get(); }
  size_t capacity() const override { return capacity_; }
  bool takes_any_memory() const override { return true; }
  void start(const std::vector<size_t>& send_bytes, const std::vector<size_t>& receive_bytes) override;
  void start_between(const std::vector<Outgoing>& send, const std::vector<Incoming>& receive) override;
  void wait(uint64_t call) override;
  void close(uint64_t last_call) override;

 private:
  struct Peer {
    int socket;
    Outgoing out{};
    Incoming in{};
    int enough = 1;  // bytes to receive that are worth waking up for
  };
  // Sends and receives what goes without waiting; whether anything did.
  bool move();
  bool send_some(Peer& peer);
  bool receive_some(Peer& peer);
  void lost(const Peer& peer, const std::string& how);
  bool is_done() const;
  bool sleep();
  void disconnect();

  std::vector<Peer> peers_;
  const size_t rank_, capacity_;
  const double timeout_s_;
  const std::unique_ptr<Watch> watch_;
  std::unique_ptr<char[]> send_, receive_;
  std::string lost_;  // the symptom of the first broken connection
};

}  // namespace tpk
