// What transport `group` is built on: an exchange in which every rank sends bytes to every other one. Torch-free.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace tpk {

// Bytes to and from every rank, in rank order, through two buffers of `capacity` bytes.
class Exchange {
 public:
  virtual ~Exchange() = default;
  virtual char* send_buffer() = 0;
  virtual const char* receive_buffer() = 0;
  virtual size_t capacity() const = 0;
  virtual void start(const std::vector<size_t>& send_bytes, const std::vector<size_t>& receive_bytes) = 0;
  // Throws TimeoutFailure or PeerLost.
  virtual void wait(uint64_t call) = 0;
  // Announces to the other ranks that that call is the last of this rank; never throws.
  virtual void close(uint64_t last_call) = 0;
};

// The same between buffers on a device: start and wait enqueue on this thread's stream; the host waits for nothing.
class DeviceExchange : public Exchange {
 public:
  // `mine` of every rank, in rank order, over the host. Throws TimeoutFailure or PeerLost.
  virtual std::vector<std::vector<int64_t>> agree(const std::vector<int64_t>& mine) = 0;
  // The host waits for the stream; throws as wait does on the CPU.
  virtual void synchronise(uint64_t call) = 0;
  // Pinned memory for ExchangeMarks (cuda/kernels/kernels.h), zero at first, which the owner polls; or nullptr.
  virtual void* marks() { return nullptr; }
  // Throws the reason for which an exchange was given up; called when ExchangeMarks::given_up is set.
  virtual void raise_given_up() {}
};

}  // namespace tpk
