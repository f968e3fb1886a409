// The emulator does what CUDA promises: order of streams and events, errors that stay, room for blocks, warp
// operations.
#include <atomic>
#include <numeric>

#include "control.h"
#include "expect.h"
#include "primitives.h"

using namespace tpk;
using namespace tpk::cuda;

namespace {

// ---- a device array that is freed -----------------------------------------------------------------------------------

template <class T>
struct Device {
  explicit Device(size_t n, int byte = 0) {
    EXPECT(cudaMalloc(reinterpret_cast<void**>(&data), n * sizeof(T)) == cudaSuccess);
    EXPECT(cudaMemset(data, byte, n * sizeof(T)) == cudaSuccess);
    size = n;
  }
  ~Device() { cudaFree(data); }
  Device(const Device&) = delete;
  std::vector<T> host() const {
    std::vector<T> values(size);
    EXPECT(cudaMemcpy(values.data(), data, size * sizeof(T), cudaMemcpyDeviceToHost) == cudaSuccess);
    return values;
  }
  T* data = nullptr;
  size_t size;
};

cudaStream_t new_stream(int priority = 0) {
  cudaStream_t stream;
  EXPECT(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, priority) == cudaSuccess);
  return stream;
}

void expect_no_reports() {
  for (const emu::Report& report : emu::take_reports()) EXPECT(false, report.text);
}

// ---- threads of a block ---------------------------------------------------------------------------------------------

TPK_KERNEL void indices(uint32_t* out) {
  const uint32_t thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const uint32_t block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] = block * 1000 + thread;
}

CASE(every_thread_of_every_block_runs_once) {
  Device<uint32_t> out(2 * 3 * 2 * 4 * 5 * 6, 0xff);
  EXPECT(TPK_LAUNCH(indices, dim3(2, 3, 2), dim3(4, 5, 6), 0, nullptr, out.data) == cudaSuccess);
  const std::vector<uint32_t> values = out.host();
  for (uint32_t i = 0; i < values.size(); ++i) EXPECT(values[i] == i / 120 * 1000 + i % 120, i);
  expect_no_reports();
}

TPK_KERNEL void warp_operations(uint32_t* out) {
  const uint32_t lane = threadIdx.x % 32, all = 0xffffffffu;
  uint32_t* mine = out + threadIdx.x * 16;
  mine[0] = __shfl_sync(all, lane * 3, 5);
  mine[1] = __shfl_up_sync(all, lane, 3);
  mine[2] = __shfl_down_sync(all, lane, 3);
  mine[3] = __shfl_xor_sync(all, lane, 7);
  mine[4] = __shfl_down_sync(all, lane, 2, 8);
  mine[5] = __ballot_sync(all, lane % 3 == 0);
  mine[6] = static_cast<uint32_t>(__any_sync(all, lane == 17)) * 2 + static_cast<uint32_t>(__all_sync(all, lane < 31));
  mine[7] = __reduce_add_sync(all, lane) + __reduce_max_sync(all, lane ^ 1u) + __reduce_min_sync(all, lane + 4);
  mine[8] = warp_max(lane ^ 21u);
  mine[9] = static_cast<uint32_t>(emu::warp_sum(static_cast<float>(lane)));
  mine[10] = static_cast<uint32_t>(__shfl_sync(all, uint64_t{1} << (lane + 8), 9) >> 17);
  mine[11] = lane < 16 ? __shfl_sync(0xffffu, lane, 3) : __shfl_sync(0xffff0000u, lane, 20);
  mine[12] = static_cast<uint32_t>(__syncthreads_count(threadIdx.x % 2));
  mine[13] = static_cast<uint32_t>(__syncthreads_or(threadIdx.x == 40) + 2 * __syncthreads_and(threadIdx.x < 40));
  mine[14] = __syncthreads_or(threadIdx.x == 63);
  mine[15] = static_cast<uint32_t>(__reduce_min_sync(all, static_cast<int>(lane) - 9)) +
             static_cast<uint32_t>(__reduce_xor_sync(all, lane + 1));
}

CASE(lanes_take_what_cuda_gives_them) {
  for (uint64_t seed : {0, 1, 2}) {
    emu::Options options = emu::options();
    options.seed = seed;
    emu::configure(options);
    Device<uint32_t> out(64 * 16);
    EXPECT(TPK_LAUNCH(warp_operations, dim3(1), dim3(64), 0, nullptr, out.data) == cudaSuccess);
    const std::vector<uint32_t> values = out.host();
    for (uint32_t thread = 0; thread < 64; ++thread) {
      const uint32_t lane = thread % 32, *got = &values[thread * 16];
      const uint32_t expected[16] = {15,
                                     lane < 3 ? lane : lane - 3,
                                     lane >= 29 ? lane : lane + 3,
                                     lane ^ 7u,
                                     lane % 8 >= 6 ? lane : lane + 2,
                                     0b01001001001001001001001001001001u,
                                     2,
                                     496 + 31 + 4,
                                     31,
                                     496,
                                     1,
                                     lane < 16 ? 3u : 20u,
                                     32,
                                     1,
                                     1,
                                     static_cast<uint32_t>(-9) + 32};
      for (int i = 0; i < 16; ++i) EXPECT(got[i] == expected[i], "thread ", thread, " value ", i, ": ", got[i]);
    }
  }
  emu::configure({});
  expect_no_reports();
}

#if !defined(__SANITIZE_ADDRESS__)  // whose stacks are larger, and which watches them
__attribute__((noinline)) __device__ char use_much_stack(int value) {
  char large[80 << 10];
  std::memset(large, value, sizeof large);
  __syncwarp();
  return large[blockDim.x];
}
TPK_KERNEL void deep(char* out) {
  if (threadIdx.x == 1) *out = use_much_stack(1);  // over the stack of thread 0, which is done
}

CASE(a_stack_that_is_too_small_is_noticed) {
  Device<char> out(1);
  EXPECT(TPK_LAUNCH(deep, dim3(1), dim3(2), 0, nullptr, out.data) == cudaSuccess);
  EXPECT(cudaDeviceSynchronize() == cudaErrorLaunchFailure);
  const std::vector<emu::Report> reports = emu::take_reports();
  EXPECT(reports.size() == 1 && reports[0].kind == emu::Kind::Overflow);
  emu::reset();
  out.data = nullptr;
}
#endif

TPK_KERNEL void leave_early(uint32_t* out, uint32_t n) {
  if (threadIdx.x >= n) return;
  __syncthreads();
  out[threadIdx.x] = static_cast<uint32_t>(__syncthreads_count(1));
}

CASE(threads_that_have_ended_hold_no_barrier_up) {
  Device<uint32_t> out(40);
  EXPECT(TPK_LAUNCH(leave_early, dim3(1), dim3(64), 0, nullptr, out.data, 40u) == cudaSuccess);
  for (uint32_t value : out.host()) EXPECT(value == 40);
  expect_no_reports();
}

// ---- the switch -----------------------------------------------------------------------------------------------------

template <class T>
TPK_KERNEL void through_the_switch(const char* from, char* to) {
  multicast_store16(to, multicast_add16<T>(from));
}

CASE(the_switch_adds_and_spreads) {
  constexpr int kRanks = 3;
  std::vector<void*> memory;
  for (int rank = 0; rank < kRanks; ++rank) {
    EXPECT(cudaSetDevice(rank) == cudaSuccess);
    void* data;
    EXPECT(cudaMalloc(&data, 64) == cudaSuccess);
    std::vector<float> values(16, static_cast<float>(rank + 1));
    for (int i = 0; i < 8; ++i)
      reinterpret_cast<Bfloat16*>(values.data())[8 + i] = to_bfloat16(static_cast<float>(rank));
    EXPECT(cudaMemcpy(data, values.data(), 64, cudaMemcpyHostToDevice) == cudaSuccess);
    memory.push_back(data);
  }
  EXPECT(cudaSetDevice(0) == cudaSuccess);
  char* everywhere = static_cast<char*>(emu::multicast(memory, 64));
  EXPECT(TPK_LAUNCH(through_the_switch<float>, dim3(1), dim3(1), 0, nullptr, everywhere, everywhere + 32) ==
         cudaSuccess);
  EXPECT(TPK_LAUNCH(through_the_switch<Bfloat16>, dim3(1), dim3(1), 0, nullptr, everywhere + 16, everywhere + 48) ==
         cudaSuccess);
  EXPECT(cudaDeviceSynchronize() == cudaSuccess);
  for (void* data : memory) {
    const float* values = static_cast<const float*>(data);
    for (int i = 0; i < 4; ++i) EXPECT(values[8 + i] == 6.0f);
    for (int i = 0; i < 8; ++i) EXPECT(to_float(reinterpret_cast<const Bfloat16*>(values)[24 + i]) == 3.0f);
  }
  EXPECT(TPK_LAUNCH(through_the_switch<float>, dim3(1), dim3(1), 0, nullptr, static_cast<char*>(memory[0]),
                    everywhere) == cudaSuccess);
  EXPECT(cudaDeviceSynchronize() == cudaErrorIllegalAddress);
  EXPECT(emu::take_reports().size() == 1);
  emu::reset();
}

TPK_KERNEL void count_up(uint32_t* counter) { atomicAdd(counter, 1); }

CASE(memory_of_others_belongs_to_whom_they_say) {
  uint32_t counter = 0;
  emu::own(&counter, sizeof counter, 0);
  EXPECT(TPK_LAUNCH(count_up, dim3(1), dim3(1), 0, nullptr, &counter) == cudaSuccess);
  EXPECT(cudaDeviceSynchronize() == cudaSuccess && counter == 1);
  expect_no_reports();
  emu::own(&counter, sizeof counter, 1);
  EXPECT(TPK_LAUNCH(count_up, dim3(1), dim3(1), 0, nullptr, &counter) == cudaSuccess);
  EXPECT(cudaDeviceSynchronize() == cudaSuccess && counter == 2);
  const std::vector<emu::Report> reports = emu::take_reports();
  EXPECT(reports.size() == 1 && reports[0].kind == emu::Kind::Scope);
  emu::disown(&counter);
}

// ---- streams and events ---------------------------------------------------------------------------------------------

TPK_KERNEL void wait_for(const uint32_t* flag) {
  while (load_acquire_sys(flag) == 0) {
  }
}
TPK_KERNEL void raise(uint32_t* flag) { store_release_sys(flag, 1); }
TPK_KERNEL void append(uint32_t* list, uint32_t value) {
  list[++list[0]] = value;  // list[0] is the length
}

CASE(streams_run_at_once_and_events_order_them) {
  const cudaStream_t a = new_stream(), b = new_stream(-1);
  cudaEvent_t event;
  EXPECT(cudaEventCreateWithFlags(&event, cudaEventDisableTiming) == cudaSuccess);
  EXPECT(cudaEventQuery(event) == cudaSuccess);
  EXPECT(cudaStreamWaitEvent(b, event, 0) == cudaSuccess);  // never recorded: no wait
  Device<uint32_t> flag(1), list(8);
  TPK_LAUNCH(wait_for, dim3(1), dim3(1), 0, a, flag.data);
  TPK_LAUNCH(append, dim3(1), dim3(1), 0, a, list.data, 1u);
  EXPECT(cudaEventRecord(event, a) == cudaSuccess);
  EXPECT(cudaEventQuery(event) == cudaErrorNotReady && cudaStreamQuery(a) == cudaErrorNotReady);
  TPK_LAUNCH(raise, dim3(1), dim3(1), 0, b, flag.data);  // a is stuck until b runs
  EXPECT(cudaStreamWaitEvent(b, event, 0) == cudaSuccess);
  TPK_LAUNCH(append, dim3(1), dim3(1), 0, b, list.data, 2u);
  EXPECT(cudaEventRecord(event, b) == cudaSuccess);
  EXPECT(cudaStreamWaitEvent(a, event, 0) == cudaSuccess);
  TPK_LAUNCH(append, dim3(1), dim3(1), 0, a, list.data, 3u);
  EXPECT(cudaStreamSynchronize(a) == cudaSuccess && cudaEventQuery(event) == cudaSuccess);
  const std::vector<uint32_t> order = list.host();
  EXPECT(order[0] == 3 && order[1] == 1 && order[2] == 2 && order[3] == 3);
  EXPECT(cudaEventDestroy(event) == cudaSuccess);
  EXPECT(cudaStreamDestroy(a) == cudaSuccess && cudaStreamDestroy(b) == cudaSuccess);
  EXPECT(cudaStreamSynchronize(a) == cudaErrorInvalidResourceHandle);
  EXPECT(cudaGetLastError() == cudaErrorInvalidResourceHandle && cudaGetLastError() == cudaSuccess);
  expect_no_reports();
}

CASE(host_functions_and_copies_keep_the_order_of_their_stream) {
  const cudaStream_t stream = new_stream();
  Device<uint32_t> list(8);
  static std::atomic<uint32_t> seen;
  uint32_t* pinned;
  EXPECT(cudaHostAlloc(reinterpret_cast<void**>(&pinned), 4, 0) == cudaSuccess);
  TPK_LAUNCH(append, dim3(1), dim3(1), 0, stream, list.data, 7u);
  EXPECT(cudaMemcpyAsync(pinned, list.data + 1, 4, cudaMemcpyDeviceToHost, stream) == cudaSuccess);
  EXPECT(cudaLaunchHostFunc(stream, [](void* data) { seen = *static_cast<uint32_t*>(data); }, pinned) == cudaSuccess);
  EXPECT(cudaStreamSynchronize(stream) == cudaSuccess && seen == 7);
  void* on_device;
  EXPECT(cudaHostGetDevicePointer(&on_device, pinned, 0) == cudaSuccess && on_device == pinned);
  EXPECT(cudaFreeHost(pinned) == cudaSuccess && cudaStreamDestroy(stream) == cudaSuccess);
  EXPECT(cudaMemcpy(list.data, list.data + 1, 4000, cudaMemcpyDeviceToDevice) == cudaErrorInvalidValue);
  cudaGetLastError();
  expect_no_reports();
}

CASE(a_blocking_stream_and_the_default_stream_wait_for_each_other) {
  cudaStream_t stream;
  EXPECT(cudaStreamCreate(&stream) == cudaSuccess);
  Device<uint32_t> list(8);
  for (uint32_t i = 1; i <= 6; ++i) TPK_LAUNCH(append, dim3(1), dim3(1), 0, i % 2 ? stream : nullptr, list.data, i);
  const std::vector<uint32_t> order = list.host();
  for (uint32_t i = 1; i <= 6; ++i) EXPECT(order[i] == i);
  EXPECT(cudaStreamDestroy(stream) == cudaSuccess);
  expect_no_reports();
}

// ---- room and errors ------------------------------------------------------------------------------------------------

TPK_KERNEL void busy(uint32_t* now, uint32_t* most) {
  atomicMax(most, atomicAdd(now, 1) + 1);
  for (int i = 0; i < 50; ++i) load_relaxed_sys(now);
  atomicSub(now, 1);
}

CASE(a_device_holds_no_more_blocks_than_it_has_room_for) {
  for (uint64_t seed : {0, 5}) {
    emu::configure({.resident_blocks = 3, .seed = seed});
    Device<uint32_t> counts(2);
    TPK_LAUNCH(busy, dim3(40), dim3(4), 0, nullptr, counts.data, counts.data + 1);
    const std::vector<uint32_t> values = counts.host();
    EXPECT(values[0] == 0 && values[1] <= 3 * 4, values[1]);
  }
  emu::configure({});
  expect_no_reports();
}

TPK_KERNEL void give_up(uint32_t* out) {
  if (threadIdx.x == 3) trap();
  __syncthreads();
  out[threadIdx.x] = 1;
}

CASE(a_trap_ends_the_kernel_and_stays_until_the_device_is_reset) {
  EXPECT(cudaSetDevice(1) == cudaSuccess);
  Device<uint32_t> out(32);
  EXPECT(TPK_LAUNCH(give_up, dim3(2), dim3(32), 0, nullptr, out.data) == cudaSuccess);
  EXPECT(cudaDeviceSynchronize() == cudaErrorLaunchFailure);
  EXPECT(TPK_LAUNCH(append, dim3(1), dim3(1), 0, nullptr, out.data, 1u) == cudaErrorLaunchFailure);
  EXPECT(cudaGetLastError() == cudaErrorLaunchFailure && cudaGetLastError() == cudaErrorLaunchFailure);
  EXPECT(std::string(cudaGetErrorName(cudaGetLastError())) == "cudaErrorLaunchFailure");
  EXPECT(out.data[0] == 0);
  EXPECT(cudaSetDevice(0) == cudaSuccess && cudaDeviceSynchronize() == cudaSuccess);  // the others go on
  expect_no_reports();
  EXPECT(cudaSetDevice(1) == cudaSuccess);
  emu::reset();
  out.data = nullptr;
  EXPECT(cudaDeviceSynchronize() == cudaSuccess && cudaSetDevice(0) == cudaSuccess);
}

CASE(what_a_device_cannot_launch_is_refused) {
  Device<uint32_t> out(1);
  EXPECT(TPK_LAUNCH(raise, dim3(1), dim3(1025), 0, nullptr, out.data) == cudaErrorInvalidConfiguration);
  EXPECT(TPK_LAUNCH(raise, dim3(0), dim3(32), 0, nullptr, out.data) == cudaErrorInvalidConfiguration);
  EXPECT(TPK_LAUNCH(raise, dim3(1), dim3(32), 60000, nullptr, out.data) == cudaErrorInvalidValue);
  const auto kernel = reinterpret_cast<const void*>(raise);
  EXPECT(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 1 << 20) == cudaErrorInvalidValue);
  EXPECT(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 60000) == cudaSuccess);
  EXPECT(TPK_LAUNCH(raise, dim3(1), dim3(1), 60000, nullptr, out.data) == cudaSuccess);
  const cudaStream_t stream = new_stream();
  EXPECT(cudaSetDevice(1) == cudaSuccess);
  EXPECT(TPK_LAUNCH(raise, dim3(1), dim3(1), 0, stream, out.data) == cudaErrorInvalidResourceHandle);
  EXPECT(cudaSetDevice(0) == cudaSuccess && cudaStreamDestroy(stream) == cudaSuccess);
  EXPECT(out.host()[0] == 1);
  cudaGetLastError();
  expect_no_reports();
}

}  // namespace
