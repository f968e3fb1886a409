// Messages between ranks that share memory, with threads for ranks: order, tags, sizes around a ring, and what ends
// them.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <numeric>
#include <string>

#include "core/errors.h"
#include "cpu/transport/mailboxes.h"
#include "cpu/transport/shm.h"
#include "expect.h"
#include "rank_threads.h"

using namespace tpk;

namespace {

constexpr size_t kArenaBytes = size_t{1} << 20;
constexpr uint64_t kForever = ~uint64_t{0};

// How a message ended.
struct End {
  std::atomic<bool> is_here{false};
  std::string error;
  int source = -1;
};

class Rank {
 public:
  Rank(int rank, int world_size, int fd, double timeout_s, bool is_crowded)
      : comm_(std::make_shared<ShmCommunicator>("test", "test", rank, world_size, timeout_s, fd, kArenaBytes,
                                                std::vector<int>(static_cast<size_t>(world_size), getpid()), 64)),
        boxes_(*comm_, comm_, comm_->take_heaps(), is_crowded) {}

  int rank() const { return comm_->rank(); }
  int world_size() const { return comm_->world_size(); }
  Mailboxes& boxes() { return boxes_; }
  ShmCommunicator& communicator() { return *comm_; }
  std::shared_ptr<End> send(int to, int tag, std::vector<char>& values, uint32_t kind = 0) {
    return post(&Mailboxes::send, to, tag, values, kind);
  }
  std::shared_ptr<End> receive(int from, int tag, std::vector<char>& values, uint32_t kind = 0) {
    return post(&Mailboxes::receive, from, tag, values, kind);
  }
  // The mailboxes first: the communicator unmaps their memory.
  void leave() {
    boxes_.close("this rank leaves");
    comm_->close();
  }
  void wait(const std::shared_ptr<End>& end) {
    boxes_.wait([&] { return end->is_here.load(); }, kForever);
  }

 private:
  std::shared_ptr<End> post(void (Mailboxes::*way)(Mailboxes::Message), int peer, int tag, std::vector<char>& values,
                            uint32_t kind) {
    const auto end = std::make_shared<End>();
    const auto done = [end](std::exception_ptr error, int source) {
      end->source = source;
      try {
        if (error) std::rethrow_exception(error);
      } catch (const std::exception& what) {
        end->error = what.what();
      }
      end->is_here = true;
    };
    (boxes_.*way)({peer, tag, kind, values.data(), values.size(), done});
    return end;
  }

  const std::shared_ptr<ShmCommunicator> comm_;
  Mailboxes boxes_;
};

void with_ranks(int world_size, const std::function<void(Rank&)>& body, double timeout_s = 20.0,
                bool is_crowded = false) {
  const int fd = memfd_create("test", 0);
  EXPECT(ftruncate(fd, static_cast<off_t>(kArenaBytes) * world_size) == 0);
  std::vector<std::unique_ptr<Rank>> ranks;
  for (int r = 0; r < world_size; ++r)
    ranks.push_back(std::make_unique<Rank>(r, world_size, fd, timeout_s, is_crowded));
  close(fd);
  each_in_a_thread(ranks.size(), [&](size_t r) {
    try {
      body(*ranks[r]);
    } catch (...) {
      ranks[r]->leave();  // the others need not wait for the deadline
      throw;
    }
  });
}

std::vector<char> bytes_of(int sender, int tag, size_t n) {
  std::mt19937 random(static_cast<uint32_t>(1000 * sender + tag));
  std::vector<char> bytes(n);
  for (char& byte : bytes) byte = static_cast<char>(random());
  return bytes;
}

// Sizes around a header, a step and a ring: the ring's end is passed at every alignment.
std::vector<size_t> sizes() {
  std::vector<size_t> all{0, 1, 15, 16, 17, 32767, 32768, 32769, 100001, 262143, 262144, 262145, 700001};
  for (size_t i = 0; i < 40; ++i) all.push_back(i * 7919 % 50000);
  return all;
}

// Everybody sends to everybody; receives are posted before, after and in another order than the messages.
void all_to_all(int world_size, bool is_crowded) {
  with_ranks(
      world_size,
      [](Rank& mine) {
        std::vector<std::vector<char>> kept;
        kept.reserve(1000);
        std::vector<std::shared_ptr<End>> ends;
        struct Expected {
          std::vector<char> values;
          int from, tag;
          std::shared_ptr<End> end;
        };
        std::vector<std::unique_ptr<Expected>> expected;
        const std::vector<size_t> all = sizes();
        const auto post_receives = [&](size_t parity) {
          for (size_t i = all.size(); i-- > 0;) {
            if (i % 2 != parity) continue;
            for (int r = 0; r < mine.world_size(); ++r) {
              if (r == mine.rank()) continue;
              expected.push_back(std::make_unique<Expected>(
                  Expected{std::vector<char>(all[i], 'x'), r, static_cast<int>(i), nullptr}));
              Expected& one = *expected.back();
              one.end = mine.receive(r, one.tag, one.values);
            }
          }
        };
        post_receives(0);
        for (size_t i = 0; i < all.size(); ++i) {
          for (int r = 0; r < mine.world_size(); ++r) {
            if (r == mine.rank()) continue;
            kept.push_back(bytes_of(mine.rank(), static_cast<int>(i), all[i]));
            ends.push_back(mine.send(r, static_cast<int>(i), kept.back()));
          }
        }
        post_receives(1);
        for (const auto& end : ends) mine.wait(end), EXPECT(end->error.empty(), end->error);
        for (const auto& one : expected) {
          mine.wait(one->end);
          EXPECT(one->end->error.empty(), one->end->error);
          EXPECT(one->end->source == one->from);
          EXPECT(one->values == bytes_of(one->from, one->tag, one->values.size()), "tag ", one->tag, " of rank ",
                 one->from);
        }
      },
      20.0, is_crowded);
}

CASE(messages_of_every_size_arrive_as_they_were_sent) {
  for (int world_size : {2, 3, 5}) {
    for (bool is_crowded : {false, true}) all_to_all(world_size, is_crowded);
  }
}

CASE(messages_of_one_tag_arrive_in_order_and_others_may_pass_them) {
  with_ranks(2, [](Rank& mine) {
    constexpr int kMany = 300;
    std::vector<std::vector<char>> values(kMany + 1);
    std::vector<std::shared_ptr<End>> ends;
    if (mine.rank() == 0) {
      for (int i = 0; i < kMany; ++i) {
        values[static_cast<size_t>(i)].assign(static_cast<size_t>(i), static_cast<char>(i));
        ends.push_back(mine.send(1, 7, values[static_cast<size_t>(i)]));
      }
      values[kMany].assign(5, 'y');
      ends.push_back(mine.send(1, 8, values[kMany]));
    } else {
      values[kMany].resize(5);
      ends.push_back(mine.receive(0, 8, values[kMany]));  // what was sent before it is kept
      mine.wait(ends[0]);
      EXPECT(values[kMany] == std::vector<char>(5, 'y'));
      for (int i = 0; i < kMany; ++i) {
        values[static_cast<size_t>(i)].resize(static_cast<size_t>(i));
        ends.push_back(mine.receive(0, 7, values[static_cast<size_t>(i)]));
      }
    }
    for (const auto& end : ends) mine.wait(end), EXPECT(end->error.empty(), end->error);
    if (mine.rank() == 0) return;
    for (int i = 0; i < kMany; ++i) {
      EXPECT(values[static_cast<size_t>(i)] == std::vector<char>(static_cast<size_t>(i), static_cast<char>(i)));
    }
  });
}

CASE(a_receive_from_any_rank_takes_one_of_its_tag_and_names_the_sender) {
  with_ranks(4, [](Rank& mine) {
    std::vector<char> one(1, static_cast<char>(mine.rank())), other(1, 'o');
    if (mine.rank() != 0) {
      const auto first = mine.send(0, 1, other), second = mine.send(0, 2, one);
      mine.wait(first), mine.wait(second);
      return;
    }
    std::vector<int> senders;
    for (int tag : {2, 1}) {
      for (int i = 1; i < mine.world_size(); ++i) {
        const auto end = mine.receive(Mailboxes::kAnyRank, tag, one);
        mine.wait(end);
        EXPECT(end->error.empty(), end->error);
        EXPECT(one[0] == (tag == 2 ? static_cast<char>(end->source) : 'o'));
        senders.push_back(end->source);
      }
    }
    std::sort(senders.begin(), senders.end());
    EXPECT(senders == (std::vector<int>{1, 1, 2, 2, 3, 3}));
  });
}

// Nobody waits: the thread of the group moves them.
CASE(messages_move_while_nobody_waits_for_them) {
  with_ranks(2, [](Rank& mine) {
    std::vector<char> out = bytes_of(mine.rank(), 0, 900001), in(out.size());
    const auto sent = mine.send(1 - mine.rank(), 0, out), received = mine.receive(1 - mine.rank(), 0, in);
    while (!sent->is_here || !received->is_here) std::this_thread::yield();
    EXPECT(in == bytes_of(1 - mine.rank(), 0, in.size()));
  });
}

CASE(another_size_or_kind_fails_on_the_receiver_alone_and_is_dropped) {
  with_ranks(2, [](Rank& mine) {
    std::vector<char> large(300000, 'a'), small(3, 'b'), last(2, 'c');
    if (mine.rank() == 0) {
      for (const auto& end : {mine.send(1, 0, large), mine.send(1, 0, small, 9), mine.send(1, 0, last)}) {
        mine.wait(end);
        EXPECT(end->error.empty(), end->error);
      }
      return;
    }
    std::vector<char> got(3, 'x');
    for (const char* what : {"another size", "another dtype"}) {
      const auto end = mine.receive(0, 0, got);
      mine.wait(end);
      EXPECT(end->error.find(what) != std::string::npos, end->error);
      EXPECT(got == std::vector<char>(3, 'x'));
    }
    std::vector<char> rest(2);
    mine.wait(mine.receive(0, 0, rest));
    EXPECT(rest == last);
  });
}

CASE(a_late_rank_ends_a_message_and_what_was_half_sent_ends_the_way) {
  std::atomic<bool> is_over{false};
  with_ranks(
      2,
      [&](Rank& mine) {
        while (mine.rank() == 1 && !is_over) std::this_thread::yield();  // takes part in nothing
        if (mine.rank() == 1) return;
        struct Over {
          std::atomic<bool>& flag;
          ~Over() { flag = true; }
        } over{is_over};
        std::vector<char> large(900001), small(1);
        const auto received = mine.receive(1, 0, small), sent = mine.send(1, 0, large);
        mine.wait(received), mine.wait(sent);
        EXPECT(received->error.find("recv from rank 1 (tag 0, 1 bytes)") == 0, received->error);
        EXPECT(sent->error.find("did not do its part within 0.2 s") != std::string::npos, sent->error);
        bool refused = false;
        try {
          mine.send(1, 0, small);
        } catch (const PeerLost& error) {
          refused = std::string(error.what()).find("half-way") != std::string::npos;
        }
        EXPECT(refused);
      },
      0.2);
}

CASE(a_rank_that_leaves_ends_what_is_under_way_after_what_it_had_sent) {
  with_ranks(3, [](Rank& mine) {
    std::vector<char> last(5, 'z'), never(4);
    if (mine.rank() == 1) {
      mine.wait(mine.send(0, 3, last));
      return mine.leave();
    }
    if (mine.rank() == 2) return;
    const auto pending = mine.receive(1, 4, never);
    mine.wait(pending);
    EXPECT(pending->error.find("rank 1 closed the group") != std::string::npos, pending->error);
    std::vector<char> got(5);
    const auto sent_before = mine.receive(1, 3, got);
    mine.wait(sent_before);
    EXPECT(sent_before->error.empty() && got == last, sent_before->error);
  });
}

CASE(closing_ends_every_message_of_this_rank_and_refuses_later_ones) {
  with_ranks(3, [](Rank& mine) {
    std::vector<char> in(4), out(900001);
    const int next = (mine.rank() + 1) % 3;  // which waits for another one, and reads nothing of this rank
    const auto received = mine.receive(next, 0, in), sent = mine.send(next, 1, out);
    mine.communicator().exchange(Op::Barrier, 0);
    mine.boxes().close("this rank leaves");
    EXPECT(received->is_here && received->error.find("this rank leaves") != std::string::npos, received->error);
    EXPECT(sent->is_here && sent->error.find("this rank leaves") != std::string::npos, sent->error);
    bool refused = false;
    try {
      mine.receive(next, 0, in);
    } catch (const PeerLost&) {
      refused = true;
    }
    EXPECT(refused);
  });
}

}  // namespace
