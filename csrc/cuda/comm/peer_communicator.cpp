#include "peer_communicator.h"

#include <algorithm>
#include <numeric>

#include "core/bytes.h"
#include "core/check.h"

namespace tpk::cuda {
namespace {

constexpr size_t kHeapUnit = 16;  // of offsets in announcements
constexpr size_t kPage = Heap::kPage;

// Of every rank's stretch the values [start, start + piece), as far as it has them.
DeviceCut piece_of(const Cut& cut, const Stretch& stretch, int world_size, size_t start, size_t piece) {
  DeviceCut part{};
  for (int r = 0; r < world_size; ++r) {
    part.first[r] = cut.start(r) + stretch.piece_begin(r, start);
    part.count[r] = stretch.piece_size(r, start, piece);
  }
  return part;
}

// The same where all ranks bring their parts, of the sizes that the cut gives them.
DeviceCut brought_piece(const Cut& cut, const Stretch& stretch, int world_size, size_t start, size_t piece) {
  DeviceCut part = piece_of(cut, stretch, world_size, start, piece);
  for (int r = 0; r < world_size; ++r) part.brings[r] = static_cast<uint32_t>(cut.size(r));
  return part;
}

}  // namespace

DeviceArena DeviceArena::of(size_t bytes) {
  TPK_CHECK(bytes >= kMinBytes && bytes % kPage == 0, "Group.open: arena_bytes must be a multiple of ", kPage,
            ", at least ", kMinBytes, ", got ", bytes);
  // A quarter for each slot leaves half of the arena for the heap.
  return {bytes, bytes >= 4 * kMaxSlotBytes ? kMaxSlotBytes : (bytes - kSignalBytes) / 4 / kPage * kPage};
}

PeerCommunicator::PeerCommunicator(std::string name, std::string label, int rank, int world_size, double timeout_s,
                                   int device, const std::vector<uintptr_t>& arenas, size_t arena_bytes,
                                   uintptr_t multicast)
    : DeviceCommunicator(std::move(name), std::move(label), rank, world_size, timeout_s, device),
      arena_(DeviceArena::of(arena_bytes)),
      numbers_((1 + kMaxPeers) * sizeof(int64_t)) {
  TPK_CHECK(world_size >= 1 && world_size <= kMaxPeers, "Group.open: transport 'peer' needs 1 to ", kMaxPeers,
            " ranks, got ", world_size);
  TPK_CHECK(arenas.size() == static_cast<size_t>(world_size),
            "Group.open: transport 'peer' needs an arena for each of ", world_size, " ranks, got ", arenas.size());
  for (int r = 0; r < world_size; ++r) peers_.arena[r] = reinterpret_cast<char*>(arenas[static_cast<size_t>(r)]);
  peers_.multicast = reinterpret_cast<char*>(multicast);
  peers_.rank = rank;
  peers_.world_size = world_size;
  peers_.slot_bytes = arena_.slot_bytes;
  peers_.failure = failure_on_device();
  peers_.timeout_ns = timeout_ns();
  heap_.reset(peers_.arena[rank] + heap_offset(peers_), arena_.heap_bytes());
}

Machine PeerCommunicator::machine() const {
  Machine machine = DeviceCommunicator::machine();
  machine.multicast = peers_.multicast != nullptr;
  machine.slot_bytes = arena_.slot_bytes;
  return machine;
}

Call PeerCommunicator::next_call(const CallSpec& spec, const Input& in) {
  Call call{};
  call.op = spec.op;
  call.dtype = spec.dtype;
  call.codec = spec.codec;
  call.reduce_op = spec.reduce_op;
  call.numel = spec.numel;
  call.shape_hash = spec.shape_hash;
  call.heap_offset = kNotInHeap;
  call.packed = in.is_packed();
  if (spec.codec == Codec::None && in.values() != nullptr && heap_.contains(in.values())) {
    const auto offset = static_cast<uint64_t>(static_cast<const char*>(in.values()) - peers_.arena[rank()]) -
                        static_cast<uint64_t>(heap_offset(peers_));
    if (offset % kHeapUnit == 0) call.heap_offset = offset;
  }
  call.piece = next_piece();
  return call;
}

// Sent is what others read of this rank's memory, once for each of them.
void PeerCommunicator::count_all_reduce(Path path, const Wire& wire, size_t n) {
  const size_t others = static_cast<size_t>(world_size() - 1), whole = wire.bytes(n);
  const Cut blocks = Cut::even((n + wire.block_values - 1) / wire.block_values, world_size(), wire.block_values);
  const size_t end = std::min(blocks.start(rank()) + blocks.size(rank()), n);
  const size_t chunk = wire.bytes(end - std::min(blocks.start(rank()), end));
  switch (path) {
    case Path::OneShot: return count(others * whole);
    case Path::Multicast: return count(whole + chunk);  // the switch reads it once and spreads the sum
    default: return count(whole - chunk + others * chunk);
  }
}

void PeerCommunicator::send_all_reduce(const CallSpec& spec, const Wire& wire, Input in, void* out, size_t n) {
  const Choice choice =
      choose_all_reduce(machine(), forced(), wire.dtype, wire.op, wire.codec, wire.bytes(n), is_beside());
  const auto launch = choice.path == Path::OneShot     ? launch_one_shot
                      : choice.path == Path::Multicast ? launch_multicast
                                                       : launch_two_shot;
  const size_t piece = wire.values_in(arena_.slot_bytes);
  for (size_t start = 0; start == 0 || start < n; start += piece) {
    const size_t values = std::min(piece, n - start);
    const Input from = in.from(wire, start);
    Call call = next_call(spec, from);
    if (choice.path == Path::OneShot && wire.bytes(n) < kOneShotBytesInHeap) call.heap_offset = kNotInHeap;
    check_cuda(
        launch(peers_, call, from.values(), at(out, start * wire.value_bytes), values, choice.blocks, current_stream()),
        name_of(choice.path));
  }
  count_all_reduce(choice.path, wire, n);
}

void PeerCommunicator::send_reduce_scatter(const CallSpec& spec, const Wire& wire, Input in, void* out, const Cut& cut,
                                           const Stretch& stretch) {
  const size_t ranks = static_cast<size_t>(world_size()), largest = stretch.largest();
  const size_t piece = wire.values_in(arena_.slot_bytes / ranks / kHeapUnit * kHeapUnit);
  const int blocks = choose_blocks(machine(), forced(), wire.bytes(std::min(piece, largest) * ranks), is_beside());
  for (size_t start = 0; start == 0 || start < largest; start += piece) {
    char* const to = at(out, stretch.piece_begin(rank(), start) * wire.value_bytes);
    DeviceCut part = piece_of(cut, stretch, world_size(), start, piece);
    for (int r = 0; in.is_packed() && r < world_size(); ++r) {
      const Input from = in.of_part(wire, cut.starts, static_cast<size_t>(r), stretch.piece_begin(r, start));
      part.first[r] = static_cast<uint64_t>(at(from.values(), 0) - at(in.values(), 0));
    }
    check_cuda(launch_reduce_scatter(peers_, next_call(spec, in), in.values(), to, part, blocks, current_stream()),
               "reduce_scatter");
  }
  for (int r = 0; r < world_size(); ++r) {
    if (r != rank()) count(wire.bytes(stretch.size(r)));
  }
}

void PeerCommunicator::send_all_gather(const CallSpec& spec, const Wire& wire, const void* in, void* out,
                                       const Cut& cut, const Stretch& stretch) {
  const size_t piece = wire.values_in(arena_.slot_bytes), largest = stretch.largest();
  const int blocks = choose_blocks(machine(), forced(), wire.bytes(std::min(piece, largest)), is_beside());
  for (size_t start = 0; start == 0 || start < largest; start += piece) {
    const char* const from = at(in, stretch.piece_begin(rank(), start) * wire.value_bytes);
    Call call = next_call(spec, from);
    call.brings = static_cast<uint32_t>(spec.mine);
    check_cuda(launch_all_gather(peers_, call, from, out, brought_piece(cut, stretch, world_size(), start, piece),
                                 blocks, current_stream()),
               "all_gather");
  }
  count(static_cast<size_t>(world_size() - 1) * wire.bytes(stretch.size(rank())));
}

// Pieces are whole tokens that end at whole blocks of the codec.
size_t PeerCommunicator::tokens_at_once(const Wire& wire, const AddNorm& args) const {
  const size_t fit = args.width == 0 ? 0 : wire.values_in(arena_.slot_bytes) / args.width;
  if (fit >= args.tokens) return std::max<size_t>(args.tokens, 1);
  const size_t unit = wire.block_values / std::gcd(wire.block_values, args.width);
  return fit / unit * unit;
}

bool PeerCommunicator::fuses_norm(const Wire& wire, const AddNorm& args) const {
  if (args.width == 0 || tokens_at_once(wire, args) == 0) return false;
  // The fused kernel moves what one-shot moves. Where another way moves less, the pass over memory that fusing saves
  // does not pay for it.
  const size_t bytes = wire.bytes(args.tokens * args.width);
  return choose_all_reduce(machine(), forced(), wire.dtype, ReduceOp::Sum, wire.codec, bytes).path == Path::OneShot;
}

void PeerCommunicator::send_add_norm(const CallSpec& spec, const Wire& wire, const AddNorm& args) {
  const size_t at_once = tokens_at_once(wire, args), value = wire.value_bytes;
  const size_t inverse_bytes = wire.dtype == DType::F64 ? sizeof(double) : sizeof(float);
  const int blocks = choose_blocks(machine(), forced(), wire.bytes(std::min(at_once, args.tokens) * args.width));
  for (size_t start = 0; start == 0 || start < args.tokens; start += at_once) {
    const size_t tokens = std::min(at_once, args.tokens - start), offset = start * args.width * value;
    const char* const x = at(args.x, offset);
    check_cuda(launch_all_reduce_add_rms_norm(peers_, next_call(spec, x), x, at(args.residual, offset), args.weight,
                                              at(args.y, offset), at(args.residual_out, offset),
                                              at(args.inverse_rms, start * inverse_bytes), tokens, args.width, args.eps,
                                              blocks, current_stream()),
               "all_reduce_add_rms_norm");
  }
  count_all_reduce(Path::OneShot, wire, args.tokens * args.width);
}

// One number from every rank, through memory of the host: the launch and one wait.
std::vector<int64_t> PeerCommunicator::send_exchange(const CallSpec& spec) {
  const size_t ranks = static_cast<size_t>(world_size());
  if (spec.op == Op::Barrier) {
    check_cuda(launch_barrier(peers_, next_call(spec), current_stream()), "barrier");
    synchronize();
    return std::vector<int64_t>(ranks, 0);
  }
  Call call = next_call(spec);
  call.brings = 1;
  int64_t* const host = static_cast<int64_t*>(numbers_.on_host());
  int64_t* const device = static_cast<int64_t*>(numbers_.on_device());
  host[0] = spec.mine;
  const Cut one_each = Cut::even(ranks, world_size());
  const DeviceCut cut = brought_piece(one_each, Stretch::all(one_each), world_size(), 0, 1);
  check_cuda(launch_all_gather(peers_, call, device, device + 1, cut, 1, current_stream()), "exchange");
  synchronize();
  return {host + 1, host + 1 + ranks};
}

}  // namespace tpk::cuda
