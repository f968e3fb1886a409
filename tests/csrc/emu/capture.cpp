#include "capture.h"

#include <algorithm>
#include <utility>

#include "stream.h"

namespace tpk::emu {
namespace {

// Under mutex(): captures that have begun and have not ended.
std::vector<std::shared_ptr<Capture>>& captures() {
  static auto* const all = new std::vector<std::shared_ptr<Capture>>;
  return *all;
}

uint64_t last_capture_id = 0;
thread_local cudaStreamCaptureMode mode_of_thread = cudaStreamCaptureModeGlobal;

bool is_blocking(const Stream& stream) { return (stream.flags & cudaStreamNonBlocking) == 0; }
bool is_default(const Stream& stream) { return &stream == stream.device->default_stream; }

// Of the legacy stream, which waits for the blocking streams of its device: those that are captured. Invalid ones too.
std::vector<Capture*> in_the_way_of(const Stream& legacy) {
  std::vector<Capture*> found;
  for (const auto& capture : captures()) {
    const auto blocks = [&](Stream* stream) { return stream->device == legacy.device && is_blocking(*stream); };
    if (std::any_of(capture->streams.begin(), capture->streams.end(), blocks)) found.push_back(capture.get());
  }
  return found;
}

cudaError_t invalidate(Capture& capture, cudaError_t why) {
  capture.valid = false;
  return why;
}

// A node comes after earlier ones only, so that one look at each is enough, from the last to the first.
bool is_joined(const Capture& capture) {
  Nodes reached = capture.origin->tail;
  for (size_t node = capture.nodes.size(); node-- > 0;) {
    if (reached.count(node) == 0) return false;
    reached.insert(capture.nodes[node].after.begin(), capture.nodes[node].after.end());
  }
  return true;
}

void end(const std::shared_ptr<Capture>& capture) {
  capture->ended = true;
  for (Stream* stream : capture->streams) {
    stream->capture = nullptr;
    stream->tail.clear();
  }
  capture->streams.clear();
  captures().erase(std::find(captures().begin(), captures().end(), capture));
}

}  // namespace

void add_node(Stream& stream, std::function<void(Stream&)> run) {
  Capture& capture = *stream.capture;
  capture.nodes.push_back({std::move(run), stream.device, stream.priority, stream.tail});
  stream.tail = {capture.nodes.size() - 1};
}

void leave_capture(Stream& stream) {
  const std::shared_ptr<Capture> capture = stream.capture;
  if (capture == nullptr) return;
  capture->valid = false;
  if (capture->origin == &stream) return end(capture);
  capture->streams.erase(&stream);
  stream.capture = nullptr;
}

bool record_in_capture(Stream& stream, Event& event) {
  const std::lock_guard lock(mutex());
  event.capture = stream.capture;
  event.tail = stream.tail;
  if (stream.capture != nullptr) event.last = nullptr;
  return stream.capture != nullptr;
}

void abandon_captures() {
  const std::lock_guard lock(mutex());
  while (!captures().empty()) {
    const std::shared_ptr<Capture> capture = captures().back();
    end(capture);
  }
}

cudaError_t obstacle_to_enqueueing(Stream& stream) {
  const std::lock_guard lock(mutex());
  if (stream.capture != nullptr) return stream.capture->valid ? cudaSuccess : cudaErrorStreamCaptureInvalidated;
  if (!is_default(stream)) return cudaSuccess;
  const std::vector<Capture*> found = in_the_way_of(stream);
  for (Capture* capture : found) capture->valid = false;
  return found.empty() ? cudaSuccess : cudaErrorStreamCaptureImplicit;
}

cudaError_t obstacle_to_waiting_for(Stream& stream) {
  {
    const std::lock_guard lock(mutex());
    if (stream.capture != nullptr) return invalidate(*stream.capture, cudaErrorStreamCaptureUnsupported);
  }
  const cudaError_t error = obstacle_to_enqueueing(stream);
  return error != cudaSuccess ? error : obstacle_to_unsafe_calls();
}

cudaError_t obstacle_to_waiting_for(const Event& event) {
  {
    const std::lock_guard lock(mutex());
    if (event.capture != nullptr) return invalidate(*event.capture, cudaErrorCapturedEvent);
  }
  return obstacle_to_unsafe_calls();
}

cudaError_t obstacle_to_waiting_for(Device& device) {
  const std::lock_guard lock(mutex());
  cudaError_t error = cudaSuccess;
  for (Stream* stream : device.streams) {
    if (stream->capture != nullptr) error = invalidate(*stream->capture, cudaErrorStreamCaptureUnsupported);
  }
  return error;
}

cudaError_t obstacle_to_unsafe_calls() {
  const std::lock_guard lock(mutex());
  cudaError_t error = cudaSuccess;
  for (const auto& capture : captures()) {
    const bool here = capture->thread == std::this_thread::get_id();
    const bool forbids =
        mode_of_thread != cudaStreamCaptureModeRelaxed &&
        (here ? capture->mode != cudaStreamCaptureModeRelaxed
              : capture->mode == cudaStreamCaptureModeGlobal && mode_of_thread == cudaStreamCaptureModeGlobal);
    if (forbids) error = invalidate(*capture, cudaErrorStreamCaptureUnsupported);
  }
  return error;
}

cudaError_t wait_in_capture(Stream& stream, const Event& event, bool& handled) {
  const std::lock_guard lock(mutex());
  handled = stream.capture != nullptr || event.capture != nullptr;
  if (!handled) return cudaSuccess;
  if (event.capture == nullptr) {
    return event.last == nullptr ? cudaSuccess : invalidate(*stream.capture, cudaErrorStreamCaptureIsolation);
  }
  if (event.capture->ended) {
    if (stream.capture != nullptr) invalidate(*stream.capture, cudaErrorCapturedEvent);
    return cudaErrorCapturedEvent;
  }
  if (!event.capture->valid) return cudaErrorStreamCaptureInvalidated;
  if (is_default(stream)) return invalidate(*event.capture, cudaErrorStreamCaptureImplicit);
  if (stream.capture != nullptr && stream.capture != event.capture) {
    invalidate(*stream.capture, cudaErrorStreamCaptureMerge);
    return invalidate(*event.capture, cudaErrorStreamCaptureMerge);
  }
  stream.capture = event.capture;
  event.capture->streams.insert(&stream);
  stream.tail.insert(event.tail.begin(), event.tail.end());
  return cudaSuccess;
}

cudaError_t begin_capture(Stream& stream, cudaStreamCaptureMode mode) {
  const std::lock_guard lock(mutex());
  if (is_default(stream)) return cudaErrorStreamCaptureUnsupported;
  if (stream.capture != nullptr) return cudaErrorIllegalState;
  auto capture = std::make_shared<Capture>();
  capture->id = ++last_capture_id, capture->origin = &stream, capture->mode = mode;
  capture->thread = std::this_thread::get_id();
  capture->streams.insert(&stream);
  stream.capture = capture;
  captures().push_back(capture);
  return cudaSuccess;
}

cudaError_t end_capture(Stream& stream, std::vector<Node>& nodes) {
  const std::lock_guard lock(mutex());
  const std::shared_ptr<Capture> capture = stream.capture;
  if (capture == nullptr) return cudaErrorIllegalState;
  if (capture->origin != &stream) return invalidate(*capture, cudaErrorStreamCaptureUnmatched);
  if (capture->mode != cudaStreamCaptureModeRelaxed && capture->thread != std::this_thread::get_id()) {
    return cudaErrorStreamCaptureWrongThread;
  }
  const cudaError_t error = !capture->valid        ? cudaErrorStreamCaptureInvalidated
                            : !is_joined(*capture) ? cudaErrorStreamCaptureUnjoined
                                                   : cudaSuccess;
  if (error == cudaSuccess) nodes = std::move(capture->nodes);
  end(capture);
  return error;
}

cudaError_t capture_state(const Stream& stream, cudaStreamCaptureStatus& status, uint64_t& id) {
  const std::lock_guard lock(mutex());
  status = cudaStreamCaptureStatusNone;
  id = 0;
  if (is_default(stream) && !in_the_way_of(stream).empty()) return cudaErrorStreamCaptureImplicit;
  if (stream.capture == nullptr) return cudaSuccess;
  status = stream.capture->valid ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusInvalidated;
  id = stream.capture->valid ? stream.capture->id : 0;
  return cudaSuccess;
}

cudaStreamCaptureMode exchange_mode(cudaStreamCaptureMode mode) { return std::exchange(mode_of_thread, mode); }

}  // namespace tpk::emu
