// Planted bugs that the address and undefined-behaviour sanitizers find: each ends its process, so each runs in a
// child.
#include <unistd.h>

#include <array>

#include "planted.h"

using namespace tpk;
using namespace tpk::planted;
using namespace tpk::cuda;

namespace {

// In a child of this program that runs this case alone, `body` must end with a complaint that has `text` in it.
void must_die(const std::string& text, const Body& body) {
  if (testing::alone) {
    body();
    return;
  }
  std::array<char, 4096> path{};
  EXPECT(readlink("/proc/self/exe", path.data(), path.size() - 1) > 0);
  FILE* child = popen(("'" + std::string(path.data()) + "' " + testing::current + " 2>&1").c_str(), "r");
  EXPECT(child != nullptr);
  std::string output;
  std::array<char, 4096> part;
  while (const size_t bytes = fread(part.data(), 1, part.size(), child)) output.append(part.data(), bytes);
  EXPECT(pclose(child) != 0, "it was not found");
  EXPECT(output.find(text) != std::string::npos, "not '", text, "' but\n", output);
}

// ---- memory of ranks ------------------------------------------------------------------------------------------------

constexpr uint32_t kUneven = 100;  // over three ranks

template <bool rounds_up>
TPK_KERNEL void sum_chunk(const float* a, const float* b, float* out, uint32_t rank) {
  const uint32_t chunk = (kUneven + kRanks - 1) / kRanks, start = rank * chunk;
  const uint32_t end = rounds_up ? start + chunk : min(start + chunk, kUneven);
  for (uint32_t i = start + threadIdx.x; i < end; i += blockDim.x) out[i] = a[i] + b[i];
}

template <bool rounds_up>
bool chunks_are_summed() {
  float* buffers[3];
  for (int rank = 0; rank < 3; ++rank) {
    cudaSetDevice(rank);
    buffers[rank] = filled<float>(kUneven, 1.0f);
  }
  emu::run_ranks(kRanks, [&](int rank) {
    TPK_LAUNCH(sum_chunk<rounds_up>, dim3(1), dim3(32), 0, nullptr, buffers[0], buffers[1], buffers[2],
               static_cast<uint32_t>(rank));
    EXPECT(cudaDeviceSynchronize() == cudaSuccess);
  });
  return values_of(buffers[2], kUneven) == std::vector<float>(kUneven, 2.0f);
}

CASE(right_chunks_are_silent) { must_be_silent(chunks_are_summed<false>); }
CASE(the_last_chunk_runs_past_the_peers_buffer) { must_die("heap-buffer-overflow", chunks_are_summed<true>); }

TPK_KERNEL void copy16(const char* from, char* to, uint32_t bytes) {
  for (uint32_t i = threadIdx.x * 16; i < bytes; i += blockDim.x * 16) store16(to + i, load16_peer(from + i));
}

CASE(a_vector_loop_without_a_scalar_tail) {
  must_die("heap-buffer-overflow", [] {
    TPK_LAUNCH(copy16, dim3(1), dim3(32), 0, nullptr, filled<char>(1000), filled<char>(1000), 1000u);
    return cudaDeviceSynchronize() == cudaSuccess;
  });
}

CASE(a_peer_frees_its_arena_too_early) {
  must_die("heap-use-after-free", [] {
    char* mine = filled<char>(512);
    cudaSetDevice(1);
    char* theirs = filled<char>(512);
    EXPECT(cudaFree(theirs) == cudaSuccess);
    cudaSetDevice(0);
    TPK_LAUNCH(copy16, dim3(1), dim3(32), 0, nullptr, theirs, mine, 512u);
    return cudaDeviceSynchronize() == cudaSuccess;
  });
}

// ---- shared and local memory ----------------------------------------------------------------------------------------

TPK_KERNEL void fill_shared(uint32_t* out, uint32_t n) {
  TPK_DYNAMIC_SHARED(uint32_t, values);
  for (uint32_t i = threadIdx.x; i < n; i += blockDim.x) values[i] = i;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];
}

bool shared_is_filled(uint32_t n) {
  uint32_t* out = filled<uint32_t>(32);
  TPK_LAUNCH(fill_shared, dim3(1), dim3(32), 400, nullptr, out, n);
  return values_of(out, 32)[31] == 31;
}

CASE(dynamic_shared_memory_filled_to_its_end_is_silent) {
  must_be_silent([] { return shared_is_filled(100); });
}
CASE(dynamic_shared_memory_is_overrun) {
  must_die("heap-buffer-overflow", [] { return shared_is_filled(101); });
}

TPK_KERNEL void shift_shared(uint32_t* out) {
  __shared__ uint32_t values[64];
  values[threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x + 1];
}

CASE(static_shared_memory_one_past_the_end) {
  must_die("index 64 out of bounds", [] {
    TPK_LAUNCH(shift_shared, dim3(1), dim3(64), 0, nullptr, filled<uint32_t>(64));
    return cudaDeviceSynchronize() == cudaSuccess;
  });
}

TPK_KERNEL void fill_local(uint32_t* out, uint32_t n) {
  uint32_t values[8];
  uint32_t* at = values;
  for (uint32_t i = 0; i < n; ++i) at[i] = i;
  __syncwarp();
  out[threadIdx.x] = values[threadIdx.x % 8];
}

CASE(a_local_array_is_overrun) {
  must_die("stack-buffer-overflow", [] {
    TPK_LAUNCH(fill_local, dim3(1), dim3(32), 0, nullptr, filled<uint32_t>(32), 9u);
    return cudaDeviceSynchronize() == cudaSuccess;
  });
}

// ---- arithmetic of addresses ----------------------------------------------------------------------------------------

TPK_KERNEL void cast16(const float* from, float* to) {
  *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from + 1);
}

CASE(a_cast_to_16_bytes_at_an_odd_value) {
  must_die("misaligned address", [] {
    TPK_LAUNCH(cast16, dim3(1), dim3(1), 0, nullptr, filled<float>(8), filled<float>(8));
    return cudaDeviceSynchronize() == cudaSuccess;
  });
}

TPK_KERNEL void index_in_int(const float* from, float* to, int rows, int width) {
  to[0] = from[rows * width < 0 ? 0 : 1];
}

CASE(an_index_that_overflows_int) {
  must_die("signed integer overflow", [] {
    TPK_LAUNCH(index_in_int, dim3(1), dim3(1), 0, nullptr, filled<float>(8), filled<float>(8), 70000, 70000);
    return cudaDeviceSynchronize() == cudaSuccess;
  });
}

}  // namespace
