// The protocol of a call whose ranks talk tile by tile (fused_gemm_sm90.cu). It extends peer.cuh, whose words it keeps:
// announcements, verdicts, slots, deadlines and records are the same; grids need not be, for flags belong to tiles.
//
//   announce  block 0 alone announces. Every block hears what block 0 of everybody has said: a warp of it does, the
//             herald, while the other threads already load and multiply.
//   send      what a rank brings for another (a product) is written into the slot of that one as it is made, once its
//             block has heard everybody and all agree. The slot is free: when this kernel runs, its call before has
//             ended, so all ranks have ended the one before that, which was the last to use this slot.
//   raise     a flag is the epoch, at the rank that waits for it: tiles[from][tile], summed[from][tile]. It is raised
//   by
//             one thread that has met those who wrote the tile, and never before its block has heard everybody. So a
//             rank finds flags of e or of calls before e, never of one after: who says e + 1 has ended e. Hence a
//             waiter wants equality, and a flag that nobody has raised for 2^31 calls is not taken for a new one.
//   refusal   as in peer.cuh: no flag is raised, nothing is read, nothing is written to outputs. What the multiplying
//             blocks have begun they end, to no effect.
//   waits     of blocks that sum or gather: for flags, with the deadline. There is no circle: multiplying blocks of a
//             reduction wait for announcements alone, and sum only when all blocks of their rank have begun; those that
//             gather wait for what needs no product. So a reduction comes to an end where `communicating` + 1 blocks
//             are resident, a gather where all that communicate and one that multiplies are, as long as blocks begin in
//             the order of their numbers.
//   end       a block ends after its herald has heard everybody; the last one closes the call, as in peer.cuh.
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

  // ---- the herald: one warp. `heard_all` is the transaction barrier that all others wait for.
  __device__ __forceinline__ bool hear(uint64_t* heard_all) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    if (lane < peers_.world_size) {
      if (blockIdx.x == 0) tell(lane, kNoUnits);
      listen(lane);
    }
    __syncwarp();
    const Verdict worst = worst_verdict();
    if (worst == Verdict::Late) give_up(1, lane == 0);
    __syncwarp();
    if (lane == 0) add_acq_rel_gpu(&signals(peers_.rank).begun, 1);
    if (lane == 0) transaction_arrive(heard_all);
    return worst == Verdict::Agrees;
  }

  // ---- any thread, after the herald has heard: nobody is late, nobody has said something else
  __device__ __forceinline__ bool have_agreed() const { return worst_verdict() == Verdict::Agrees; }

  // ---- one thread that has met those who wrote what the flag stands for
  __device__ __forceinline__ void raise_tile(uint32_t owner, uint32_t number) const {
    store_release_sys(&signals(static_cast<int>(owner)).tiles[peers_.rank][number], flag());
  }
  __device__ __forceinline__ void raise_summed(int r, uint32_t number) const {
    store_release_sys(&signals(r).summed[peers_.rank][number], flag());
  }
  // To the multiplying blocks of this rank: rows of x that came from `owner`.
  __device__ __forceinline__ void raise_gathered(uint32_t owner, uint32_t item) const {
    store_release_sys(&signals(peers_.rank).tiles[owner][item], flag());
  }

  // ---- one thread for each rank; false at the deadline. The threads of the block meet then and ask is_late().
  __device__ __forceinline__ bool await_tile(int from, uint32_t number) const {
    return await(from, &signals(peers_.rank).tiles[from][number]);
  }
  __device__ __forceinline__ bool await_summed(int from, uint32_t number) const {
    return await(from, &signals(peers_.rank).summed[from][number]);
  }
  __device__ __forceinline__ bool is_late() const { return is_any_late(); }
  // All threads that have found is_late(); one of them speaks.
  __device__ __forceinline__ void give_up_waiting(bool speaks) { give_up(2, speaks); }

  // Every block of this rank has begun. Until then a block that is done must leave its place to those that have not.
  __device__ __forceinline__ bool have_all_begun() const {
    return load_acquire_sys(&signals(peers_.rank).begun) == gridDim.x;
  }
  // Tiles of this call that blocks have taken: 0 to sum, 1 to copy.
  __device__ __forceinline__ uint32_t* taken(int what) const { return &signals(peers_.rank).taken[what]; }

  // All threads of the block have met.
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
    heard().late[from] = true;
    return false;
  }
};

}  // namespace tpk::cuda
