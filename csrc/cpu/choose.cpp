#include "choose.h"

#include <atomic>

#include "core/arena.h"
#include "core/check.h"
#include "cpu/chunks.h"
#include "cpu/loops/gemv.h"
#include "cpu/transport/shm.h"

namespace tpk {
namespace {

std::atomic<bool> onednn_available{false};

Cpu found_cpu() {
#if defined(__x86_64__)
  return {__builtin_cpu_is("amd") != 0, __builtin_cpu_supports("avx512f") != 0};
#else
  return {};
#endif
}

std::atomic<Cpu>& cpu() {
  static std::atomic<Cpu> instance{found_cpu()};
  return instance;
}

bool is_for_gemv(const GemmShape& shape) {
  return shape.dtype == DType::BF16 && shape.M <= static_cast<int64_t>(kMostGemvRows) && !shape.is_empty();
}

bool can_multiply(Engine engine, const GemmShape& shape) {
  switch (engine) {
    case Engine::OneDnn: return onednn_available && shape.dtype == DType::F32 && !shape.is_empty();
    case Engine::Gemv: return is_for_gemv(shape);
    default: return true;
  }
}

EngineChoice choose_for_bf16(const GemmShape& shape) {
  // Against ATen, one core (Zen 4), weights that the caches do not hold: 1.25 to 2.5 times as fast for one row, where
  // it reads the weights at 11 to 18 GB/s; 1.14 to 1.6 times for two to four. Without AVX-512 the sums of four rows do
  // not fit the registers.
  if (shape.M == 1) return {Engine::Gemv, "rule: one row in bf16, bound by memory"};
  if (is_for_gemv(shape) && cpu().load().avx512) return {Engine::Gemv, "rule: few rows in bf16, AVX-512"};
  return {Engine::Aten, "rule: bf16 of many rows; aten calls oneDNN itself where it can"};
}

EngineChoice choose_for_fp32(const GemmShape& shape) {
  if (!onednn_available) return {Engine::Aten, "this torch has no oneDNN"};
  // oneDNN against MKL, one core each. Zen 4: 1.3 to 1.9 times as fast from 16 rows on. Zen 3, which has no
  // AVX-512: 1.2 to 1.6 times at 4 to 64 rows and weights that the caches do not hold, 1.1 at 128, behind from 256 on
  // and for small weights.
  constexpr int64_t kLargeWeights = int64_t{4} << 20;
  const Cpu here = cpu();
  if (!here.amd) return {Engine::Aten, "rule: not an AMD core"};
  if (here.avx512) {
    if (shape.M < 8) return {Engine::Aten, "rule: few rows, bound by memory"};
    return {Engine::OneDnn, "rule: oneDNN beats MKL on AMD cores with AVX-512 from 8 rows on"};
  }
  if (shape.N * shape.K < kLargeWeights) {
    return {Engine::Aten, "rule: AMD core without AVX-512, weights fit the caches"};
  }
  if (shape.M < 4 || shape.M > 128) return {Engine::Aten, "rule: AMD core without AVX-512, not 4 to 128 rows"};
  return {Engine::OneDnn, "rule: AMD core, large weights, 4 to 128 rows"};
}

}  // namespace

void assume_cpu(std::optional<Cpu> other) { cpu() = other.value_or(found_cpu()); }

void set_onednn_available(bool available) { onednn_available = available; }

EngineChoice choose_engine(const MeasuredEngines& measured, const GemmShape& shape) {
  if (shape.dtype != DType::F32 && shape.dtype != DType::BF16) {
    return {Engine::Aten, "only fp32 and bf16 have several engines"};
  }
  if (shape.is_empty()) return {Engine::Aten, "nothing to multiply"};
  const std::optional<Engine> found = measured.find(shape);
  if (found.has_value() && can_multiply(*found, shape)) return {*found, "measured on this machine"};
  return shape.dtype == DType::BF16 ? choose_for_bf16(shape) : choose_for_fp32(shape);
}

const char* obstacle_to_arena(const Communicator& comm, const Wire& wire, const ReducedGemm& gemm, Engine engine) {
  const size_t bytes = gemm.shape.product_bytes();
  if (comm.heap_bytes() == 0) return "this transport has no arena";
  if (!wire.is_plain()) return "the codec packs it";
  // A bias would be added in a second step there, which rounds twice and gives other bits than the GEMM's own bias.
  if (gemm.has_bias) return "the GEMM adds a bias";
  if (gemm.dim != 0) return "it is cut along another dimension than the first";
  if (gemm.shape.K == 0) return "nothing to multiply";
  if (bytes < kSmallestInArena) return "below 64 KiB a copy takes less time than a block of the heap";
  if (bytes > comm.heap_bytes()) return "it is larger than the arena's heap";
  if (engine == Engine::OneDnn) return "oneDNN allocates its own output";
  return nullptr;
}

namespace {

bool is_transport(const Communicator& comm, const char* name) { return std::string(comm.transport()) == name; }

Explained explain_all_reduce(const Wire& wire, size_t numel) {
  const size_t bytes = wire.bytes(numel);
  if (ShmCommunicator::is_one_shot(wire, numel)) {
    return {"one_shot", concat(bytes, " bytes: every rank reads all inputs, up to ", kOneShotBytes, " bytes")};
  }
  return {"two_shot", concat(bytes, " bytes: each rank sums a part, in pieces of ", kPieceBytes, " bytes")};
}

Explained explain_collective(const Communicator& comm, const std::string& op, const Wire& wire, size_t numel) {
  if (is_transport(comm, "local")) return {"local", "one rank: nothing is sent"};
  if (is_transport(comm, "group")) {
    return {"exchange", "all-to-all between the ranks, sums taken locally in rank order"};
  }
  if (op == "all_reduce" || op == "all_reduce_") return explain_all_reduce(wire, numel);
  return {"direct", concat("each rank reads what it needs, in pieces of ", kPieceBytes, " bytes")};
}

// The number of chunks of a GEMM; of one that gathers or scatters, chunks of the other ranks' rows and all own rows.
size_t num_chunks(const Communicator& comm, const CallShape& call, const Wire& wire, const GemmShape& shape) {
  if (call.dim != 0) return 1;
  const bool gathers = call.op == "all_gather_gemm";
  const size_t rows = static_cast<size_t>(shape.M), values = static_cast<size_t>(gathers ? shape.K : shape.N);
  const size_t chunks = chunk_ends(comm, wire, rows, values).size();
  if (chunks == 1 || call.op == "gemm_all_reduce") return chunks;
  const size_t others = static_cast<size_t>(comm.world_size()) - 1;
  return others * chunk_ends(comm, wire, Cut::even(rows, comm.world_size()).largest(), values).size() + 1;
}

// The heap may be full of tensors of group.empty: only an attempt shows it, here as in the op.
bool has_room(Communicator& comm, size_t bytes) {
  void* const block = comm.heap_allocate(bytes);
  if (block != nullptr) comm.heap_free(block);
  return block != nullptr;
}

Explained explain_gemm(Communicator& comm, const CallShape& call, const Wire& wire) {
  const bool gathers = call.op == "all_gather_gemm";
  const GemmShape shape{wire.dtype, gathers ? call.M * comm.world_size() : call.M, call.N, call.K};
  const EngineChoice choice = choose_engine(comm.measured_engines(), shape);
  const std::string gemm = concat("GEMM by ", name_of(choice.engine), " (", choice.reason, ")");
  if (call.op == "replicated_gemm") return {"unfused", concat(gemm, "; the forward sends nothing")};
  const size_t chunks = num_chunks(comm, call, wire, shape);
  if (chunks > 1) {
    const char* const order = gathers ? "multiplied while others arrive" : "sent while others are multiplied";
    return {concat("chunked(", chunks, ")"), concat("rows are ", order, ", by a thread of the group; ", gemm)};
  }
  if (gathers) {
    const Explained gather = explain_collective(comm, "all_gather", wire, static_cast<size_t>(shape.M * shape.K));
    return {"unfused", concat(gather.path, ": ", gather.reason, "; then ", gemm)};
  }
  const char* obstacle = obstacle_to_arena(comm, wire, {shape, call.has_bias, call.dim}, choice.engine);
  if (obstacle == nullptr && has_room(comm, shape.product_bytes())) {
    return {"fused", concat(gemm, " writes into the arena, summed where it lies")};
  }
  if (obstacle == nullptr) obstacle = "the arena's heap has no room";
  const char* const collective = call.op == "gemm_all_reduce" ? "all_reduce" : "reduce_scatter";
  const Explained sum = explain_collective(comm, collective, wire, static_cast<size_t>(shape.M * shape.N));
  return {"unfused", concat(gemm, ", not into the arena (", obstacle, "), then ", sum.path, ": ", sum.reason)};
}

DType dtype_named(const std::string& name) {
  for (uint8_t i = 0; i < static_cast<uint8_t>(DType::Count); ++i) {
    if (name == name_of(static_cast<DType>(i))) return static_cast<DType>(i);
  }
  throw std::invalid_argument(concat("explain: unknown dtype ", name));
}

bool is_gemm(const std::string& op) {
  return op == "gemm_all_reduce" || op == "gemm_reduce_scatter" || op == "all_gather_gemm" || op == "replicated_gemm";
}

}  // namespace

Explained explain(Communicator& comm, const CallShape& call) {
  const DType dtype = dtype_named(call.dtype);
  const Codec codec = codec_of(call.codec);
  TPK_CHECK(codec != Codec::Count, "explain: no codec ", call.codec);
  const bool gemm = is_gemm(call.op);
  TPK_CHECK(!gemm || dtype <= DType::F16, "explain: dtype must be one of float32, float64, bfloat16, float16, got ",
            call.dtype);
  const bool moves = call.op == "all_gather" && dtype >= DType::Raw1;  // no arithmetic: any dtype is moved
  const Wire* const wire = find_wire(dtype, codec, moves ? ReduceOp::None : ReduceOp::Sum);
  TPK_CHECK(wire != nullptr, "explain: ", call.op, " takes no ", call.dtype, " with codec ", call.codec);
  return gemm ? explain_gemm(comm, call, *wire) : explain_collective(comm, call.op, *wire, call.numel);
}

}  // namespace tpk
