// The protocol of a call whose ranks exchange flags tile by tile (fused_gemm_sm90.cu). It extends peer.cuh:
// announcements, verdicts, slots, deadlines and records are the same. Grids may differ between ranks, because flags
// belong to tiles.
//
//   announce  block 0 alone announces. In every block one warp, the signal warp, waits for block 0 of all ranks, while
//             the other threads already load and multiply.
//   send      a product for another rank is written into that rank's slot when it is made, after the block has received
//             all announcements and all agree. The slot is free: the previous call of this rank has ended, so all ranks
//             have ended the call before that, which used this slot last.
//   raise     a flag is the epoch, at the rank that waits for it: tiles[from][tile], summed[from][tile]. One thread
//             raises it, after a barrier with the writers of the tile, or the end of its store, and after its block has
//             received all announcements. So a rank finds flags of e or of calls before e, never of a call after: a
//             rank announces e + 1 after it has ended e. Hence a wait compares for equality, and a flag that was last
//             raised 2^31 calls ago is not taken for a new one.
//   refusal   as in peer.cuh: no flag is raised, nothing is read, nothing is written to outputs. The multiplying blocks
//             finish their products and discard them.
//   waits     blocks that sum or gather wait for flags, with the deadline. There is no cycle: multiplying blocks of a
//             reduction wait for announcements alone, and sum only when all blocks of their rank have begun; those of a
//             gather wait for copies, which need no product. So a reduction ends where `communicating` + 1 blocks are
//             resident, a gather where all communicating blocks and one multiplying block are, as long as blocks begin
//             in the order of their numbers.
//   end       a block ends after its signal warp has received all announcements; the last one closes the call, as in
//             peer.cuh.
#pragma once

#include "cuda/kernels/hopper.cuh"
#include "peer.cuh"
#include "tiles.h"

namespace tpk::cuda {

class TileTurn : public Turn {
 public:
  // `rows`: of the whole piece, so that ranks that cut a call differently find out.
  __device__ __forceinline__ TileTurn(const Peers& peers, const Call& call, Kernel kernel, uint32_t tile_columns,
                                      uint32_t rows, uint32_t expected_of_lane)
      : Turn(peers, call, plan_of(kernel, tile_columns / 128, rows & 0xffff), 0, expected_of_lane) {}

  __device__ __forceinline__ bool is_skipped() const { return outcome_ == Outcome::Skipped; }

  // ---- the signal warp. `announced` is the transaction barrier that all other warps wait for.
  __device__ __forceinline__ bool await_announcements(uint64_t* announced) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    if (lane < peers_.world_size) {
      if (blockIdx.x == 0) send_announcement(lane, kNoUnits);
      await_announcement(lane);
    }
    __syncwarp();
    const Verdict worst = worst_verdict();
    if (worst == Verdict::Late) give_up(1, lane == 0);
    __syncwarp();
    if (lane == 0) add_acq_rel_gpu(&signals(peers_.rank).begun, 1);
    if (lane == 0) transaction_arrive(announced);
    return worst == Verdict::Agrees;
  }

  // ---- any thread, behind `announced`: all ranks have announced the same call in time
  __device__ __forceinline__ bool have_agreed() const { return worst_verdict() == Verdict::Agrees; }

  // Which of the two slots of a rank this call uses.
  __device__ __forceinline__ uint32_t slot_number() const { return epoch_ & 1; }

  // ---- one thread, after a barrier with the writers of the data, or its own wait for their stores
  __device__ __forceinline__ void raise_tile(uint32_t owner, uint32_t number) const {
    store_release_sys(&signals(static_cast<int>(owner)).tiles[peers_.rank][number], flag());
  }
  __device__ __forceinline__ void raise_summed(int r, uint32_t number) const {
    store_release_sys(&signals(r).summed[peers_.rank][number], flag());
  }
  // To the multiplying blocks of this rank: rows of x that came from `owner`.
  __device__ __forceinline__ void raise_gathered(uint32_t owner, uint32_t item) const {
    store_release_gpu(&signals(peers_.rank).tiles[owner][item], flag());
  }

  // ---- one thread for each rank; false at the deadline. After a barrier the threads of the block check is_late().
  __device__ __forceinline__ bool await_tile(int from, uint32_t number) const {
    return await(from, &signals(peers_.rank).tiles[from][number]);
  }
  __device__ __forceinline__ bool await_summed(int from, uint32_t number) const {
    return await(from, &signals(peers_.rank).summed[from][number]);
  }
  // Without a wait.
  __device__ __forceinline__ bool has_summed(int from, uint32_t number) const {
    return load_acquire_sys(&signals(peers_.rank).summed[from][number]) == flag();
  }
  __device__ __forceinline__ bool is_late() const { return is_any_late(); }
  // All threads that have found is_late(); one of them reports.
  __device__ __forceinline__ void give_up_waiting(bool reports) { give_up(2, reports); }

  // Every block of this rank has begun. Until then a block that is done must end, so that others become resident.
  __device__ __forceinline__ bool have_all_begun() const {
    return load_acquire_sys(&signals(peers_.rank).begun) == gridDim.x;
  }
  // Tiles of this reduction that blocks have taken: 0 to sum, 1 to copy.
  __device__ __forceinline__ uint32_t* taken(int what) const { return &signals(peers_.rank).taken[what]; }

  // After a barrier of all threads of the block.
  __device__ __forceinline__ void end() {
    if (is_skipped()) return;
    const Verdict worst = worst_verdict();
    outcome_ = worst == Verdict::Late ? Outcome::GaveUp : worst == Verdict::Differs ? Outcome::Refused : Outcome::Going;
    Turn::end();
  }

 private:
  __device__ __forceinline__ uint32_t flag() const { return 2 * epoch_ + 1; }  // never what the signals begin with
  __device__ __forceinline__ bool await(int from, const uint32_t* raised) const {
    if (wait([&] { return load_acquire_sys(raised) == flag(); }, [] { return false; })) return true;
    received().late[from] = true;
    return false;
  }
};

}  // namespace tpk::cuda
