// Emulated ranks with communicators, for tests of the host side: a host thread, a device and two streams for each.
#pragma once

#include <atomic>
#include <barrier>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>

#include "core/errors.h"
#include "cuda/comm/device_group.h"
#include "cuda/comm/peer_communicator.h"
#include "emu/control.h"
#include "expect.h"

namespace tpk::testing {

using cuda::DeviceCommunicator;
using cuda::DeviceScope;
using cuda::PeerCommunicator;
using cuda::StreamScope;

// Floats of a device, freed by emu::reset().
class Floats {
 public:
  explicit Floats(size_t n) : size_(n) {
    TPK_CUDA_CHECK(cudaMalloc(reinterpret_cast<void**>(&data_), std::max<size_t>(n, 1) * sizeof(float)));
  }
  Floats(size_t n, const std::function<float(size_t)>& value) : Floats(n) {
    for (size_t i = 0; i < n; ++i) data_[i] = value(i);
  }
  float* data() const { return data_; }
  size_t size() const { return size_; }
  float operator[](size_t i) const { return data_[i]; }

 private:
  float* data_ = nullptr;
  size_t size_;
};

inline void wait() { TPK_CUDA_CHECK(cudaStreamSynchronize(cuda::current_stream())); }

// What an op does on the caller's stream.
inline void copy_on_stream(const float* from, float* to, size_t n) {
  TPK_CUDA_CHECK(cudaMemcpyAsync(to, from, n * sizeof(float), cudaMemcpyDeviceToDevice, cuda::current_stream()));
}

inline cudaStream_t new_stream() {
  cudaStream_t stream = nullptr;
  TPK_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  return stream;
}

inline const Wire& sum_of_floats(Codec codec = Codec::None) { return wire_of(DType::F32, codec, ReduceOp::Sum); }

inline CallSpec spec_of(Op op, const Wire& wire, size_t numel, int64_t mine = 0) {
  return {op, wire.dtype, wire.op, wire.codec, numel, 0, mine};
}

constexpr size_t kSmallArena = size_t{256} << 10;  // slots of 32 KiB

inline void set_up(int ranks, uint64_t seed = 0, int resident_blocks = 16) {
  emu::Options options;
  options.ranks = ranks;
  options.resident_blocks = resident_blocks;
  options.seed = seed;
  emu::configure(options);
}

inline std::vector<std::unique_ptr<PeerCommunicator>> peers(int ranks, double timeout_s = 20.0,
                                                            size_t arena_bytes = kSmallArena) {
  std::vector<uintptr_t> arenas;
  for (int r = 0; r < ranks; ++r) {
    const DeviceScope scope(r);
    void* arena = nullptr;
    TPK_CUDA_CHECK(cudaMalloc(&arena, arena_bytes));
    std::memset(arena, 0, cuda::kSignalBytes);
    arenas.push_back(reinterpret_cast<uintptr_t>(arena));
  }
  std::vector<std::unique_ptr<PeerCommunicator>> all;
  for (int r = 0; r < ranks; ++r) {
    const DeviceScope scope(r);
    all.push_back(
        std::make_unique<PeerCommunicator>(concat("test/", r), "tp", r, ranks, timeout_s, r, arenas, arena_bytes, 0));
  }
  return all;
}

// An all-to-all between the threads of one process, as a process group would do it: in the order of the stream.
class ThreadExchange final : public DeviceExchange {
 public:
  struct Shared {
    explicit Shared(int ranks)
        : barrier(ranks), streams(ranks), sent(static_cast<size_t>(ranks)), specs(static_cast<size_t>(ranks)) {}
    struct Sent {
      const char* buffer;
      std::vector<size_t> bytes;
    };
    std::barrier<> barrier, streams;  // of the host threads, and of what streams do
    std::vector<Sent> sent;
    std::vector<std::vector<int64_t>> specs;
    std::atomic<int> times_agreed{0};
  };

  ThreadExchange(Shared& shared, int rank, size_t capacity, bool watched = false)
      : shared_(shared), rank_(rank), capacity_(capacity) {
    if (watched) marks_ = std::make_unique<cuda::PinnedMemory>(sizeof(cuda::ExchangeMarks));
    TPK_CUDA_CHECK(cudaMalloc(reinterpret_cast<void**>(&send_), capacity));
    TPK_CUDA_CHECK(cudaMalloc(reinterpret_cast<void**>(&receive_), capacity));
  }
  char* send_buffer() override { return send_; }
  const char* receive_buffer() override { return receive_; }
  size_t capacity() const override { return capacity_; }
  void start(const std::vector<size_t>& send_bytes, const std::vector<size_t>& receive_bytes) override {
    trips_.push_back({this, send_bytes, receive_bytes});  // kept: in a graph it is made again and again
    const auto run = [](void* trip) { static_cast<Trip*>(trip)->run(); };
    TPK_CUDA_CHECK(cudaLaunchHostFunc(cuda::current_stream(), run, &trips_.back()));
  }
  void wait(uint64_t) override {}
  void close(uint64_t) override {}
  std::vector<std::vector<int64_t>> agree(const std::vector<int64_t>& mine) override {
    shared_.specs[static_cast<size_t>(rank_)] = mine;
    if (rank_ == 0) ++shared_.times_agreed;
    sync_ranks();
    const std::vector<std::vector<int64_t>> all = shared_.specs;
    sync_ranks();
    return all;
  }
  void synchronise(uint64_t) override { wait_for_stream(); }
  void* marks() override { return marks_ == nullptr ? nullptr : marks_->on_host(); }
  void raise_given_up() override { throw TimeoutFailure("given up"); }

 private:
  struct Trip {
    ThreadExchange* exchange;
    std::vector<size_t> send_bytes, receive_bytes;
    void run() const { exchange->make_trip(send_bytes, receive_bytes); }
  };
  // In the thread of the stream.
  void make_trip(const std::vector<size_t>& send_bytes, const std::vector<size_t>& receive_bytes) {
    shared_.sent[static_cast<size_t>(rank_)] = {send_, send_bytes};
    shared_.streams.arrive_and_wait();
    char* to = receive_;
    for (size_t r = 0; r < shared_.sent.size(); ++r) {
      const Shared::Sent& theirs = shared_.sent[r];
      const size_t mine = static_cast<size_t>(rank_);
      EXPECT(theirs.bytes[mine] == receive_bytes[r], "sizes of the exchange differ: ", theirs.bytes[mine], " from ", r);
      const char* from = theirs.buffer;
      for (size_t q = 0; q < mine; ++q) from += theirs.bytes[q];
      std::memcpy(to, from, receive_bytes[r]);
      to += receive_bytes[r];
    }
    EXPECT(to <= receive_ + capacity_, "more than the buffer holds");
    shared_.streams.arrive_and_wait();
  }
  static void wait_for_stream() { TPK_CUDA_CHECK(cudaStreamSynchronize(cuda::current_stream())); }
  void sync_ranks() {
    shared_.barrier.arrive_and_wait();
    emu::host_threads_met();
  }

  Shared& shared_;
  const int rank_;
  const size_t capacity_;
  std::deque<Trip> trips_;
  std::unique_ptr<cuda::PinnedMemory> marks_;
  char *send_ = nullptr, *receive_ = nullptr;
};

// body(rank, communicator) on a stream of its own in a thread for each rank; then nothing may have been reported.
template <class Comm, class Body>
void on_ranks(const std::vector<std::unique_ptr<Comm>>& comms, Body&& body) {
  emu::run_ranks(static_cast<int>(comms.size()), [&](int rank) {
    const StreamScope scope(new_stream());
    body(rank, *comms[static_cast<size_t>(rank)]);
    static_cast<void>(cudaStreamSynchronize(cuda::current_stream()));
  });
  for (const emu::Report& report : emu::take_reports()) EXPECT(false, report.text);
}

// The text of the error of type Error that body raises.
template <class Error, class Body>
std::string error_of(Body&& body) {
  try {
    body();
  } catch (const Error& error) {
    return error.what();
  }
  EXPECT(false, "no error came");
  return "";
}

}  // namespace tpk::testing
