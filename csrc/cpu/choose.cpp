#include "choose.h"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "core/check.h"
#include "cpu/chunks.h"
#include "cpu/loops/gemv.h"
#include "cpu/transport/hierarchical_transport.h"
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
  const bool has_path = shape.dtype == DType::F32 || shape.dtype == DType::BF16 || shape.dtype == DType::F16;
  return has_path && shape.M <= static_cast<int64_t>(kMostGemvRows) && !shape.is_empty();
}

EngineChoice choose_for_fp32(const GemmShape& shape) {
  if (!onednn_available) return {Engine::Aten, "this torch has no oneDNN", {}};
  // oneDNN against MKL, one core each. Zen 4: 1.3 to 1.9 times as fast from 16 rows on. Zen 3, which has no
  // AVX-512: 1.2 to 1.6 times at 4 to 64 rows and weights that the caches do not hold, 1.1 at 128, behind from 256 on
  // and for small weights.
  constexpr int64_t kLargeWeights = int64_t{4} << 20;
  const Cpu here = cpu();
  if (!here.amd) return {Engine::Aten, "rule: not an AMD core", {}};
  if (here.avx512) {
    return {Engine::OneDnn, "rule: oneDNN beats MKL on AMD cores with AVX-512", {}};
  }
  if (shape.N * shape.K < kLargeWeights) {
    return {Engine::Aten, "rule: AMD core without AVX-512, weights fit the caches", {}};
  }
  if (shape.M > 128) return {Engine::Aten, "rule: AMD core without AVX-512, over 128 rows", {}};
  return {Engine::OneDnn, "rule: AMD core, large weights, at most 128 rows", {}};
}

}  // namespace

void assume_cpu(std::optional<Cpu> other) { cpu() = other.value_or(found_cpu()); }

void set_onednn_available(bool available) { onednn_available = available; }

bool can_multiply(Engine engine, const GemmShape& shape) {
  switch (engine) {
    case Engine::OneDnn: return onednn_available && shape.dtype == DType::F32 && !shape.is_empty();
    case Engine::Gemv: return is_for_gemv(shape);
    default: return true;
  }
}

EngineChoice choose_engine(const MeasuredEngines& measured, const GemmShape& shape) {
  if (shape.dtype > DType::F16 || shape.dtype == DType::F64)
    return {Engine::Aten, "one engine multiplies this dtype", {}};
  if (shape.is_empty()) return {Engine::Aten, "nothing to multiply", {}};
  const std::optional<MeasuredProduct> found = measured.find(shape);
  if (found.has_value()) {
    Engine best = Engine::Count;
    for (const Engine engine : kAllEngines) {
      const double us = can_multiply(engine, shape) ? found->times[engine] : kNotMeasured;
      if (us < (best == Engine::Count ? kNotMeasured : found->times[best])) best = engine;
    }
    if (best != Engine::Count) return {best, nullptr, found};
  }
  // Also where ATen is faster (Intel with AMX, one core: fp32 of 1 to 3 rows up to 1.9 times, bf16 of 6 to 8 rows up to
  // 1.5 times): a row has the same bits in any number of rows, so that sequences have beside others those they have
  // alone.
  if (is_for_gemv(shape)) return {Engine::Gemv, "rule: at most eight rows, bound by the reading of weights", {}};
  if (shape.dtype == DType::F32) return choose_for_fp32(shape);
  return {Engine::Aten, "rule: many rows of 16 bits; aten calls oneDNN itself where it can", {}};
}

namespace {

double operations(const GemmShape& shape) {
  return 2.0 * static_cast<double>(shape.M) * static_cast<double>(shape.N) * static_cast<double>(shape.K);
}

}  // namespace

double expected_seconds(const MeasuredEngines& measured, const GemmShape& shape) {
  const EngineChoice choice = choose_engine(measured, shape);
  if (choice.measured.has_value()) {
    const MeasuredProduct& at = *choice.measured;
    return at.times[choice.engine] * 1e-6 * operations(shape) / operations(at.shape);
  }
  return operations(shape) / (size_of(shape.dtype) == 2 ? 2e11 : 1e11);
}

// "measured at 16x4096x4096: onednn 3357 us, aten 4498 us", the fastest first; for another shape, from its nearest
// point, "about 1700 us by onednn, 2200 us by aten, from 16x4096x4096": times in proportion to the operations.
std::string EngineChoice::reason(const GemmShape& shape) const {
  if (!measured.has_value()) return rule;
  const GemmShape& at = measured->shape;
  const bool own = at.M == shape.M && at.N == shape.N && at.K == shape.K;
  auto engines = kAllEngines;
  std::stable_sort(engines.begin(), engines.end(),
                   [&](Engine a, Engine b) { return measured->times[a] < measured->times[b]; });
  const std::string point = concat(at.M, "x", at.N, "x", at.K);
  std::string text = own ? concat("measured at ", point, ":") : "about";
  const char* separator = " ";
  for (const Engine candidate : engines) {
    double us = measured->times[candidate];
    if (us == kNotMeasured || !can_multiply(candidate, shape)) continue;
    us *= operations(shape) / operations(at);
    const double shown = us < 10 ? std::round(us * 10) / 10 : std::round(us);
    text += own ? concat(separator, name_of(candidate), " ", shown, " us")
                : concat(separator, shown, " us by ", name_of(candidate));
    separator = ", ";
  }
  return own ? text : text + ", from " + point;
}

std::vector<size_t> gathered_ends(const Communicator& comm, const Wire& wire, const GemmShape& shape) {
  const size_t rows = static_cast<size_t>(shape.M), values = static_cast<size_t>(shape.K);
  if (!is_for_thread(comm, wire, rows * values) || !comm.cuts_parts() || comm.forced_chunks == 1) return {};
  if (comm.gathers_in_one_exchange(wire.bytes(rows * values))) return {};
  if (comm.forced_chunks > 1) return chunk_ends(comm, wire, Cut::even(rows, comm.world_size()).largest(), values, 1);
  const size_t weight_bytes = static_cast<size_t>(shape.N) * values * size_of(shape.dtype);
  return ends_of_gathered(comm, wire, rows, values, expected_seconds(comm.measured_engines(), shape), weight_bytes);
}

namespace {

bool is_transport(const Communicator& comm, const char* name) { return std::string(comm.transport()) == name; }

Explained explain_all_reduce(const Communicator& comm, const Wire& wire, size_t numel) {
  const size_t bytes = wire.bytes(numel), limit = comm.one_shot_bytes;
  const char* const why = comm.is_one_shot_measured ? ", as measured" : "";
  if (comm.is_one_shot(wire, numel)) {
    return {"one_shot", concat(bytes, " bytes: every rank reads all inputs, up to ", limit, " bytes", why)};
  }
  return {"two_shot", concat(bytes, " bytes: each rank sums a part, beyond ", limit, " bytes", why, ", in pieces of ",
                             kPieceBytes, " bytes")};
}

Explained explain_collective(const Communicator& comm, const std::string& op, const Wire& wire, size_t numel) {
  const bool sums_all = op == "all_reduce" || op == "all_reduce_";
  if (is_transport(comm, "group") && sums_all && comm.sums_in_one_exchange(wire, numel, false)) {
    return {"one_exchange", "every rank sends all values to all others, which sum them in rank order"};
  }
  if (const std::optional<Explained> found = explain_transport(comm)) return *found;
  if (is_transport(comm, "hierarchical")) {
    const bool gathers = op == "all_gather";
    const auto& between = static_cast<const HierarchicalCommunicator&>(comm);
    const char* const what = "inside the hosts over shared memory; between them each value once";
    if (gathers ? between.gathers_in_one_exchange(wire.bytes(numel))
                : between.sums_in_one_exchange(wire, numel, !sums_all)) {
      return {"one_exchange", concat(what, gathers ? "" : ", as a host's sum", ", in one exchange")};
    }
    return {"hierarchical", concat(what, gathers ? "" : ", as a host's sum")};
  }
  if (sums_all) return explain_all_reduce(comm, wire, numel);
  return {"direct", concat("each rank reads what it needs, in pieces of ", kPieceBytes, " bytes")};
}

// The number of chunks of a GEMM; of one that gathers, or scatters chunks of rows, chunks of the other ranks' rows and
// all own rows.
size_t num_chunks(const Communicator& comm, const CallShape& call, const Wire& wire, const GemmShape& shape) {
  if (call.dim != 0) return 1;
  const size_t rows = static_cast<size_t>(shape.M), near = comm.near_ranks().size();
  const size_t others = static_cast<size_t>(comm.world_size()) - near;
  if (call.op == "all_gather_gemm") {
    const size_t chunks = gathered_ends(comm, wire, shape).size();
    return chunks == 0 ? 1 : others * chunks + 1;
  }
  const size_t columns = static_cast<size_t>(shape.N);
  const bool sums_all = call.op == "gemm_all_reduce";
  if (!sums_all && !comm.cuts_parts()) return 1;
  const ChunkCut cut = chunks_of_sum(comm, wire, rows, columns, sums_all ? 2 : 1);
  if (cut.ends.size() == 1) return 1;
  if (sums_all) return blocks_of_sum(comm, wire, cut, rows, columns).size();
  if (cut.of_columns) return cut.ends.size();
  return others * chunk_ends(comm, wire, Cut::even(rows, comm.world_size()).largest(), columns, 1).size() + near;
}

Explained explain_product(Communicator& comm, const CallShape& call, const Wire& wire, const GemmShape& shape,
                          const EngineChoice& choice) {
  const bool gathers = call.op == "all_gather_gemm";
  const std::string gemm = concat("GEMM by ", name_of(choice.engine), " (", choice.reason(shape), ")");
  if (call.op == "replicated_gemm") return {"unfused", concat(gemm, "; the forward sends nothing")};
  const size_t chunks = num_chunks(comm, call, wire, shape);
  if (chunks > 1) {
    const char* const order = gathers ? "multiplied while others arrive" : "sent while others are multiplied";
    const std::string link =
        comm.link_bytes_per_s > 0 ? concat(" over a link of ", std::round(comm.link_bytes_per_s / 1e6), " MB/s") : "";
    return {concat("chunked(", chunks, ")"),
            concat("rows are ", order, ", by a thread of the group", link, "; ", gemm)};
  }
  if (gathers) {
    const Explained gather = explain_collective(comm, "all_gather", wire, static_cast<size_t>(shape.M * shape.K));
    return {"unfused", concat(gather.path, ": ", gather.reason, "; then ", gemm)};
  }
  const char* const collective = call.op == "gemm_all_reduce" ? "all_reduce" : "reduce_scatter";
  const Explained sum = explain_collective(comm, collective, wire, static_cast<size_t>(shape.M * shape.N));
  return {"unfused", concat(gemm, "; then ", sum.path, ": ", sum.reason)};
}

Explained explain_gemm(Communicator& comm, const CallShape& call, const Wire& wire) {
  const int64_t rows = call.op == "all_gather_gemm" ? call.M * comm.world_size() : call.M;
  const GemmShape shape{wire.dtype, rows, call.N, call.K};
  const EngineChoice choice = choose_engine(comm.measured_engines(), shape);
  Explained found = explain_product(comm, call, wire, shape, choice);
  found.engine = name_of(choice.engine);
  return found;
}

}  // namespace

Explained explain(Communicator& comm, const CallShape& call) {
  const Wire& wire = wire_of(call);
  return call.is_gemm() ? explain_gemm(comm, call, wire) : explain_collective(comm, call.op, wire, call.numel);
}

}  // namespace tpk
