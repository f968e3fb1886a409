#include "sockets.h"

#include <poll.h>
#include <sched.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
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

// Until a thread sleeps again: on the core that the caller computes on, and on others, where it needs no help.
constexpr std::chrono::microseconds kPatience{5000}, kPatienceOfSeveralCores{200};

bool has_one_core() {
  cpu_set_t cores;
  return sched_getaffinity(0, sizeof cores, &cores) == 0 && CPU_COUNT(&cores) == 1;
}

bool must_wait(int error) { return error == EAGAIN || error == EWOULDBLOCK || error == EINTR; }

}  // namespace

SocketExchange::SocketExchange(std::vector<int> sockets, int rank, size_t capacity, double timeout_s,
                               std::unique_ptr<Watch> watch)
    : rank_(static_cast<size_t>(rank)),
      capacity_(capacity),
      timeout_s_(timeout_s),
      watch_(std::move(watch)),
      wake_fd_(::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)),
      send_(new char[capacity]),
      receive_(new char[capacity]) {
  for (int socket : sockets) peers_.push_back({socket});
  TPK_CHECK(wake_fd_ >= 0, "Group.open: no event can be made: ", std::strerror(errno));
}

SocketExchange::~SocketExchange() {
  disconnect();
  ::close(wake_fd_);
}

void SocketExchange::start(const std::vector<size_t>& send_bytes, const std::vector<size_t>& receive_bytes) {
  const char* from = send_.get();
  char* to = receive_.get();
  for (size_t r = 0; r < peers_.size(); ++r) {
    if (r == rank_ && send_bytes[r] > 0) std::memcpy(to, from, send_bytes[r]);
    if (r != rank_) {
      send(r, from, send_bytes[r]);
      receive(r, to, receive_bytes[r]);
    }
    from += send_bytes[r];
    to += receive_bytes[r];
  }
  move();
}

void SocketExchange::send(size_t rank, const void* from, size_t bytes) {
  if (bytes > 0) peers_[rank].out.push_back({const_cast<char*>(static_cast<const char*>(from)), bytes});
}

void SocketExchange::receive(size_t rank, void* to, size_t bytes) {
  if (bytes > 0) peers_[rank].in.push_back({static_cast<char*>(to), bytes});
}

SocketExchange::Mark SocketExchange::everything_posted() const {
  Mark mark;
  for (const Peer& peer : peers_) {
    mark.sent.push_back(peer.sent + peer.out.size());
    mark.received.push_back(peer.received + peer.in.size());
  }
  return mark;
}

bool SocketExchange::is_sent(const Mark& mark) const {
  for (size_t r = 0; r < peers_.size(); ++r) {
    if (peers_[r].sent < mark.sent[r]) return false;
  }
  return true;
}

bool SocketExchange::is_received(const Mark& mark) const {
  for (size_t r = 0; r < peers_.size(); ++r) {
    if (!is_received(mark, r)) return false;
  }
  return true;
}

void SocketExchange::wait(uint64_t call) {
  wait_for_ranks(call, [&] { return is_done(); });
}

void SocketExchange::wait_for_ranks(uint64_t call, const std::function<bool()>& is_there) {
  const uint64_t deadline = now_nanoseconds() + static_cast<uint64_t>(timeout_s_ * 1e9);
  while (!is_there()) {
    if (move()) continue;
    check_connections(call);
    check_abandoned();
    const bool came = sleep(), late = now_nanoseconds() >= deadline;
    if (late || !came) watch_->look(call, late, false, "a connection is silent");
  }
}

void SocketExchange::wait_for_thread(uint64_t call, const std::function<bool()>& is_there) {
  while (!is_there()) {
    if (move()) continue;
    check_connections(call);
    check_abandoned();
    sleep();
  }
}

void SocketExchange::hand_over() {
  const auto patience = has_one_core() ? kPatience : kPatienceOfSeveralCores;
  std::unique_lock<std::mutex> lock(mutex_);
  const uint64_t seen = sleeps_;
  wake();
  slept_.wait_for(lock, patience, [&] { return sleeps_ > seen || !moving_; });
}

void SocketExchange::set_moving(bool moving) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    moving_ = moving;
  }
  busy_ = moving;
  slept_.notify_all();
}

void SocketExchange::wake() noexcept {
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t written = ::write(wake_fd_, &one, sizeof one);
}

void SocketExchange::abandon() noexcept {
  abandoned_ = true;
  wake();
}

void SocketExchange::check_abandoned() const {
  if (abandoned_) throw PeerLost("this rank gave the call up");
}

void SocketExchange::check_connections(uint64_t call) {
  if (lost_.empty()) return;
  watch_->look(call, false, true, lost_);
  throw PeerLost(lost_);  // whatever `look` found
}

bool SocketExchange::is_done() const {
  return std::all_of(peers_.begin(), peers_.end(),
                     [](const Peer& peer) { return peer.out.empty() && peer.in.empty(); });
}

bool SocketExchange::move() {
  bool moved = false;
  for (size_t r = 0; r < peers_.size() && lost_.empty(); ++r) {
    if (!peers_[r].out.empty()) moved |= send_some(peers_[r]);
    if (!peers_[r].in.empty() && lost_.empty()) moved |= receive_some(peers_[r]);
  }
  return moved;
}

bool SocketExchange::send_some(Peer& peer) {
  Message& next = peer.out.front();
  const ssize_t sent = ::send(peer.socket, next.at, std::min(next.bytes, kStep), MSG_NOSIGNAL | MSG_DONTWAIT);
  if (sent < 0) {
    if (!must_wait(errno)) lost(peer, std::strerror(errno));
    return false;
  }
  next.at += sent;
  next.bytes -= static_cast<size_t>(sent);
  if (next.bytes == 0) {
    peer.out.pop_front();
    ++peer.sent;
  }
  return sent > 0;
}

bool SocketExchange::receive_some(Peer& peer) {
  Message& next = peer.in.front();
  const ssize_t received = ::recv(peer.socket, next.at, std::min(next.bytes, kStep), MSG_DONTWAIT);
  if (received <= 0) {
    if (received == 0) lost(peer, "connection closed");
    if (received < 0 && !must_wait(errno)) lost(peer, std::strerror(errno));
    return false;
  }
  next.at += received;
  next.bytes -= static_cast<size_t>(received);
  if (next.bytes == 0) {
    peer.in.pop_front();
    ++peer.received;
  }
  return true;
}

void SocketExchange::lost(const Peer& peer, const std::string& how) {
  lost_ = concat("connection to rank ", &peer - peers_.data(), ": ", how);
}

// Until a socket is ready or `wake` was called, a slice of time at most; whether one of these happened.
bool SocketExchange::sleep() {
  std::vector<pollfd> waiting{{wake_fd_, POLLIN, 0}};
  for (Peer& peer : peers_) {
    size_t expected = 0;
    for (const Message& message : peer.in) expected += message.bytes;
    const int enough = static_cast<int>(std::min(expected, kEnough));
    if (enough > 0 && enough != peer.enough) {
      peer.enough = enough;
      setsockopt(peer.socket, SOL_SOCKET, SO_RCVLOWAT, &enough, sizeof enough);  // a hint; nothing depends on it
    }
    const int events = (peer.out.empty() ? 0 : POLLOUT) | (peer.in.empty() ? 0 : POLLIN);
    if (events != 0) waiting.push_back({peer.socket, static_cast<short>(events), 0});
  }
  busy_ = waiting.size() > 1;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    ++sleeps_;
  }
  slept_.notify_all();
  const bool came = ::poll(waiting.data(), waiting.size(), kSliceMilliseconds) > 0;
  busy_ = true;
  uint64_t calls = 0;
  if (waiting[0].revents != 0) [[maybe_unused]]
    const ssize_t drained = ::read(wake_fd_, &calls, sizeof calls);
  return came;
}

void SocketExchange::close(uint64_t last_call) {
  if (send_ == nullptr) return;
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
