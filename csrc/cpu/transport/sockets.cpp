#include "sockets.h"

#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "core/check.h"
#include "core/communicator.h"
#include "core/errors.h"

namespace tpk {
namespace {

constexpr int kSliceMilliseconds = 200;    // between two checks of the other ranks
constexpr size_t kStep = size_t{1} << 20;  // so that both directions move
// Bytes to wake up for: over a slow link every packet would wake the waiting thread, and take the core from
// computation.
constexpr size_t kEnough = size_t{128} << 10;

bool must_wait(int error) { return error == EAGAIN || error == EWOULDBLOCK || error == EINTR; }

}  // namespace

SocketExchange::SocketExchange(std::vector<int> sockets, int rank, size_t capacity, double timeout_s,
                               std::unique_ptr<Watch> watch)
    : rank_(static_cast<size_t>(rank)),
      capacity_(capacity),
      timeout_s_(timeout_s),
      watch_(std::move(watch)),
      send_(new char[capacity]),
      receive_(new char[capacity]) {
  for (int socket : sockets) peers_.push_back({socket});
}

void SocketExchange::start(const std::vector<size_t>& send_bytes, const std::vector<size_t>& receive_bytes) {
  std::vector<Outgoing> send;
  std::vector<Incoming> receive;
  const char* from = send_.get();
  char* to = receive_.get();
  for (size_t r = 0; r < peers_.size(); ++r) {
    send.push_back({from, send_bytes[r]});
    receive.push_back({to, receive_bytes[r]});
    from += send_bytes[r];
    to += receive_bytes[r];
  }
  if (send[rank_].bytes > 0) std::memcpy(receive[rank_].to, send[rank_].from, send[rank_].bytes);
  start_between(send, receive);
}

void SocketExchange::start_between(const std::vector<Outgoing>& send, const std::vector<Incoming>& receive) {
  for (size_t r = 0; r < peers_.size(); ++r) {
    if (r == rank_) continue;
    peers_[r].out = send[r];
    peers_[r].in = receive[r];
  }
  move();
}

void SocketExchange::wait(uint64_t call) {
  const uint64_t deadline = now_nanoseconds() + static_cast<uint64_t>(timeout_s_ * 1e9);
  while (!is_done()) {
    if (move()) continue;
    if (!lost_.empty()) {
      watch_->look(call, false, true, lost_);
      throw PeerLost(lost_);  // whatever `look` found
    }
    const bool came = sleep(), late = now_nanoseconds() >= deadline;
    if (late || !came) watch_->look(call, late, false, "a connection is silent");
  }
}

bool SocketExchange::is_done() const {
  for (const Peer& peer : peers_) {
    if (peer.out.bytes > 0 || peer.in.bytes > 0) return false;
  }
  return true;
}

bool SocketExchange::move() {
  bool moved = false;
  for (size_t r = 0; r < peers_.size() && lost_.empty(); ++r) {
    if (peers_[r].out.bytes > 0) moved |= send_some(peers_[r]);
    if (peers_[r].in.bytes > 0 && lost_.empty()) moved |= receive_some(peers_[r]);
  }
  return moved;
}

bool SocketExchange::send_some(Peer& peer) {
  const ssize_t sent = ::send(peer.socket, peer.out.from, std::min(peer.out.bytes, kStep), MSG_NOSIGNAL | MSG_DONTWAIT);
  if (sent < 0) {
    if (!must_wait(errno)) lost(peer, std::strerror(errno));
    return false;
  }
  peer.out.from += sent;
  peer.out.bytes -= static_cast<size_t>(sent);
  return sent > 0;
}

bool SocketExchange::receive_some(Peer& peer) {
  const ssize_t received = ::recv(peer.socket, peer.in.to, std::min(peer.in.bytes, kStep), MSG_DONTWAIT);
  if (received <= 0) {
    if (received == 0) lost(peer, "connection closed");
    if (received < 0 && !must_wait(errno)) lost(peer, std::strerror(errno));
    return false;
  }
  peer.in.to += received;
  peer.in.bytes -= static_cast<size_t>(received);
  return true;
}

void SocketExchange::lost(const Peer& peer, const std::string& how) {
  lost_ = concat("connection to rank ", &peer - peers_.data(), ": ", how);
}

// Until a socket is ready, a slice of time at most; whether one is.
bool SocketExchange::sleep() {
  std::vector<pollfd> waiting;
  for (Peer& peer : peers_) {
    const int enough = static_cast<int>(std::min(peer.in.bytes, kEnough));
    if (enough > 0 && enough != peer.enough) {
      peer.enough = enough;
      setsockopt(peer.socket, SOL_SOCKET, SO_RCVLOWAT, &enough, sizeof enough);  // a hint; nothing depends on it
    }
    const int events = (peer.out.bytes > 0 ? POLLOUT : 0) | (peer.in.bytes > 0 ? POLLIN : 0);
    if (events != 0) waiting.push_back({peer.socket, static_cast<short>(events), 0});
  }
  return ::poll(waiting.data(), waiting.size(), kSliceMilliseconds) > 0;
}

void SocketExchange::close(uint64_t last_call) {
  watch_->leave(last_call);  // first, so that a rank that finds the connection closed also finds the reason
  disconnect();
  send_.reset();
  receive_.reset();
}

void SocketExchange::disconnect() {
  for (size_t r = 0; r < peers_.size(); ++r) {
    if (r != rank_ && peers_[r].socket >= 0) ::close(peers_[r].socket);
    peers_[r].socket = -1;
  }
}

}  // namespace tpk
