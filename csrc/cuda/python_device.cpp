#include "python_device.h"

#include "core/check.h"
#include "cuda/comm/device_group.h"
#include "cuda/comm/peer_communicator.h"
#include "stream.h"

namespace tpk::cuda {
namespace {

// torch's current stream is the one that this thread launches on, for as long as Python enqueues something.
class TorchStream {
 public:
  explicit TorchStream(int device) : device_(device), before_(torch_stream(device)) {
    set_torch_stream(device_, current_stream());
  }
  ~TorchStream() { set_torch_stream(device_, before_); }
  TorchStream(const TorchStream&) = delete;
  TorchStream& operator=(const TorchStream&) = delete;

 private:
  const int device_;
  const cudaStream_t before_;
};

class PythonDeviceExchange final : public PythonExchange<DeviceExchange> {
 public:
  using Parent = PythonExchange<DeviceExchange>;
  PythonDeviceExchange(int device, py::object exchange)
      : Parent(exchange),
        device_(device),
        marks_(py::getattr(exchange, "marks_pointer", py::int_(0)).template cast<uintptr_t>()) {}
  void start(const std::vector<size_t>& send_bytes, const std::vector<size_t>& receive_bytes) override {
    const TorchStream stream(device_);
    Parent::start(send_bytes, receive_bytes);
  }
  void wait(uint64_t call) override {
    const TorchStream stream(device_);
    Parent::wait(call);
  }
  void synchronise(uint64_t call) override {
    const TorchStream stream(device_);
    guarded([&](py::object& exchange) { exchange.attr("synchronise")(call); });
  }
  void* marks() override { return reinterpret_cast<void*>(marks_); }
  void raise_given_up() override {
    guarded([&](py::object& exchange) { exchange.attr("raise_given_up")(); });
  }
  std::vector<std::vector<int64_t>> agree(const std::vector<int64_t>& mine) override {
    return guarded([&](py::object& exchange) {
      return exchange.attr("agree")(mine).template cast<std::vector<std::vector<int64_t>>>();
    });
  }

 private:
  const int device_;
  const uintptr_t marks_;
};

// Also what must live as long as the communicator: the arena's tensor and its handle.
template <class Comm, class... Args>
std::shared_ptr<DeviceCommunicator> registered(py::object keeps, int device, Args&&... args) {
  const DeviceScope scope(device);
  auto kept = std::make_shared<OwnedObject>(std::move(keeps));
  const std::shared_ptr<DeviceCommunicator> comm(new Comm(std::forward<Args>(args)...),
                                                 [kept](DeviceCommunicator* dead) { delete dead; });
  register_communicator(comm);
  return comm;
}

std::shared_ptr<DeviceCommunicator> open_peer(const std::string& name, const std::string& label, int rank,
                                              int world_size, double timeout_s, int device,
                                              const std::vector<uintptr_t>& arenas, uintptr_t multicast,
                                              size_t arena_bytes, py::object keeps) {
  return registered<PeerCommunicator>(std::move(keeps), device, name, label, rank, world_size, timeout_s, device,
                                      arenas, arena_bytes, multicast);
}

std::shared_ptr<DeviceCommunicator> open_group(const std::string& name, const std::string& label, int rank,
                                               int world_size, double timeout_s, int device, py::object exchange) {
  return registered<DeviceGroupCommunicator>(py::none(), device, name, label, rank, world_size, timeout_s, device,
                                             std::make_unique<PythonDeviceExchange>(device, std::move(exchange)));
}

// device < 0: this thread's current one.
std::shared_ptr<Communicator> open_local(const std::string& name, const std::string& label, int device) {
  if (device < 0) TPK_CUDA_CHECK(cudaGetDevice(&device));
  std::shared_ptr<Communicator> comm = make_local(name, label, device);
  register_communicator(comm);
  return comm;
}

void force(DeviceCommunicator& comm, const std::string& path, int blocks, int parts, int grid) {
  for (Path candidate : {Path::Rule, Path::OneShot, Path::TwoShot, Path::Multicast, Path::Fused}) {
    if (path != name_of(candidate)) continue;
    TPK_CHECK(blocks >= 0 && blocks <= kMaxBlocks, "force: blocks must be in [0, ", kMaxBlocks, "], got ", blocks);
    TPK_CHECK(parts >= 0, "force: parts must not be negative, got ", parts);
    TPK_CHECK(grid == 0 || grid >= 2, "force: grid must be 0 or 2 blocks at least, got ", grid);
    return comm.force({candidate, blocks, parts, grid});
  }
  throw std::invalid_argument(
      concat("force: path must be '', one_shot, two_shot, multicast or fused, got '", path, "'"));
}

void share_device(DeviceCommunicator& comm, int ranks) {
  TPK_CHECK(ranks >= 1 && ranks <= comm.world_size(), "share_device: ranks must be in [1, ", comm.world_size(),
            "], got ", ranks);
  comm.share_device(ranks);
}

Explained explain_collective(const DeviceCommunicator& comm, const std::string& op, const Wire& wire, size_t numel) {
  if (const std::optional<Explained> found = explain_transport(comm)) return *found;
  if (op != "all_reduce" && op != "all_reduce_") return {"direct", "each rank reads what it needs of its peers"};
  const Choice choice =
      choose_all_reduce(comm.machine(), comm.forced(), wire.dtype, ReduceOp::Sum, wire.codec, wire.bytes(numel));
  return {name_of(choice.path), concat(choice.reason, ", ", choice.blocks, " blocks")};
}

// What the rule has compared, in microseconds.
std::string compared(const GemmTimes& times, int parts) {
  const auto us = [](double time) { return std::to_string(std::llround(time)); };
  const std::string chunked = std::isfinite(times.chunked) ? concat(", chunked(", parts, ") ", us(times.chunked)) : "";
  return concat(times.measured ? "measured us: fused " : "expected us (a model, not measured): fused ", us(times.fused),
                times.measured ? ", otherwise " : ", unfused ", us(times.unfused), chunked);
}

// The reason for which a GEMM is not fused.
std::string not_fused(const GemmChoice& choice, const Forced& forced) {
  if (choice.times) return concat("not fused: ", compared(*choice.times, choice.parts), "; ");
  return concat(forced.path == Path::Fused ? "fused was asked for, but " : "not fused: ", choice.obstacle, "; ");
}

// What path fused sends under a codec.
std::string packed(const ShardedGemm& gemm) {
  if (gemm.codec == Codec::None) return "";
  const auto columns = static_cast<uint32_t>(gemm.shared);
  const double each = static_cast<double>(sent_row_bytes(gemm.codec, columns)) / columns;
  return concat("codec ", name_of(gemm.codec), " sends ", each, " bytes a value, ");
}

// A call as the ops choose its path, and its backward with both gradients, which sends by the dual collective
// (fused_kind). Of gemm_all_reduce nothing is sent backward, of replicated_gemm nothing forward.
ShardedGemm forward_of(const CallShape& call, const Wire& wire, int64_t ranks) {
  if (call.op == "all_gather_gemm") return {Op::AllGatherGemm, wire.dtype, wire.codec, call.M * ranks, call.K, call.N};
  const Op op = call.op == "gemm_all_reduce" ? Op::GemmAllReduce : Op::GemmReduceScatter;
  return {op, wire.dtype, wire.codec, call.M, call.N, call.K};
}
ShardedGemm backward_of(const CallShape& call, const Wire& wire, int64_t ranks) {
  if (call.op == "gemm_reduce_scatter") {
    return {Op::GemmReduceScatterBackward, wire.dtype, wire.codec, call.M, call.N, call.K, true};
  }
  const bool gathered = call.op == "all_gather_gemm";
  const Op op = gathered ? Op::AllGatherGemmBackward : Op::ReplicatedGemmBackward;
  return {op, wire.dtype, wire.codec, gathered ? call.M * ranks : call.M, call.K, call.N, true};
}

// The path of the backward, as "; backward: path".
std::string explain_backward(const DeviceCommunicator& comm, const CallShape& call, const Wire& wire) {
  if (call.op == "gemm_all_reduce") return "; backward: nothing is sent";
  if (call.op != "replicated_gemm" && call.dim != 0) return "; backward: unfused";
  const ShardedGemm gemm = backward_of(call, wire, comm.world_size());
  const GemmChoice choice = comm.choose(gemm);
  const bool refused = comm.forced().path == Path::Fused && !choice.fused;
  const std::string why = choice.times ? concat(" (", compared(*choice.times, choice.parts), ")")
                          : refused    ? concat(" (fused was asked for, but ", choice.obstacle, ")")
                                       : "";
  // Of the others dx is multiplied whole, and sent while dw is multiplied.
  const bool chunked = gemm.op == Op::GemmReduceScatterBackward && choice.parts > 1;
  return concat("; backward: ",
                choice.fused ? "fused"
                : chunked    ? concat("chunked(", choice.parts, ")")
                             : "unfused",
                why);
}

// A bias is the GEMM's own and changes no path; a gather or a scatter along another dim than 0 is not cut into parts.
Explained explain_gemm(const DeviceCommunicator& comm, const CallShape& call, const Wire& wire) {
  if (call.op == "replicated_gemm") {
    return {"unfused", concat("nothing is sent in the forward", explain_backward(comm, call, wire))};
  }
  if (call.op != "gemm_all_reduce" && call.dim != 0) {
    return {"unfused", concat("dim ", call.dim, ": only rows of dim 0 are sent while others are multiplied",
                              explain_backward(comm, call, wire))};
  }
  const int64_t ranks = comm.world_size();
  const ShardedGemm gemm = forward_of(call, wire, ranks);
  const GemmChoice choice = comm.choose(gemm);
  if (choice.fused) {
    const FusedPlan plan = plan_fused(comm.machine(), comm.forced(), gemm);
    const int64_t part = (gemm.M + ranks - 1) / ranks, most = plan.piece_rows;
    const std::string times = choice.times ? concat(compared(*choice.times, choice.parts), "; ") : "";
    return {"fused", concat(choice.reason, "; ", times, packed(gemm), "tiles of ", kTileRows, " x ", plan.tile_columns,
                            ", ", (part + most - 1) / most, " pieces, ", plan.communicating, " blocks ",
                            gemm.gathers() ? "gather" : "sum", " and ", plan.multiplying, " multiply",
                            explain_backward(comm, call, wire))};
  }
  const char* const collective = gemm.gathers()                 ? "all_gather"
                                 : gemm.op == Op::GemmAllReduce ? "all_reduce"
                                                                : "reduce_scatter";
  const Explained transfer = explain_collective(
      comm, collective, wire, static_cast<size_t>(call.M * gemm.shared) / static_cast<size_t>(choice.parts));
  return {choice.parts == 1 ? "unfused" : concat("chunked(", choice.parts, ")"),
          concat(not_fused(choice, comm.forced()), choice.reason, "; sent by ", transfer.path, ": ", transfer.reason,
                 explain_backward(comm, call, wire))};
}

// What a call took by path fused and by the rule's other way, in microseconds, the same on all ranks.
void add_measured_path(DeviceCommunicator& comm, const std::string& op, const std::string& dtype,
                       const std::string& codec, int64_t M, int64_t N, int64_t K, bool backward, double fused_us,
                       double others_us) {
  const CallShape call{op, dtype, codec, M, N, K, 0, 0};
  TPK_CHECK(call.is_gemm() && op != (backward ? "gemm_all_reduce" : "replicated_gemm"),
            "add_measured_path: op must be a GEMM that sends, got ", op);
  TPK_CHECK(fused_us > 0 && others_us > 0, "add_measured_path: times must be positive, got ", fused_us, " and ",
            others_us);
  const Wire& wire = wire_of(call);
  const auto of = backward ? backward_of : forward_of;
  comm.measured_paths().add(of(call, wire, comm.world_size()), {fused_us, others_us});
}

Explained explain(DeviceCommunicator& comm, const CallShape& call) {
  const Wire& wire = wire_of(call);
  return call.is_gemm() ? explain_gemm(comm, call, wire) : explain_collective(comm, call.op, wire, call.numel);
}

}  // namespace

void add_device_groups(py::module_& m) {
  add_communicator<DeviceCommunicator>(m)
      .def_property_readonly("address", [](DeviceCommunicator&) { return 0; })  // no fast path past the dispatcher
      .def_property_readonly("device", &DeviceCommunicator::device)
      .def("force", &force, py::arg("path") = "", py::arg("blocks") = 0, py::arg("parts") = 0, py::arg("grid") = 0)
      .def("share_device", &share_device, py::arg("ranks"))
      .def("note_shards", &DeviceCommunicator::note_shards, py::arg("even"))
      .def("add_measured_path", &add_measured_path, py::arg("op"), py::arg("dtype"), py::arg("codec"), py::arg("M"),
           py::arg("N"), py::arg("K"), py::arg("backward"), py::arg("fused_us"), py::arg("others_us"));
  m.def("open_peer", &open_peer, py::arg("name"), py::arg("label"), py::arg("rank"), py::arg("world_size"),
        py::arg("timeout_s"), py::arg("device"), py::arg("arenas"), py::arg("multicast"), py::arg("arena_bytes"),
        py::arg("keeps"));
  m.def("open_group", &open_group, py::arg("name"), py::arg("label"), py::arg("rank"), py::arg("world_size"),
        py::arg("timeout_s"), py::arg("device"), py::arg("exchange"));
  m.def(
      "open_local",
      [](const std::string& name, const std::string& label, int device) {
        return std::static_pointer_cast<DeviceCommunicator>(open_local(name, label, device));
      },
      py::arg("name"), py::arg("label"), py::arg("device") = -1);
  add_explain<DeviceCommunicator>(m, &explain);
}

void add_device_limits(py::dict& limits) {
  limits["max_peers"] = kMaxPeers;
  limits["max_blocks"] = kMaxBlocks;
  limits["signal_bytes"] = kSignalBytes;
  limits["min_arena_bytes"] = DeviceArena::kMinBytes;
  limits["one_shot_bytes_up_to_4"] = kOneShotBytesUpTo4;
  limits["one_shot_bytes_up_to_8"] = kOneShotBytesUpTo8;
  limits["multicast_bytes"] = kMulticastBytes;
}

}  // namespace tpk::cuda
