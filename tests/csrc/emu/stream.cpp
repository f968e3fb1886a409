#include "stream.h"

#include <algorithm>
#include <exception>
#include <set>

#include "async.h"
#include "memory.h"
#include "runtime.h"

namespace tpk::emu {
namespace {

// Under mutex().
struct All {
  std::set<Stream*> streams;  // handles that are valid
  uint64_t finished_ops = 0;
};

All& all() {
  static auto* const one = new All;
  return *one;
}

// What any host thread has waited for.
std::mutex met_mutex;
Clock& met() {
  static auto* const one = new Clock;
  return *one;
}
void publish(const HostThread& host) {
  const std::lock_guard lock(met_mutex);
  met().join(host.clock.snapshot());
}
void learn(HostThread& host) {
  const std::lock_guard lock(met_mutex);
  host.clock.join(met().snapshot());
}

// Of reset(), after which no clock is left of those before.
std::atomic<uint64_t> resets{0};

void forget_clocks() {
  const std::lock_guard lock(mutex());
  if (detector() == nullptr || !all().streams.empty() || has_graphs() || live_events != 0) return;
  detector()->forget();
  forget_agents();
  met() = {};
  ++resets;
}

// What the thread that started this one knew then; without it a thread knows what any has waited for.
thread_local const Snapshot* started_with = nullptr;

void work(Stream& stream) {
  std::unique_lock lock(mutex());
  while (true) {
    changed().wait(lock, [&] { return !stream.queue.empty() || stream.closed; });
    if (stream.queue.empty()) return;
    const auto run = std::move(stream.queue.front());
    stream.queue.pop_front();
    stream.busy = true;
    lock.unlock();
    run(stream);
    lock.lock();
    stream.busy = false;
    ++all().finished_ops;
    changed().notify_all();
  }
}

// Under mutex(). Publishing what the host knows to a stream, and to other host threads that ask for it.
Snapshot knowledge_of_host() {
  HostThread& host = host_thread();
  if (detector() == nullptr) return {};
  const Snapshot now = host.clock.snapshot();
  host.clock.tick();
  return now;
}

void push(Stream& stream, std::function<void(Stream&)> run, bool even_after_failure) {
  stream.queue.push_back([run = std::move(run), even_after_failure, host = knowledge_of_host()](Stream& self) {
    if (detector() != nullptr) self.clock.join(host);
    if (even_after_failure || self.device->error.load() == cudaSuccess) run(self);
    if (detector() != nullptr) self.clock.tick();
  });
  changed().notify_all();
}

std::shared_ptr<Marker> push_record(Stream& stream) {
  auto marker = std::make_shared<Marker>();
  const auto mark = [marker](Stream& self) {
    const std::lock_guard lock(mutex());
    marker->done = true;
    marker->time = std::chrono::steady_clock::now();
    if (detector() != nullptr) marker->clock = self.clock.snapshot();
    changed().notify_all();
  };
  push(stream, mark, true);
  return marker;
}

void push_wait(Stream& stream, const std::shared_ptr<Marker>& marker) {
  const auto wait = [marker](Stream& self) {
    std::unique_lock lock(mutex());
    changed().wait(lock, [&] { return marker->done; });
    if (detector() != nullptr) self.clock.join(marker->clock);
  };
  push(stream, wait, true);
}

// What is enqueued in the default stream waits for all blocking streams of the device, and they wait for it.
void order_with_default_stream(Stream& stream) {
  Device& device = *stream.device;
  if ((stream.flags & cudaStreamNonBlocking) != 0 || device.default_stream == nullptr) return;
  if (&stream != device.default_stream) return push_wait(stream, push_record(*device.default_stream));
  for (Stream* other : device.streams) {
    if (other != &stream && (other->flags & cudaStreamNonBlocking) == 0) push_wait(stream, push_record(*other));
  }
}

Stream* add_stream(Device& device, unsigned flags, int priority) {
  auto* stream = new Stream;
  stream->device = &device, stream->flags = flags, stream->priority = priority;
  const std::string name = "a stream of rank " + std::to_string(device.rank);
  if (detector() != nullptr) stream->clock.id = detector()->new_id(name);
  stream->thread = std::thread([stream] { work(*stream); });
  device.streams.push_back(stream);
  all().streams.insert(stream);
  return stream;
}

}  // namespace

HostThread& host_thread() {
  thread_local HostThread one;
  if (one.resets != resets.load()) one.clock = {}, one.resets = resets.load();
  if (detector() != nullptr && one.clock.id == 0) {
    one.clock.id = detector()->new_id("the host");
    if (started_with == nullptr) learn(one);
    if (started_with != nullptr) one.clock.join(*started_with);
  }
  return one;
}

Stream* make_stream(Device& device, unsigned flags, int priority) {
  const std::lock_guard lock(mutex());
  return add_stream(device, flags, priority);
}

Stream* stream_of(cudaStream_t handle) {
  const std::lock_guard lock(mutex());
  if (handle == nullptr || handle == cudaStreamLegacy) {
    Device& device = current_device();
    if (device.default_stream == nullptr) device.default_stream = add_stream(device, cudaStreamDefault, 0);
    return device.default_stream;
  }
  auto* stream = reinterpret_cast<Stream*>(handle);
  return all().streams.count(stream) != 0 ? stream : nullptr;
}

void close_stream(Stream* stream) {
  const std::lock_guard lock(mutex());
  leave_capture(*stream);
  all().streams.erase(stream);
  stream->closed = true;
  std::thread([stream] {  // what was enqueued still runs
    stream->thread.join();
    const std::lock_guard inner(mutex());
    auto& streams = stream->device->streams;
    streams.erase(std::find(streams.begin(), streams.end(), stream));
    delete stream;
    changed().notify_all();
  })
      .detach();
  changed().notify_all();
}

void enqueue(Stream& stream, std::function<void(Stream&)> run) {
  const std::lock_guard lock(mutex());
  if (stream.capture != nullptr) return add_node(stream, std::move(run));
  order_with_default_stream(stream);
  push(stream, std::move(run), false);
}

std::shared_ptr<Marker> record(Stream& stream) {
  const std::lock_guard lock(mutex());
  order_with_default_stream(stream);
  return push_record(stream);
}

void wait_for(Stream& stream, std::shared_ptr<Marker> marker) {
  const std::lock_guard lock(mutex());
  push_wait(stream, marker);
}

void synchronize(const std::shared_ptr<Marker>& marker) {
  HostThread& host = host_thread();
  std::unique_lock lock(mutex());
  changed().wait(lock, [&] { return marker->done; });
  if (detector() == nullptr) return;
  host.clock.join(marker->clock);
  publish(host);
}

void synchronize(Device& device) {
  std::vector<std::shared_ptr<Marker>> markers;
  {
    const std::lock_guard lock(mutex());
    for (Stream* stream : device.streams) {
      if (!stream->closed) markers.push_back(push_record(*stream));
    }
  }
  for (const auto& marker : markers) synchronize(marker);
  std::unique_lock lock(mutex());
  changed().wait(lock, [&] {  // those that were destroyed with work left
    return std::none_of(device.streams.begin(), device.streams.end(), [](Stream* stream) { return stream->closed; });
  });
}

uint64_t finished_ops() { return all().finished_ops; }

Device& current_device() { return device(host_thread().device); }
void set_current_device(int rank) { host_thread().device = rank; }

cudaError_t enqueue_launch(LaunchRequest request, cudaStream_t handle) {
  const auto given = [](const dim3& size) { return uint64_t{size.x} * size.y * size.z; };
  HostThread& host = host_thread();
  Device& device = current_device();
  const auto result = [&] {
    if (device.error.load() != cudaSuccess) return device.error.load();
    Stream* stream = stream_of(handle);
    if (stream == nullptr || stream->device != &device) return cudaErrorInvalidResourceHandle;
    const cudaError_t obstacle = obstacle_to_enqueueing(*stream);
    if (obstacle != cudaSuccess) return obstacle;
    const uint64_t threads = given(request.block), blocks = given(request.grid);
    if (threads == 0 || threads > 1024 || request.block.z > 64 || blocks == 0 || blocks > 0x7fffffffu ||
        request.grid.y > 65535 || request.grid.z > 65535) {
      return cudaErrorInvalidConfiguration;
    }
    if (request.shared_bytes > allowed_shared_bytes(request.kernel)) return cudaErrorInvalidValue;
    enqueue(*stream, [request](Stream& self) {
      Launch launch;
      launch.request = request, launch.device = self.device, launch.stream = &self;
      launch.number = ++self.launches;
      run_launch(launch);
    });
    return cudaSuccess;
  }();
  if (result != cudaSuccess) host.last_error = result;
  return result;
}

// ---- for tests ------------------------------------------------------------------------------------------------------

void host_threads_met() {
  HostThread& host = host_thread();
  if (detector() == nullptr) return;
  publish(host);
  learn(host);
  host.clock.tick();
}

void run_ranks(int ranks, const std::function<void(int)>& body) {
  host_threads_met();
  const Snapshot known = host_thread().clock.snapshot();
  std::vector<std::exception_ptr> errors(static_cast<size_t>(ranks));
  std::vector<std::thread> threads;
  for (int rank = 0; rank < ranks; ++rank) {
    threads.emplace_back([&, rank] {
      started_with = &known;
      set_current_device(rank);
      try {
        body(rank);
      } catch (...) {
        errors[static_cast<size_t>(rank)] = std::current_exception();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  host_threads_met();
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

void reset() {
  abandon_captures();
  for (int rank = 0; rank < options().ranks; ++rank) {
    synchronize(device(rank));
    std::vector<Stream*> streams;
    {
      const std::lock_guard lock(mutex());
      streams = device(rank).streams;
      device(rank).default_stream = nullptr;
    }
    for (Stream* stream : streams) close_stream(stream);
    synchronize(device(rank));
    device(rank).error = cudaSuccess;
  }
  release_all();
  forget_clocks();
  take_reports();
  host_thread().last_error = cudaSuccess;
}

}  // namespace tpk::emu
