// What transport `group` is built on: an exchange in which every rank sends bytes to every other one. Torch-free.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <vector>

namespace tpk {

struct Outgoing {
  const char* from;
  size_t bytes;
};
struct Incoming {
  char* to;
  size_t bytes;
};

// Bytes to and from every rank, in rank order, through two buffers of `capacity` bytes.
class Exchange {
 public:
  virtual ~Exchange() = default;
  virtual char* send_buffer() = 0;
  virtual const char* receive_buffer() = 0;
  virtual size_t capacity() const = 0;
  virtual void start(const std::vector<size_t>& send_bytes, const std::vector<size_t>& receive_bytes) = 0;
  // Where it takes any memory: the same between that of the caller, without a part for this rank itself. After an error
  // of `wait` nobody touches it any more.
  virtual bool takes_any_memory() const { return false; }
  virtual void start_between(const std::vector<Outgoing>&, const std::vector<Incoming>&) {
    throw std::logic_error("this exchange goes through its buffers");
  }
  // Throws TimeoutFailure or PeerLost.
  virtual void wait(uint64_t call) = 0;
  // Tells the others that this rank leaves after that call; never throws.
  virtual void close(uint64_t last_call) = 0;
};

// The same between buffers on a device: start and wait enqueue on this thread's stream, nothing waits but streams.
class DeviceExchange : public Exchange {
 public:
  // `mine` of every rank, in rank order, over the host. Throws TimeoutFailure or PeerLost.
  virtual std::vector<std::vector<int64_t>> agree(const std::vector<int64_t>& mine) = 0;
  // The host waits until the stream has done what was asked of it; throws as wait does on the CPU.
  virtual void synchronise(uint64_t call) = 0;
  // Pinned memory for a Travel (cuda/kernels/kernels.h), zero at first, which somebody watches; or nullptr.
  virtual void* travel() { return nullptr; }
  // Throws why an exchange was given up, if one was; asked when the Travel says so.
  virtual void raise_given_up() {}
};

}  // namespace tpk
