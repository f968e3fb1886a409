// Transport `shm`: ranks are processes of one host and share one file of memory, an arena for each rank. Torch-free.
//
// The file has no name: rank 0 makes it with O_TMPFILE in /dev/shm, reserves it (a full /dev/shm is an error there and
// then, not a SIGBUS later), and the others open it through /proc. Nothing can be left behind, even by SIGKILL.
#pragma once

#include "core/arena.h"
#include "core/communicator.h"
#include "core/errors.h"
#include "core/heap.h"

namespace tpk {

class ShmCommunicator final : public Communicator {
 public:
  // fd: the shared file, of world_size * arena_bytes bytes; pids: of the ranks; cores: that they may run on together.
  ShmCommunicator(std::string name, std::string label, int rank, int world_size, double timeout_s, int fd,
                  size_t arena_bytes, const std::vector<int>& pids, int cores);
  ~ShmCommunicator() override;

  const char* transport() const override { return "shm"; }
  void* heap_allocate(size_t bytes) override;
  void heap_free(void* pointer) override;
  size_t heap_bytes() const override { return heap_.bytes(); }
  Heaps take_heaps() override;
  std::string loss_of(int rank) const override;
  void give_up(bool late) override;

 protected:
  void do_all_reduce(const CallSpec&, const Wire&, Input in, void* out, size_t n) override;
  void do_reduce_scatter(const CallSpec&, const Wire&, Input in, void* out, const Cut&) override;
  void do_all_gather(const CallSpec&, const Wire&, const void* in, void* out, const Cut&) override;
  void do_all_to_all(const CallSpec&, const Wire&, const void* in, void* out, const Cut& send,
                     const Cut& receive) override;
  std::vector<int64_t> do_exchange(const CallSpec&) override;
  void do_all_reduce_beside(const CallSpec&, const Wire&, void* data, size_t n,
                            const std::function<void()>& meanwhile) override;
  void do_close() override;

 private:
  void unmap();
  // --- signals (shm.cpp)
  Control& control(int rank) const { return *reinterpret_cast<Control*>(arena(rank)); }
  char* arena(int rank) const { return base_ + static_cast<size_t>(rank) * layout_.arena_bytes; }
  char* slot(int rank, size_t piece) const {
    return arena(rank) + layout_.slot_offset(static_cast<int>((turn_ + piece) & 1));
  }
  const CallRecord& record(int rank) const { return control(rank).records[call_ & 1]; }
  // Where rank's input of this call lies in its heap.
  char* heap_input(int rank) const { return arena(rank) + layout_.heap_offset() + record(rank).heap_offset; }

  void announce(const CallSpec& spec, const void* input_in_heap);  // publishes the fingerprint: the input is ready
  void hear_all(const CallSpec& mine);                             // waits for all fingerprints and compares them
  std::vector<CallSpec> announced() const;                         // by all ranks, after hear_all
  // A refused call counts as one piece on every rank, whatever their sizes.
  template <class Check>
  void refuse_as_one_piece(Check&& check) {
    try {
      check();
    } catch (const RankMismatch&) {
      turn_ += 1;
      throw;
    }
  }
  void signal(uint64_t stage);  // this rank has finished `stage` of this call
  void wait_all(Op op, uint64_t stage);
  void wait_for(Op op, int other, const std::atomic<uint64_t>& word, uint64_t target);
  void sleep_on(int other, const std::atomic<uint64_t>& word, uint64_t seen);
  void wake_sleepers();
  void look_for_trouble(Op op, int other, const std::atomic<uint64_t>& word, uint64_t target, uint64_t started);
  [[noreturn]] void fail_lost(Op op, int lost, const std::string& how);
  [[noreturn]] void fail_late(Op op);
  [[noreturn]] void fail_with(Op op, int failed);
  void mark_failed(int culprit, bool late);
  RankState state_of(int rank) const;
  void set_state(RankState state);
  bool gave_up(int rank) const;
  uint64_t last_call(int rank) const;
  bool everybody_in_heap() const;
  bool anybody_in_heap() const;

  // --- the ways to run a collective (shm_collectives.cpp)
  void all_reduce_with(const CallSpec&, const Wire&, const Input& in, void* out, size_t n,
                       const std::function<void()>* meanwhile);
  template <class CopyIn>
  void copy_in_late(const CallSpec& spec, bool in_heap, CopyIn copy_in);
  void one_shot(const CallSpec&, const Wire&, const Input& in, void* out, size_t n,
                const std::function<void()>* meanwhile);
  void two_shot(const CallSpec&, const Wire&, const Input& in, void* out, size_t n);
  void two_shot_read(const CallSpec&, const Wire&, void* out, size_t n);
  void two_shot_in_place(const CallSpec&, const Wire&, void* data, size_t n);
  void all_gather_read(const CallSpec&, const Wire&, const void* in, void* out, const Cut&);
  void reduce_scatter_read(const CallSpec&, const Wire&, void* out, const Cut&);
  size_t piece_values(const Wire&, size_t parts) const;
  void copy_in_first(const Wire&, const Input& in, size_t n);
  void copy_in(const Wire&, const Input& in, size_t start, const Cut& chunks, size_t piece);
  void copy_out(const Wire&, void* out, size_t start, const Cut& chunks, size_t piece);
  void touch_back(const Wire&, int r, const char* values, char* lines, size_t n) const;
  void reduce_chunk(const Wire&, const Input& in, void* out, size_t start, const Cut& chunks, size_t piece);

  const ArenaLayout layout_;
  const bool crowded_;        // more ranks than cores: give up the core early
  uint64_t yield_again_ = 0;  // from this time on, by now_nanoseconds()
  char* base_ = nullptr;
  uint64_t turn_ = 0;  // pieces that went through the slots so far; the same on all ranks
  std::vector<int> pids_;
  std::vector<int> pidfds_;  // -1 where the kernel has none
  Heap heap_;
  std::mutex mapping_mutex_;  // of the next two, and of unmapping
  size_t heap_blocks_ = 0;    // tensors that lie in the heap: they keep the memory mapped after `close`
  bool left_ = false;
  // Of a call in progress: where the parts of all ranks lie; one more output than ranks.
  std::vector<const void*> inputs_;
  std::vector<void*> outputs_;
};

}  // namespace tpk
