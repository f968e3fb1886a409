// Point-to-point messages between ranks that share memory: send and receive with tags. Torch-free.
//
// Every rank has one ring of bytes from each other rank, in the heap of its arena (Communicator::take_heaps), and a
// door: a counter that others raise when they have written to its rings or read from theirs. A message is a header of
// 16 bytes and the values.
//
// Order      messages of one pair and tag arrive in the order in which they were sent; receives with different tags may
//            be posted in any order. What comes before the message that a receive waits for is kept in memory of this
//            process. Where no receive waits, nothing is read: a sender of more than a ring holds waits, as over a
//            socket.
// Progress   whoever waits for a message moves bytes. A thread does it for messages for which nobody waits; it sleeps
//            while there are none.
// Errors     a lost rank fails the messages to and from it, a deadline the message itself. A receive of another size or
//            dtype than what was sent fails on the receiver.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "communication_thread.h"
#include "core/communicator.h"

namespace tpk {

class Mailboxes {
 public:
  static constexpr int kAnyRank = -1;

  struct Message {
    int peer;  // kAnyRank: the first that has sent with that tag
    int tag;
    uint32_t kind;  // of the values; must be the same on both sides
    char* at;
    size_t bytes;
    // Runs once, without locks, when `at` is no longer accessed. source: the rank that sent it.
    std::function<void(std::exception_ptr error, int source)> done;
    uint64_t posted = 0;  // when
  };

  // owner: of comm, whose heaps are zero at first. is_crowded: there are more ranks than cores.
  Mailboxes(Communicator& comm, std::shared_ptr<void> owner, Communicator::Heaps heaps, bool is_crowded);
  ~Mailboxes();
  Mailboxes(const Mailboxes&) = delete;
  Mailboxes& operator=(const Mailboxes&) = delete;

  void send(Message message);
  void receive(Message message);
  // Moves messages until is_done(), or until `limit` (of now_nanoseconds) has passed.
  void wait(const std::function<bool()>& is_done, uint64_t limit);
  // Fails what is under way, and every later message, with PeerLost. Afterwards the heaps are not accessed.
  void close(const std::string& why);

 private:
  struct Header {
    uint64_t bytes;
    int32_t tag;
    uint32_t kind;
  };
  struct Door;
  struct Ring;
  struct Sending {
    Message message;
    bool has_header = false;
    size_t moved = 0;
  };
  // A message that came before its receive.
  struct Parked {
    Header header;
    std::unique_ptr<char[]> values;
    bool is_complete = false;
    std::unique_ptr<Message> receive;  // posted while it came
  };
  struct Peer {
    Ring* to = nullptr;    // in the other rank's heap
    Ring* from = nullptr;  // in this rank's
    std::deque<Sending> sending;
    std::deque<std::shared_ptr<Parked>> parked;
    std::string broken;  // why nothing more can be sent: a message was given up half-way
    // The message that comes in now: into a receive, a parked message, or nowhere.
    bool is_reading = false;
    Header header{};
    size_t moved = 0;
    std::unique_ptr<Message> into;
    std::shared_ptr<Parked> parking;
  };

  // A thread that accesses this rank's door without the lock: `close` waits for it.
  class AtDoor;
  Door& door(int rank) const { return *reinterpret_cast<Door*>(heaps_.of_rank[static_cast<size_t>(rank)]); }
  Ring* ring(int owner, int from) const;
  char* memory(Ring* ring) const;
  void copy_in(Ring* ring, uint64_t position, const char* from, size_t bytes) const;
  void copy_out(Ring* ring, uint64_t position, char* to, size_t bytes) const;
  bool push(Peer& peer, int rank);
  bool pull(Peer& peer, int rank);
  bool begin_reading(Peer& peer, int rank);
  void end_reading(Peer& peer, int rank);
  bool is_waited_for(int rank) const;
  void deliver(Message message, const Header& header, const char* values, int source);
  std::exception_ptr mismatch(const Message& message, const Header& header, int source) const;
  std::string describe(const char* what, const Message& message) const;
  void ring_door(int rank) const;
  bool progress();  // whether anything has moved
  void look_for_trouble();
  template <class Why>
  void fail_of(int rank, const Why& why);
  void finish(Message&& message, std::exception_ptr error, int source);
  void run_finished(std::unique_lock<std::mutex>& lock);
  void sleep_once();
  void serve();
  bool is_thread_needed() const;
  void need_thread();

  const std::shared_ptr<void> owner_;
  Communicator& comm_;
  const Communicator::Heaps heaps_;
  const size_t capacity_;
  const bool is_crowded_;
  std::mutex mutex_;  // of what follows
  std::vector<Peer> peers_;
  std::list<Message> receives_;  // that no message has matched yet
  std::vector<std::function<void()>> finished_;
  std::string closed_;
  std::atomic<size_t> under_way_{0};
  std::atomic<int> at_door_{0};
  std::atomic<bool> is_closed_{false};

  std::mutex thread_mutex_;
  std::condition_variable changed_;
  std::atomic<int> waiting_{0};
  std::atomic<bool> is_polling_{false};  // the thread: it need not be woken
  bool leaves_ = false, has_thread_ = false;
  std::unique_ptr<CommunicationThread> thread_;
};

}  // namespace tpk
