// What ends messages that cannot arrive: a lost rank, a deadline, the end of the group.
#include <algorithm>
#include <utility>

#include "core/check.h"
#include "core/errors.h"
#include "mailboxes.h"

namespace tpk {

// Ends the messages to and from a rank for which why(what, message) gives an error.
template <class Why>
void Mailboxes::fail_of(int rank, const Why& why) {
  Peer& peer = peers_[static_cast<size_t>(rank)];
  for (auto i = peer.sending.begin(); i != peer.sending.end();) {
    std::exception_ptr error = why("send to", i->message);
    if (!error) {
      ++i;
      continue;
    }
    if (i->has_header) peer.broken = "an earlier message was given up half-way";
    Message message = std::move(i->message);
    i = peer.sending.erase(i);
    finish(std::move(message), error, rank);
  }
  // A receive whose message is coming in: the rest of it is dropped.
  if (peer.into != nullptr) {
    if (std::exception_ptr error = why("recv from", *peer.into))
      finish(std::move(*std::exchange(peer.into, nullptr)), error, rank);
  }
  if (peer.parking != nullptr && peer.parking->receive != nullptr) {
    if (std::exception_ptr error = why("recv from", *peer.parking->receive)) {
      finish(std::move(*std::exchange(peer.parking->receive, nullptr)), error, rank);
      peer.parked.erase(std::find(peer.parked.begin(), peer.parked.end(), peer.parking));
      peer.parking = nullptr;
    }
  }
}

// What nothing has moved for: because a rank is lost, or because the deadline has passed.
void Mailboxes::look_for_trouble() {
  const double timeout_s = comm_.timeout_s();
  const uint64_t now = now_nanoseconds();
  const auto late = [&](const char* what, const Message& message) -> std::exception_ptr {
    if (static_cast<double>(now - message.posted) * 1e-9 <= timeout_s) return nullptr;
    return std::make_exception_ptr(TimeoutFailure(
        concat(describe(what, message), ": the other rank did not do its part within ", timeout_s, " s.")));
  };
  const auto lost = [&](const std::string& how) {
    return [&, how](const char* what, const Message& message) {
      return std::make_exception_ptr(PeerLost(concat(describe(what, message), ": ", how, ".")));
    };
  };
  const auto fail_receives = [&](const auto& is_meant, const auto& why) {
    for (auto i = receives_.begin(); i != receives_.end();) {
      std::exception_ptr error = is_meant(*i) ? why("recv from", *i) : nullptr;
      if (!error) {
        ++i;
        continue;
      }
      finish(std::move(*i), error, i->peer);
      i = receives_.erase(i);
    }
  };
  size_t num_lost = 0;
  std::string last;
  for (int r = 0; r < comm_.world_size(); ++r) {
    if (r == comm_.rank()) continue;
    fail_of(r, late);
    const std::string how = comm_.loss_of(r);
    if (how.empty()) continue;
    // What it wrote before it left is still there.
    if (pull(peers_[static_cast<size_t>(r)], r)) continue;
    last = concat("rank ", r, " ", how);
    ++num_lost;
    fail_of(r, lost(last));
    fail_receives([&](const Message& receive) { return receive.peer == r; }, lost(last));
  }
  fail_receives([](const Message&) { return true; }, late);
  if (num_lost + 1 == peers_.size())
    fail_receives([](const Message&) { return true; }, lost(concat(last, ", the last of the others")));
}

void Mailboxes::close(const std::string& why) {
  {
    std::lock_guard<std::mutex> lock(thread_mutex_);
    leaves_ = true;
  }
  changed_.notify_all();
  std::unique_lock<std::mutex> lock(mutex_);
  if (closed_.empty()) {
    closed_ = why;
    const auto closed = [&](const char* what, const Message& message) {
      return std::make_exception_ptr(PeerLost(concat(describe(what, message), ": ", why, ".")));
    };
    for (int r = 0; r < comm_.world_size(); ++r) fail_of(r, closed);
    for (Message& receive : receives_) {
      std::exception_ptr error = closed("recv from", receive);
      finish(std::move(receive), error, receive.peer);
    }
    receives_.clear();
    is_closed_ = true;
    ring_door(comm_.rank());
  }
  run_finished(lock);
  while (at_door_ > 0) std::this_thread::yield();
  thread_.reset();
}

}  // namespace tpk
