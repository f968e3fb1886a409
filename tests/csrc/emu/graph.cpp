// Graphs: what was captured, made ready once and launched as often as one likes. Nodes that nothing orders run at once.
#include <algorithm>
#include <condition_variable>
#include <map>

#include "detector.h"
#include "runtime.h"

namespace tpk::emu {
namespace {

struct Graph {
  std::vector<Node> nodes;
};

// A graph made ready. Its launches run one after the other, on whatever streams.
struct Exec {
  std::vector<Node> nodes;
  std::vector<std::unique_ptr<Stream>> streams;  // one for each node: what the node knows, and the ids of its threads
  // Nodes of a lane are a chain; a thread runs each lane.
  std::vector<std::vector<size_t>> lanes;
  std::shared_ptr<Marker> last;  // of the last launch
};

// Under mutex(): handles that are valid. What is under way may outlive its handle.
struct Handles {
  std::map<cudaGraph_t, std::unique_ptr<Graph>> graphs;
  std::map<cudaGraphExec_t, std::shared_ptr<Exec>> execs;
};
Handles& handles() {
  static auto* const all = new Handles;
  return *all;
}

Graph* graph_of(cudaGraph_t handle) {
  const auto found = handles().graphs.find(handle);
  return found == handles().graphs.end() ? nullptr : found->second.get();
}

std::shared_ptr<Exec> make_ready(const Graph& graph) {
  auto exec = std::make_shared<Exec>();
  exec->nodes = graph.nodes;
  for (size_t i = 0; i < exec->nodes.size(); ++i) {
    const Node& node = exec->nodes[i];
    auto stream = std::make_unique<Stream>();
    stream->device = node.device, stream->priority = node.priority;
    const std::string name = "a graph's node of rank " + std::to_string(node.device->rank);
    if (detector() != nullptr) stream->clock.id = detector()->new_id(name);
    exec->streams.push_back(std::move(stream));
    const auto continued = std::find_if(exec->lanes.begin(), exec->lanes.end(),
                                        [&](const auto& lane) { return node.after.count(lane.back()) != 0; });
    if (continued != exec->lanes.end()) {
      continued->push_back(i);
    } else {
      exec->lanes.push_back({i});
    }
  }
  return exec;
}

// One launch of a graph, run by the thread of a stream.
class Replay {
 public:
  Replay(Exec& exec, Stream& self) : exec_(exec), self_(self), done_(exec.nodes.size()), ends_(exec.nodes.size()) {}

  void run() {
    if (detector() != nullptr) start_ = self_.clock.snapshot();
    std::vector<std::thread> threads;
    for (size_t i = 1; i < exec_.lanes.size(); ++i) threads.emplace_back([this, i] { run_lane(exec_.lanes[i]); });
    if (!exec_.lanes.empty()) run_lane(exec_.lanes.front());
    for (std::thread& thread : threads) thread.join();
    for (const Snapshot& end : ends_) {
      if (detector() != nullptr) self_.clock.join(end);
    }
  }

 private:
  void run_lane(const std::vector<size_t>& lane) {
    for (size_t node : lane) {
      Stream& stream = *exec_.streams[node];
      const Nodes& after = exec_.nodes[node].after;
      {
        std::unique_lock lock(mutex_);
        changed_.wait(lock,
                      [&] { return std::all_of(after.begin(), after.end(), [&](size_t i) { return done_[i]; }); });
        if (detector() != nullptr) {
          stream.clock.join(start_);
          for (size_t i : after) stream.clock.join(ends_[i]);
        }
      }
      if (stream.device->error.load() == cudaSuccess) exec_.nodes[node].run(stream);
      const std::lock_guard lock(mutex_);
      if (detector() != nullptr) {
        ends_[node] = stream.clock.snapshot();
        stream.clock.tick();
      }
      done_[node] = true;
      changed_.notify_all();
    }
  }

  Exec& exec_;
  Stream& self_;
  Snapshot start_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<bool> done_;
  std::vector<Snapshot> ends_;
};

}  // namespace

bool has_graphs() { return !handles().execs.empty(); }

}  // namespace tpk::emu

using namespace tpk::emu;

extern "C" {

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  Stream* const stream = stream_of(handle);
  return failed(stream == nullptr ? cudaErrorInvalidResourceHandle : begin_capture(*stream, mode));
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  *graph = nullptr;
  Stream* const stream = stream_of(handle);
  if (stream == nullptr) return failed(cudaErrorInvalidResourceHandle);
  auto made = std::make_unique<Graph>();
  if (const cudaError_t error = end_capture(*stream, made->nodes); error != cudaSuccess) return failed(error);
  const std::lock_guard lock(mutex());
  *graph = reinterpret_cast<cudaGraph_t>(made.get());
  handles().graphs[*graph] = std::move(made);
  return outcome();
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges,
                                     size_t* num_nodes) {
  Stream* const stream = stream_of(handle);
  if (stream == nullptr) return failed(cudaErrorInvalidResourceHandle);
  uint64_t found = 0;
  const cudaError_t error = capture_state(*stream, *status, found);
  if (id != nullptr) *id = found;
  if (graph != nullptr) *graph = nullptr;  // nothing can be added to it by hand
  if (nodes != nullptr) *nodes = nullptr;
  if (edges != nullptr) *edges = nullptr;
  if (num_nodes != nullptr) *num_nodes = 0;
  return failed(error);
}

cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  return cudaStreamGetCaptureInfo(handle, status, nullptr, nullptr, nullptr, nullptr, nullptr);
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  *mode = exchange_mode(*mode);
  return cudaSuccess;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t handle, cudaGraphNode_t*, size_t* count) {
  const std::lock_guard lock(mutex());
  const Graph* const graph = graph_of(handle);
  if (graph == nullptr) return failed(cudaErrorInvalidValue);
  *count = graph->nodes.size();
  return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t handle) {
  const std::lock_guard lock(mutex());
  return handles().graphs.erase(handle) != 0 ? cudaSuccess : failed(cudaErrorInvalidValue);
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t handle, unsigned long long) {
  const std::lock_guard lock(mutex());
  const Graph* const graph = graph_of(handle);
  if (graph == nullptr) return failed(cudaErrorInvalidValue);
  const std::shared_ptr<Exec> made = make_ready(*graph);
  *exec = reinterpret_cast<cudaGraphExec_t>(made.get());
  handles().execs[*exec] = made;
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t handle) {
  const std::lock_guard lock(mutex());
  return handles().execs.erase(handle) != 0 ? cudaSuccess : failed(cudaErrorInvalidValue);
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t handle, cudaStream_t at) {
  cudaError_t error = cudaSuccess;
  Stream* const stream = stream_to_enqueue_on(at, error);
  if (stream == nullptr) return error;
  std::shared_ptr<Exec> exec;
  bool nested = false;
  {
    const std::lock_guard lock(mutex());
    const auto found = handles().execs.find(handle);
    if (found == handles().execs.end()) return failed(cudaErrorInvalidValue);
    exec = found->second;
    nested = stream->capture != nullptr;
  }
  if (!nested && exec->last != nullptr) wait_for(*stream, exec->last);
  enqueue(*stream, [exec](Stream& self) { Replay(*exec, self).run(); });
  if (!nested) exec->last = record(*stream);
  return outcome();
}

}  // extern "C"
