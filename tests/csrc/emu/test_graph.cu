// Capture into graphs as CUDA documents it: what becomes a node, what is refused and with which error, what replays do.
#include <thread>

#include "control.h"
#include "cuda/kernels/device.cuh"
#include "expect.h"

using namespace tpk;
using namespace tpk::cuda;

namespace {

constexpr cudaStreamCaptureMode kMode = cudaStreamCaptureModeThreadLocal;

void ok(cudaError_t error, const char* call) { EXPECT(error == cudaSuccess, call, ": ", cudaGetErrorName(error)); }
#define OK(call) ok(call, #call)
#define GIVES(name, call) \
  EXPECT((call) == name, #call, " gave ", cudaGetErrorName(cudaPeekAtLastError()), ", not ", #name)

cudaStream_t new_stream(unsigned flags = cudaStreamNonBlocking) {
  cudaStream_t stream = nullptr;
  OK(cudaStreamCreateWithFlags(&stream, flags));
  return stream;
}

struct Event {
  Event() { OK(cudaEventCreateWithFlags(&handle, cudaEventDisableTiming)); }
  ~Event() { cudaEventDestroy(handle); }
  Event(const Event&) = delete;
  operator cudaEvent_t() const { return handle; }
  cudaEvent_t handle = nullptr;
};

template <class T>
T* new_values(size_t n) {
  T* values = nullptr;
  OK(cudaMalloc(reinterpret_cast<void**>(&values), n * sizeof(T)));
  std::memset(values, 0, n * sizeof(T));
  return values;
}

cudaStreamCaptureStatus status_of(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  OK(cudaStreamIsCapturing(stream, &status));
  return status;
}

// Ends the capture and makes it ready.
cudaGraphExec_t ended(cudaStream_t stream, size_t nodes) {
  cudaGraph_t graph = nullptr;
  OK(cudaStreamEndCapture(stream, &graph));
  size_t count = 0;
  OK(cudaGraphGetNodes(graph, nullptr, &count));
  EXPECT(count == nodes, "the graph has ", count, " nodes");
  cudaGraphExec_t exec = nullptr;
  OK(cudaGraphInstantiate(&exec, graph, 0));
  OK(cudaGraphDestroy(graph));
  return exec;
}

// A capture that something has made invalid can be ended.
void expect_invalid(cudaStream_t stream) {
  EXPECT(status_of(stream) == cudaStreamCaptureStatusInvalidated);
  GIVES(cudaErrorStreamCaptureInvalidated, cudaMemsetAsync(nullptr, 0, 0, stream));
  cudaGraph_t graph = nullptr;
  GIVES(cudaErrorStreamCaptureInvalidated, cudaStreamEndCapture(stream, &graph));
  EXPECT(graph == nullptr && status_of(stream) == cudaStreamCaptureStatusNone);
  OK(cudaMemsetAsync(nullptr, 0, 0, stream));  // and the stream goes on
  cudaGetLastError();
}

TPK_KERNEL void add(uint32_t* to, const uint32_t* from, uint32_t times) {
  to[threadIdx.x] += times * from[threadIdx.x];
}

// Two kernels that wait for each other.
TPK_KERNEL void greet(uint32_t* mine, const uint32_t* theirs, uint32_t* turn) {
  const uint32_t now = ++*turn;
  store_release_sys(mine, now);
  while (load_acquire_sys(theirs) < now) {
  }
}

}  // namespace

CASE(nothing_runs_while_it_is_captured_and_all_of_it_at_each_launch) {
  const cudaStream_t stream = new_stream();
  uint32_t *in = new_values<uint32_t>(4), *copy = new_values<uint32_t>(4), *sum = new_values<uint32_t>(4);
  uint32_t calls = 0;
  uint32_t times = 10;  // arguments are copied when they are captured
  OK(cudaStreamBeginCapture(stream, kMode));
  OK(cudaMemsetAsync(sum, 0, 4 * sizeof *sum, stream));
  OK(cudaMemcpyAsync(copy, in, 4 * sizeof *in, cudaMemcpyDeviceToDevice, stream));
  OK(TPK_LAUNCH(add, dim3(1), dim3(4), 0, stream, sum, copy, times));
  OK(cudaLaunchHostFunc(stream, [](void* count) { ++*static_cast<uint32_t*>(count); }, &calls));
  const cudaGraphExec_t exec = ended(stream, 4);
  times = 0;
  OK(cudaStreamSynchronize(stream));
  EXPECT(calls == 0 && sum[0] == 0 && copy[0] == 0);
  for (uint32_t turn = 1; turn <= 3; ++turn) {
    for (uint32_t i = 0; i < 4; ++i) in[i] = turn + i;
    OK(cudaGraphLaunch(exec, turn == 2 ? new_stream() : stream));
    OK(cudaDeviceSynchronize());
    for (uint32_t i = 0; i < 4; ++i) EXPECT(sum[i] == 10 * (turn + i), i, " is ", sum[i]);
    EXPECT(calls == turn);
  }
  OK(cudaGraphExecDestroy(exec));
  GIVES(cudaErrorInvalidValue, cudaGraphLaunch(exec, stream));
  emu::reset();
}

CASE(streams_join_a_capture_by_events_and_what_nothing_orders_runs_at_once) {
  const cudaStream_t main = new_stream(), side = new_stream();
  const Event event;
  uint32_t* flags = new_values<uint32_t>(4);
  OK(cudaStreamBeginCapture(main, kMode));
  OK(cudaEventRecord(event, main));
  OK(cudaStreamWaitEvent(side, event, 0));
  EXPECT(status_of(side) == cudaStreamCaptureStatusActive);
  OK(TPK_LAUNCH(greet, dim3(1), dim3(1), 0, main, flags, flags + 1, flags + 2));
  OK(TPK_LAUNCH(greet, dim3(1), dim3(1), 0, side, flags + 1, flags, flags + 3));
  OK(cudaEventRecord(event, side));
  OK(cudaStreamWaitEvent(main, event, 0));
  OK(TPK_LAUNCH(add, dim3(1), dim3(1), 0, main, flags + 2, flags + 3, 0u));
  const cudaGraphExec_t exec = ended(main, 3);
  EXPECT(status_of(side) == cudaStreamCaptureStatusNone);
  for (int i = 0; i < 3; ++i) OK(cudaGraphLaunch(exec, i == 1 ? side : main));
  OK(cudaStreamSynchronize(main));
  EXPECT(flags[2] == 3 && flags[3] == 3);
  for (const emu::Report& report : emu::take_reports()) EXPECT(false, report.text);
  emu::reset();
}

CASE(a_missing_edge_is_a_race) {
  if (!emu::detects_races()) return;
  const cudaStream_t main = new_stream(), side = new_stream();
  const Event event;
  uint32_t* values = new_values<uint32_t>(4);
  OK(cudaStreamBeginCapture(main, kMode));
  OK(cudaEventRecord(event, main));
  OK(cudaStreamWaitEvent(side, event, 0));
  OK(TPK_LAUNCH(add, dim3(1), dim3(1), 0, main, values, values + 2, 1u));
  OK(TPK_LAUNCH(add, dim3(1), dim3(1), 0, side, values, values + 1, 1u));
  OK(cudaEventRecord(event, side));
  OK(cudaStreamWaitEvent(main, event, 0));
  const cudaGraphExec_t exec = ended(main, 2);
  OK(cudaGraphLaunch(exec, main));
  OK(cudaStreamSynchronize(main));
  EXPECT(emu::races() > 0);
  emu::take_reports();
  emu::reset();
}

CASE(work_that_is_not_joined_is_an_error) {
  const cudaStream_t main = new_stream(), side = new_stream();
  const Event event;
  uint32_t* values = new_values<uint32_t>(4);
  for (bool works : {true, false}) {
    OK(cudaStreamBeginCapture(main, kMode));
    OK(cudaEventRecord(event, main));
    OK(cudaStreamWaitEvent(side, event, 0));
    if (works) OK(cudaMemsetAsync(values, 0, 4, side));
    cudaGraph_t graph = nullptr;
    const cudaError_t error = cudaStreamEndCapture(main, &graph);
    EXPECT(error == (works ? cudaErrorStreamCaptureUnjoined : cudaSuccess), cudaGetErrorName(error));
    EXPECT((graph == nullptr) == works);
    OK(cudaStreamSynchronize(side));
  }
  emu::reset();
}

CASE(what_cannot_be_captured_is_refused_and_ends_the_capture) {
  const cudaStream_t main = new_stream(), other = new_stream(), second = new_stream(), blocking = new_stream(0);
  const Event outside, inside, never;
  uint32_t* values = new_values<uint32_t>(4);
  uint32_t on_host[1] = {};
  OK(cudaEventRecord(outside, other));
  const auto refuses = [&](cudaError_t expected, const std::function<cudaError_t()>& call) {
    OK(cudaStreamBeginCapture(main, kMode));
    OK(cudaEventRecord(inside, main));
    OK(cudaStreamWaitEvent(main, never, 0));  // nothing to wait for
    const cudaError_t error = call();
    EXPECT(error == expected, cudaGetErrorName(error), " instead of ", cudaGetErrorName(expected));
    expect_invalid(main);
  };
  void* memory = nullptr;
  refuses(cudaErrorStreamCaptureUnsupported, [&] { return cudaStreamSynchronize(main); });
  refuses(cudaErrorStreamCaptureUnsupported, [&] { return cudaStreamQuery(main); });
  refuses(cudaErrorStreamCaptureUnsupported, [&] { return cudaDeviceSynchronize(); });
  refuses(cudaErrorStreamCaptureUnsupported, [&] { return cudaMalloc(&memory, 16); });
  refuses(cudaErrorStreamCaptureUnsupported, [&] { return cudaFree(values); });
  refuses(cudaErrorStreamCaptureUnsupported, [&] { return cudaMallocAsync(&memory, 16, main); });
  refuses(cudaErrorStreamCaptureUnsupported, [&] { return cudaEventQuery(outside); });
  refuses(cudaErrorStreamCaptureUnsupported, [&] { return cudaMemcpy(values, values + 1, 4, cudaMemcpyDefault); });
  refuses(cudaErrorStreamCaptureUnsupported,
          [&] { return cudaMemcpyAsync(values, on_host, 4, cudaMemcpyHostToDevice, main); });
  refuses(cudaErrorCapturedEvent, [&] { return cudaEventQuery(inside); });
  refuses(cudaErrorCapturedEvent, [&] { return cudaEventSynchronize(inside); });
  refuses(cudaErrorStreamCaptureIsolation, [&] { return cudaStreamWaitEvent(main, outside, 0); });
  refuses(cudaErrorStreamCaptureImplicit, [&] { return cudaStreamWaitEvent(nullptr, inside, 0); });
  refuses(cudaErrorStreamCaptureMerge, [&] {
    OK(cudaStreamBeginCapture(second, kMode));
    const cudaError_t error = cudaStreamWaitEvent(second, inside, 0);
    expect_invalid(second);
    return error;
  });
  refuses(cudaErrorStreamCaptureUnmatched, [&] {
    cudaGraph_t graph = nullptr;
    OK(cudaStreamWaitEvent(other, inside, 0));
    return cudaStreamEndCapture(other, &graph);
  });
  GIVES(cudaErrorCapturedEvent, cudaStreamWaitEvent(other, inside, 0));  // its capture has ended
  cudaGraph_t graph = nullptr;
  GIVES(cudaErrorIllegalState, cudaStreamEndCapture(main, &graph));
  GIVES(cudaErrorStreamCaptureUnsupported, cudaStreamBeginCapture(nullptr, kMode));

  // The legacy stream waits for blocking streams, and only for those.
  OK(cudaStreamBeginCapture(main, kMode));
  OK(cudaMemsetAsync(values, 0, 4, nullptr));
  ended(main, 0);
  OK(cudaStreamBeginCapture(blocking, kMode));
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  GIVES(cudaErrorStreamCaptureImplicit, cudaStreamIsCapturing(nullptr, &status));
  EXPECT(status_of(blocking) == cudaStreamCaptureStatusActive, "to ask does no harm");
  GIVES(cudaErrorStreamCaptureImplicit, cudaMemsetAsync(values, 0, 4, nullptr));
  expect_invalid(blocking);
  emu::reset();
}

CASE(the_mode_of_a_capture_says_whose_calls_are_unsafe) {
  for (const cudaStreamCaptureMode mode :
       {cudaStreamCaptureModeGlobal, cudaStreamCaptureModeThreadLocal, cudaStreamCaptureModeRelaxed}) {
    const cudaStream_t main = new_stream();
    OK(cudaStreamBeginCapture(main, mode));
    cudaError_t elsewhere = cudaSuccess, ended_elsewhere = cudaSuccess;
    std::thread([&] {
      void* memory = nullptr;
      cudaGraph_t graph = nullptr;
      ended_elsewhere = cudaStreamEndCapture(main, &graph);
      elsewhere = cudaMalloc(&memory, 16);
    }).join();
    if (mode == cudaStreamCaptureModeRelaxed) {
      EXPECT(elsewhere == cudaSuccess && ended_elsewhere == cudaSuccess);
      continue;
    }
    EXPECT(ended_elsewhere == cudaErrorStreamCaptureWrongThread, cudaGetErrorName(ended_elsewhere));
    if (mode == cudaStreamCaptureModeGlobal) {
      EXPECT(elsewhere == cudaErrorStreamCaptureUnsupported, cudaGetErrorName(elsewhere));
      expect_invalid(main);
      continue;
    }
    EXPECT(elsewhere == cudaSuccess, cudaGetErrorName(elsewhere));
    void* memory = nullptr;
    cudaStreamCaptureMode swapped = cudaStreamCaptureModeRelaxed;
    OK(cudaThreadExchangeStreamCaptureMode(&swapped));
    OK(cudaMalloc(&memory, 16));
    OK(cudaThreadExchangeStreamCaptureMode(&swapped));
    GIVES(cudaErrorStreamCaptureUnsupported, cudaMalloc(&memory, 16));
    expect_invalid(main);
  }
  emu::reset();
}

CASE(a_graph_can_be_captured_into_another_one) {
  const cudaStream_t stream = new_stream();
  uint32_t* values = new_values<uint32_t>(2);
  values[1] = 1;
  OK(cudaStreamBeginCapture(stream, kMode));
  OK(TPK_LAUNCH(add, dim3(1), dim3(1), 0, stream, values, values + 1, 1u));
  const cudaGraphExec_t inner = ended(stream, 1);
  OK(cudaStreamBeginCapture(stream, kMode));
  OK(cudaGraphLaunch(inner, stream));
  OK(cudaGraphLaunch(inner, stream));
  const cudaGraphExec_t outer = ended(stream, 2);
  OK(cudaGraphLaunch(outer, stream));
  OK(cudaGraphExecDestroy(outer));  // what is under way goes on
  OK(cudaStreamSynchronize(stream));
  EXPECT(values[0] == 2);
  emu::reset();
}
