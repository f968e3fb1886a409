// Streams and events: one OS thread for each stream, which takes the operations in the order in which they came.
#pragma once

#include <chrono>
#include <deque>
#include <functional>
#include <thread>

#include "capture.h"
#include "device.h"

namespace tpk::emu {

// One recording of an event. The members are written once, under mutex().
struct Marker {
  bool done = false;
  std::chrono::steady_clock::time_point time;
  Snapshot clock;
};

struct Event {
  Device* device;
  unsigned flags;
  std::shared_ptr<Marker> last;  // nullptr: never recorded, or in a capture
  // Under mutex(): recorded in a capture, behind these nodes.
  std::shared_ptr<Capture> capture;
  Nodes tail;
};

inline std::atomic<size_t> live_events{0};

struct Stream {
  Device* device = nullptr;
  unsigned flags = 0;
  int priority = 0;
  uint64_t launches = 0;
  // The race detector's: what the stream knows, the ids of its threads, the last moment of any of them.
  Clock clock;
  std::vector<uint32_t> ids;
  uint32_t last_moment = 0;
  // Under mutex(): the capture that it takes part in, and the nodes that its next one comes after.
  std::shared_ptr<Capture> capture;
  Nodes tail;
  // Under mutex().
  std::deque<std::function<void(Stream&)>> queue;
  bool busy = false;
  bool closed = false;  // destroyed: ends when the queue is empty
  std::thread thread;
};

// What a host thread knows and where it is.
struct HostThread {
  int device = 0;
  cudaError_t last_error = cudaSuccess;
  Clock clock;
  uint64_t resets = 0;  // when it began
};
HostThread& host_thread();

Stream* make_stream(Device& device, unsigned flags, int priority);
// The stream behind a handle, the device's default stream for nullptr; nullptr when there is no such stream.
Stream* stream_of(cudaStream_t handle);
void close_stream(Stream* stream);

// Enqueues with what the host thread knows. `run` is skipped when the device has failed. In a capture it becomes a
// node.
void enqueue(Stream& stream, std::function<void(Stream&)> run);
std::shared_ptr<Marker> record(Stream& stream);
void wait_for(Stream& stream, std::shared_ptr<Marker> marker);
// The host thread waits, and knows afterwards what the stream knew.
void synchronize(const std::shared_ptr<Marker>& marker);
void synchronize(Device& device);
uint64_t finished_ops();

}  // namespace tpk::emu
