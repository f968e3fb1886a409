// Capture into graphs: what is enqueued on a stream that takes part in a capture becomes a node, and nothing runs.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <set>
#include <thread>
#include <vector>

#include <cuda_runtime_api.h>

namespace tpk::emu {

struct Device;
struct Event;
struct Stream;

using Nodes = std::set<size_t>;

struct Node {
  std::function<void(Stream&)> run;
  Device* device;
  int priority;
  Nodes after;  // all of them were captured earlier
};

struct Capture {
  uint64_t id;
  Stream* origin;
  cudaStreamCaptureMode mode;
  std::thread::id thread;
  bool valid = true;
  bool ended = false;
  std::set<Stream*> streams;  // that take part
  std::vector<Node> nodes;
};

// Under mutex(): the next node of a stream that takes part in a capture.
void add_node(Stream& stream, std::function<void(Stream&)> run);
// Under mutex(): the stream goes away; the capture that it takes part in is invalid.
void leave_capture(Stream& stream);
// The marks of an event that is recorded now. False when the stream takes part in no capture.
bool record_in_capture(Stream& stream, Event& event);
// Forgets what was not ended.
void abandon_captures();
// Under mutex(): whether one that is ready to be launched is left.
bool has_graphs();

// What stands against a call before it does anything; what is refused makes the capture invalid, as in CUDA.
cudaError_t obstacle_to_enqueueing(Stream& stream);
cudaError_t obstacle_to_waiting_for(Stream& stream);  // also to asking whether it is done
cudaError_t obstacle_to_waiting_for(const Event& event);
cudaError_t obstacle_to_waiting_for(Device& device);
// Of calls that no capture sees and that might wait for what is captured: allocations, for example.
cudaError_t obstacle_to_unsafe_calls();
// The stream goes on after a captured event, and may join its capture by that. `handled` is false when neither the
// stream nor the event takes part in one.
cudaError_t wait_in_capture(Stream& stream, const Event& event, bool& handled);

// What the functions of the run time API do.
cudaError_t begin_capture(Stream& stream, cudaStreamCaptureMode mode);
cudaError_t end_capture(Stream& stream, std::vector<Node>& nodes);
// id: 0 unless the capture is active.
cudaError_t capture_state(const Stream& stream, cudaStreamCaptureStatus& status, uint64_t& id);
cudaStreamCaptureMode exchange_mode(cudaStreamCaptureMode mode);  // of this thread

}  // namespace tpk::emu
