// Transport `peer`: the ranks are devices that reach each other's memory, an arena for each rank. Torch-free.
//
// The arenas come from torch's symmetric memory (tpkernels/comm/peer.py) or, for several ranks in one process, from
// anywhere; here they are addresses. They must be zero in front (Signals) and live as long as the communicator.
#pragma once

#include "core/heap.h"
#include "device_communicator.h"
#include "tensor_map.h"

namespace tpk::cuda {

// [ Signals | slot 0 | slot 1 | heap ]
struct DeviceArena {
  size_t bytes, slot_bytes;

  static constexpr size_t kMinBytes = size_t{256} << 10;
  // Larger messages are sent in pieces of this size, a launch for each. Of a fused GEMM a piece also begins with an
  // empty device and ends with one, and its last wave of tiles is not full: with 116 multiplying blocks 16 MiB, 256
  // tiles of 64 KiB, would be 2.2 waves in the time of 3, 64 MiB are 8.8 in that of 9. (Arithmetic, not measured.)
  static constexpr size_t kMaxSlotBytes = size_t{64} << 20;

  static DeviceArena of(size_t bytes);
  size_t heap_bytes() const { return bytes - kSignalBytes - 2 * slot_bytes; }
};

class PeerCommunicator final : public DeviceCommunicator {
 public:
  // arenas: of every rank, as this process sees them; multicast: the same through the switch, or 0, where sums
  // in the switch are not used.
  PeerCommunicator(std::string name, std::string label, int rank, int world_size, double timeout_s, int device,
                   const std::vector<uintptr_t>& arenas, size_t arena_bytes, uintptr_t multicast);

  const char* transport() const override { return "peer"; }
  void* heap_allocate(size_t bytes) override { return heap_.allocate(bytes); }
  void heap_free(void* pointer) override { heap_.free(pointer); }
  size_t heap_bytes() const override { return heap_.bytes(); }
  Machine machine() const override;

  void send_all_reduce(const CallSpec&, const Wire&, Input in, void* out, size_t n) override;
  void send_reduce_scatter(const CallSpec&, const Wire&, Input in, void* out, const Cut&, const Stretch&) override;
  void send_all_gather(const CallSpec&, const Wire&, const void* in, void* out, const Cut&, const Stretch&) override;

 protected:
  int product_share() const override { return multiprocessors_beside(machine(), forced()); }
  bool fuses_norm(const Wire&, const AddNorm&) const override;
  void send_add_norm(const CallSpec&, const Wire&, const AddNorm&) override;
  void send_fused_gemm(const CallSpec&, const FusedGemm&) override;  // peer_fused.cpp
  std::vector<int64_t> send_exchange(const CallSpec&) override;

 private:
  // A launch of the running call; in: what it reads, if that may be in the heap.
  Call next_call(const CallSpec&, const Input& in = nullptr);
  void count_all_reduce(Path path, const Wire&, size_t n);
  size_t tokens_at_once(const Wire&, const AddNorm&) const;
  void count_fused(const CallSpec&, const FusedGemm&);

  const DeviceArena arena_;
  Peers peers_{};
  Heap heap_;
  TensorMaps maps_;
  PinnedMemory numbers_;  // of exchange: mine, then those of all ranks
};

}  // namespace tpk::cuda
