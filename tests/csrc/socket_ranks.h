// Ranks that are threads of one test, connected by pairs of sockets in place of a network.
#pragma once

#include <sys/socket.h>

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "core/errors.h"
#include "cpu/transport/socket_transport.h"
#include "expect.h"
#include "rank_threads.h"

namespace tpk {

constexpr size_t kCapacity = size_t{1} << 16;

// What a rank asked its watch, which knows nothing but what it is asked.
struct Asked {
  std::atomic<int> looks{0}, late{0}, ended{0};
  std::atomic<uint64_t> left_at{0};
};

class TestWatch final : public SocketExchange::Watch {
 public:
  explicit TestWatch(Asked& asked) : asked_(asked) {}
  void look(uint64_t, bool late, bool ended, const std::string& what) override {
    ++asked_.looks;
    if (late) ++asked_.late;
    if (ended) ++asked_.ended;
    if (late) throw TimeoutFailure("late: " + what);
    if (ended) throw PeerLost("ended: " + what);
  }
  void leave(uint64_t last_call) noexcept override { asked_.left_at = last_call; }

 private:
  Asked& asked_;
};

// sockets[r][q]: the end at rank r of the connection to rank q.
inline std::vector<std::vector<int>> connected(size_t world_size) {
  std::vector<std::vector<int>> sockets(world_size, std::vector<int>(world_size, -1));
  for (size_t r = 0; r < world_size; ++r) {
    for (size_t q = 0; q < r; ++q) {
      int ends[2];
      EXPECT(socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0);
      sockets[r][q] = ends[0];
      sockets[q][r] = ends[1];
    }
  }
  return sockets;
}

// Runs body(comm) and closes it, whatever the body throws.
inline void run_and_leave(Communicator& comm, const std::function<void(Communicator&)>& body) {
  try {
    body(comm);
  } catch (...) {
    comm.close();
    throw;
  }
  comm.close();
}

// Runs body(communicator) once for each rank, each in a thread; a rank whose body has ended leaves the group.
template <class Comm = SocketCommunicator>
void with_ranks(int world_size, std::vector<Asked>& asked, const std::function<void(Communicator&)>& body,
                double timeout_s = 20.0) {
  const size_t ranks = static_cast<size_t>(world_size);
  const std::vector<std::vector<int>> sockets = connected(ranks);
  each_in_a_thread(ranks, [&](size_t r) {
    Comm comm("test", "test", static_cast<int>(r), world_size, timeout_s,
              std::make_unique<SocketExchange>(sockets[r], static_cast<int>(r), kCapacity, timeout_s,
                                               std::make_unique<TestWatch>(asked[r])));
    run_and_leave(comm, body);
  });
}

}  // namespace tpk
