#include "mailboxes.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <utility>

#include "core/check.h"
#include "core/errors.h"

namespace tpk {
namespace {

constexpr size_t kAlign = 16;                         // of positions in a ring, so that a header is never cut
constexpr size_t kMostRingBytes = size_t{256} << 10;  // what the second-level cache holds beside other things
constexpr size_t kStepBytes = size_t{32} << 10;       // after which the other side may go on
constexpr uint64_t kSpinNanoseconds = 100'000, kCrowdedSpinNanoseconds = 2'000;
constexpr long kSleepNanoseconds = 20'000'000;  // a dead rank is noticed this soon
// How often the thread looks whether anybody waits for what is under way, and for how long after it has moved
// something: then it sleeps until it is woken.
constexpr std::chrono::microseconds kPollPeriod{200};
constexpr uint64_t kPollNanoseconds = 100'000'000;

size_t aligned(size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

}  // namespace

struct alignas(64) Mailboxes::Door {
  std::atomic<uint64_t> rings;
  alignas(64) std::atomic<uint32_t> sleepers;
};

// Bytes written and read since the beginning; the values lie behind it.
struct alignas(64) Mailboxes::Ring {
  std::atomic<uint64_t> written;
  alignas(64) std::atomic<uint64_t> read;
};

Mailboxes::Mailboxes(Communicator& comm, std::shared_ptr<void> owner, Communicator::Heaps heaps, bool is_crowded)
    : owner_(std::move(owner)),
      comm_(comm),
      heaps_(std::move(heaps)),
      capacity_(
          std::min(kMostRingBytes, (heaps_.bytes - sizeof(Door)) / heaps_.of_rank.size() / 64 * 64 - sizeof(Ring)) /
          kAlign * kAlign),
      is_crowded_(is_crowded),
      peers_(heaps_.of_rank.size()),
      thread_(std::make_unique<CommunicationThread>()) {
  const size_t least = heaps_.of_rank.size() * (sizeof(Ring) + 64 * kAlign) + sizeof(Door);
  TPK_CHECK(heaps_.bytes >= least, "group '", comm.label(), "': messages between ", heaps_.of_rank.size(),
            " ranks need ", least, " bytes of an arena, which has ", heaps_.bytes);
  for (int r = 0; r < comm_.world_size(); ++r) {
    Peer& peer = peers_[static_cast<size_t>(r)];
    peer.to = ring(r, comm_.rank());
    peer.from = ring(comm_.rank(), r);
  }
}

class Mailboxes::AtDoor {
 public:
  explicit AtDoor(Mailboxes& boxes) : boxes_(boxes) { ++boxes_.at_door_; }
  ~AtDoor() { --boxes_.at_door_; }
  bool is_there() const { return !boxes_.is_closed_; }

 private:
  Mailboxes& boxes_;
};

Mailboxes::~Mailboxes() {
  if (!comm_.is_of_this_process()) {
    static_cast<void>(thread_.release());  // it is the parent's
    return;
  }
  close("this rank closed the group");
}

Mailboxes::Ring* Mailboxes::ring(int owner, int from) const {
  char* const first = heaps_.of_rank[static_cast<size_t>(owner)] + sizeof(Door);
  return reinterpret_cast<Ring*>(first + static_cast<size_t>(from) * (sizeof(Ring) + (capacity_ + 63) / 64 * 64));
}

char* Mailboxes::memory(Ring* ring) const { return reinterpret_cast<char*>(ring + 1); }

void Mailboxes::copy_in(Ring* ring, uint64_t position, const char* from, size_t bytes) const {
  const size_t start = position % capacity_, first = std::min(bytes, capacity_ - start);
  std::memcpy(memory(ring) + start, from, first);
  std::memcpy(memory(ring), from + first, bytes - first);
}

void Mailboxes::copy_out(Ring* ring, uint64_t position, char* to, size_t bytes) const {
  const size_t start = position % capacity_, first = std::min(bytes, capacity_ - start);
  std::memcpy(to, memory(ring) + start, first);
  std::memcpy(to + first, memory(ring), bytes - first);
}

std::string Mailboxes::describe(const char* what, const Message& message) const {
  const std::string peer = message.peer == kAnyRank ? "any rank" : concat("rank ", message.peer);
  return concat(what, " ", peer, " (tag ", message.tag, ", ", message.bytes, " bytes) on group '", comm_.label(),
                "' (rank ", comm_.rank(), " of ", comm_.world_size(), ")");
}

// ---- posting --------------------------------------------------------------------------------------------------------

void Mailboxes::send(Message message) {
  comm_.check_process("send");
  message.posted = now_nanoseconds();
  std::unique_lock<std::mutex> lock(mutex_);
  Peer& peer = peers_[static_cast<size_t>(message.peer)];
  const std::string& why = closed_.empty() ? peer.broken : closed_;
  if (!why.empty()) throw PeerLost(concat(describe("send to", message), ": ", why));
  ++under_way_;
  peer.sending.push_back({std::move(message)});
  progress();
  run_finished(lock);
  need_thread();
}

void Mailboxes::receive(Message message) {
  comm_.check_process("recv");
  message.posted = now_nanoseconds();
  std::unique_lock<std::mutex> lock(mutex_);
  if (!closed_.empty()) throw PeerLost(concat(describe("recv from", message), ": ", closed_));
  ++under_way_;
  for (size_t r = 0; r < peers_.size(); ++r) {
    if (message.peer != kAnyRank && message.peer != static_cast<int>(r)) continue;
    auto& parked = peers_[r].parked;
    const auto found = std::find_if(parked.begin(), parked.end(), [&](const std::shared_ptr<Parked>& other) {
      return other->header.tag == message.tag && other->receive == nullptr;
    });
    if (found == parked.end()) continue;
    if (!(*found)->is_complete) {
      (*found)->receive = std::make_unique<Message>(std::move(message));
    } else {
      const std::shared_ptr<Parked> whole = *found;
      parked.erase(found);
      deliver(std::move(message), whole->header, whole->values.get(), static_cast<int>(r));
    }
    run_finished(lock);
    return need_thread();
  }
  receives_.push_back(std::move(message));
  progress();
  run_finished(lock);
  need_thread();
}

void Mailboxes::deliver(Message message, const Header& header, const char* values, int source) {
  std::exception_ptr error = mismatch(message, header, source);
  if (!error && header.bytes > 0) std::memcpy(message.at, values, header.bytes);
  finish(std::move(message), error, source);
}

std::exception_ptr Mailboxes::mismatch(const Message& message, const Header& header, int source) const {
  if (message.bytes == header.bytes && message.kind == header.kind) return nullptr;
  const char* const how = message.bytes == header.bytes ? "values of another dtype" : "another size";
  return std::make_exception_ptr(RankMismatch(concat(describe("recv from", message), ": rank ", source, " sent ", how,
                                                     " with that tag (", header.bytes, " bytes). It was dropped.")));
}

void Mailboxes::finish(Message&& message, std::exception_ptr error, int source) {
  --under_way_;
  finished_.push_back([done = std::move(message.done), error, source] { done(error, source); });
}

// Without the lock: what they run may post messages.
void Mailboxes::run_finished(std::unique_lock<std::mutex>& lock) {
  std::vector<std::function<void()>> finished;
  finished.swap(finished_);
  lock.unlock();
  if (finished.empty()) return;
  for (const std::function<void()>& done : finished) done();
  if (waiting_ == 0) return;
  const AtDoor door(*this);  // another thread of this rank may wait for them
  if (door.is_there()) ring_door(comm_.rank());
}

// ---- moving bytes ---------------------------------------------------------------------------------------------------

bool Mailboxes::progress() {
  if (!closed_.empty()) return false;
  bool moved = false;
  for (size_t r = 0; r < peers_.size(); ++r) {
    if (static_cast<int>(r) == comm_.rank()) continue;
    const bool here = push(peers_[r], static_cast<int>(r)) | pull(peers_[r], static_cast<int>(r));
    if (here) ring_door(static_cast<int>(r));
    moved |= here;
  }
  return moved;
}

bool Mailboxes::push(Peer& peer, int rank) {
  Ring* const ring = peer.to;
  bool moved = false;
  while (!peer.sending.empty()) {
    Sending& sending = peer.sending.front();
    const uint64_t written = ring->written.load(std::memory_order_relaxed);
    const size_t room = capacity_ - (written - ring->read.load(std::memory_order_acquire));
    if (!sending.has_header) {
      if (room < sizeof(Header)) break;
      const Header header{sending.message.bytes, sending.message.tag, sending.message.kind};
      copy_in(ring, written, reinterpret_cast<const char*>(&header), sizeof header);
      ring->written.store(written + sizeof header, std::memory_order_release);
      sending.has_header = true;
    } else {
      const size_t left = sending.message.bytes - sending.moved, n = std::min({left, room, kStepBytes});
      if (n == 0 && left > 0) break;
      copy_in(ring, written, sending.message.at + sending.moved, n);
      ring->written.store(written + aligned(n), std::memory_order_release);
      sending.moved += n;
    }
    moved = true;
    if (sending.moved == sending.message.bytes) {
      Message message = std::move(sending.message);
      peer.sending.pop_front();
      finish(std::move(message), nullptr, rank);
    }
  }
  return moved;
}

bool Mailboxes::is_waited_for(int rank) const {
  return std::any_of(receives_.begin(), receives_.end(),
                     [&](const Message& receive) { return receive.peer == rank || receive.peer == kAnyRank; });
}

bool Mailboxes::begin_reading(Peer& peer, int rank) {
  Ring* const ring = peer.from;
  const uint64_t read = ring->read.load(std::memory_order_relaxed);
  if (ring->written.load(std::memory_order_acquire) == read || !is_waited_for(rank)) return false;
  copy_out(ring, read, reinterpret_cast<char*>(&peer.header), sizeof(Header));
  ring->read.store(read + sizeof(Header), std::memory_order_release);
  peer.is_reading = true;
  peer.moved = 0;
  const auto found = std::find_if(receives_.begin(), receives_.end(), [&](const Message& receive) {
    return (receive.peer == rank || receive.peer == kAnyRank) && receive.tag == peer.header.tag;
  });
  if (found == receives_.end()) {
    peer.parking = std::make_shared<Parked>();
    peer.parking->header = peer.header;
    peer.parking->values.reset(new char[peer.header.bytes]);
    peer.parked.push_back(peer.parking);
    return true;
  }
  Message receive = std::move(*found);
  receives_.erase(found);
  if (std::exception_ptr error = mismatch(receive, peer.header, rank)) {
    finish(std::move(receive), error, rank);
  } else {
    peer.into = std::make_unique<Message>(std::move(receive));
  }
  return true;
}

void Mailboxes::end_reading(Peer& peer, int rank) {
  peer.is_reading = false;
  if (peer.into != nullptr) finish(std::move(*std::exchange(peer.into, nullptr)), nullptr, rank);
  const std::shared_ptr<Parked> parked = std::exchange(peer.parking, nullptr);
  if (parked == nullptr) return;
  parked->is_complete = true;
  if (parked->receive == nullptr) return;
  peer.parked.erase(std::find(peer.parked.begin(), peer.parked.end(), parked));
  deliver(std::move(*parked->receive), parked->header, parked->values.get(), rank);
}

bool Mailboxes::pull(Peer& peer, int rank) {
  Ring* const ring = peer.from;
  bool moved = false;
  while (peer.is_reading || begin_reading(peer, rank)) {
    const uint64_t read = ring->read.load(std::memory_order_relaxed);
    const size_t there = ring->written.load(std::memory_order_acquire) - read;
    const size_t left = peer.header.bytes - peer.moved, n = std::min({left, there, kStepBytes});
    if (n == 0 && left > 0) break;
    char* const to = peer.into != nullptr      ? peer.into->at
                     : peer.parking != nullptr ? peer.parking->values.get()
                                               : nullptr;
    if (to != nullptr && n > 0) {
      copy_out(ring, read, to + peer.moved, n);
      // Changes nothing but who wrote the lines last: where the cores have no cache in common, the sender takes 2.4
      // times as long to rewrite those that this rank has only read.
      copy_in(ring, read, to + peer.moved, n);
    }
    ring->read.store(read + aligned(n), std::memory_order_release);
    peer.moved += n;
    moved = true;
    if (peer.moved == peer.header.bytes) end_reading(peer, rank);
  }
  return moved;
}

// ---- waiting --------------------------------------------------------------------------------------------------------

void Mailboxes::ring_door(int rank) const {
  Door& other = door(rank);
  other.rings.fetch_add(1, std::memory_order_release);
  std::atomic_thread_fence(std::memory_order_seq_cst);  // pairs with that of sleep_once
  if (other.sleepers.load(std::memory_order_relaxed) == 0) return;
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&other.rings), FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
}

void Mailboxes::wait(const std::function<bool()>& is_done, uint64_t limit) {
  struct Waiting {
    Mailboxes& boxes;
    explicit Waiting(Mailboxes& boxes) : boxes(boxes) { ++boxes.waiting_; }
    ~Waiting() {
      --boxes.waiting_;
      boxes.need_thread();
    }
  } waiting(*this);
  const uint64_t spin = is_crowded_ ? kCrowdedSpinNanoseconds : kSpinNanoseconds;
  uint64_t now = now_nanoseconds(), spin_until = now + spin;
  while (!is_done() && now < limit) {
    bool moved = false;
    if (now >= spin_until) {
      sleep_once();
      moved = true;
    } else if (std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock); lock.owns_lock()) {
      moved = progress();
      run_finished(lock);
    } else {
      std::this_thread::yield();  // to the thread that has the lock, which may need this core
    }
    now = now_nanoseconds();
    if (moved) spin_until = now + spin;
  }
}

// One round of progress, or a sleep until another rank rings.
void Mailboxes::sleep_once() {
  uint64_t seen = 0;
  {
    const AtDoor here(*this);
    if (!here.is_there()) return;
    seen = door(comm_.rank()).rings.load(std::memory_order_acquire);
  }
  {
    std::unique_lock<std::mutex> lock(mutex_);
    const bool moved = progress();
    if (!moved) look_for_trouble();
    const bool has_finished = !finished_.empty();
    run_finished(lock);
    if (moved || has_finished) return;
  }
  const AtDoor here(*this);
  if (!here.is_there()) return;
  Door& mine = door(comm_.rank());
  mine.sleepers.fetch_add(1, std::memory_order_relaxed);
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (mine.rings.load(std::memory_order_relaxed) == seen) {
    const timespec limit{0, kSleepNanoseconds};
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&mine.rings), FUTEX_WAIT, static_cast<uint32_t>(seen), &limit,
            nullptr, 0);
  }
  mine.sleepers.fetch_sub(1, std::memory_order_relaxed);
}

bool Mailboxes::is_thread_needed() const { return under_way_ > 0 && waiting_ == 0; }

// The thread that moves messages for which nobody waits. Without the lock.
void Mailboxes::need_thread() {
  if (!is_thread_needed() || is_polling_) return;
  {
    std::lock_guard<std::mutex> lock(thread_mutex_);
    if (leaves_) return;
    if (!std::exchange(has_thread_, true)) thread_->start([this] { serve(); });
  }
  changed_.notify_one();
}

// Who posts a message mostly waits for it at once: the thread is not woken for it, it looks from time to time.
void Mailboxes::serve() {
  std::unique_lock<std::mutex> lock(thread_mutex_);
  uint64_t last = now_nanoseconds();
  while (!leaves_) {
    changed_.wait_for(lock, kPollPeriod, [&] { return leaves_; });
    for (; !leaves_ && is_thread_needed(); last = now_nanoseconds()) {
      lock.unlock();
      sleep_once();
      lock.lock();
    }
    is_polling_ = now_nanoseconds() - last < kPollNanoseconds;
    if (is_polling_) continue;
    changed_.wait(lock, [&] { return leaves_ || is_thread_needed(); });
    is_polling_ = true;
    last = now_nanoseconds();
  }
}

}  // namespace tpk
