// One collective of a group of emulated ranks as a test sees it: what it is, its inputs, its launch, its check.
#pragma once

#include <memory>

#include "emu_ranks.h"

namespace tpk::testing {

enum class Kind : uint8_t { OneShot, TwoShot, Multicast, ReduceScatter, AllGather };
enum class Heap : uint8_t { None, All, Some, Crooked };  // Some: not on rank 0. Crooked: all, off multiples of 16

struct Step {
  Kind kind;
  DType dtype;
  Codec codec = Codec::None;
  ReduceOp op = ReduceOp::Sum;
  size_t n;  // of the whole
  int blocks = 2;
  size_t in_shift = 0, out_shift = 0;  // values
  bool in_place = false;               // of the full tensor, or of this rank's part of it
  Heap heap = Heap::None;
  bool uneven = false;
  uint64_t seed = 1;
  bool all_finite = false;
  bool packed = false;  // the inputs are wires already; in_shift then counts bytes
};

inline bool moves(Kind kind) { return kind == Kind::AllGather; }
inline bool cuts(Kind kind) { return kind == Kind::AllGather || kind == Kind::ReduceScatter; }

inline std::string text_of(const Step& step) {
  constexpr const char* kinds[] = {"one_shot", "two_shot", "multicast", "reduce_scatter", "all_gather"};
  constexpr const char* heaps[] = {"none", "all", "some", "crooked"};
  return concat(kinds[static_cast<int>(step.kind)], " of ", step.n, " ", name_of(step.dtype), " codec ",
                name_of(step.codec), " op ", name_of(step.op), " blocks ", step.blocks, " shifts ", step.in_shift, " ",
                step.out_shift, step.in_place ? " in place" : "", " heap ", heaps[static_cast<int>(step.heap)],
                step.uneven ? " uneven" : "", step.packed ? " packed" : "", " seed ", step.seed);
}

// Even as the library cuts, or anyhow: some parts empty.
inline std::vector<size_t> sizes_of_parts(const Step& step, int ranks) {
  std::vector<size_t> sizes;
  std::mt19937_64 random(step.seed + 77);
  size_t left = step.n;
  for (int r = 0; r < ranks; ++r) {
    const size_t count = static_cast<size_t>(ranks), index = static_cast<size_t>(r);
    size_t size = step.n / count + (index < step.n % count ? 1 : 0);
    if (step.uneven) size = random() % 3 == 0 ? 0 : random() % (left + 1);
    if (step.uneven && r + 1 == ranks) size = left;
    sizes.push_back(size);
    left -= size;
  }
  return sizes;
}

// Where the next input goes in the heaps of a group: the same place at no two ranks.
struct HeapPlan {
  size_t used = 0;
};

class PreparedStep {
 public:
  PreparedStep(const EmulatedGroup& group, const Step& step, HeapPlan& heap)
      : group_(group),
        step_(step),
        wire_(wire_of(step.dtype, step.codec, moves(step.kind) ? ReduceOp::None : step.op)) {
    const std::vector<size_t> sizes = sizes_of_parts(step, group.ranks());
    for (int r = 0; r < group.ranks(); ++r) {
      cut_.first[r] = r == 0 ? 0 : cut_.first[r - 1] + cut_.count[r - 1];
      cut_.count[r] = sizes[static_cast<size_t>(r)];
      if (moves(step.kind)) cut_.brings[r] = static_cast<uint32_t>(cut_.count[r]);
    }
    launched_ = cut_;
    for (int r = 1; step.packed && r < group.ranks(); ++r) {
      launched_.first[r] = launched_.first[r - 1] + wire_.bytes(cut_.count[r - 1]);
    }
    for (int r = 0; r < group.ranks(); ++r) prepare(r, heap);
    heap.used += (step.n * wire_.value_bytes + 511) / 256 * 256;
    EXPECT(heap.used <= group.heap_bytes(), "the heap is too small for this test");
  }

  Call call(int rank) const {
    Call call{};
    call.op = step_.kind == Kind::AllGather       ? Op::AllGather
              : step_.kind == Kind::ReduceScatter ? Op::ReduceScatter
                                                  : Op::AllReduce;
    call.dtype = step_.dtype, call.codec = step_.codec, call.reduce_op = moves(step_.kind) ? ReduceOp::None : step_.op;
    call.numel = step_.n, call.shape_hash = 4711;
    call.brings = cut_.brings[rank];
    call.heap_offset = heap_offsets_[rank];
    call.packed = step_.packed;
    return call;
  }

  cudaError_t launch(int rank, cudaStream_t stream) const { return launch(rank, stream, call(rank), step_.blocks); }
  cudaError_t launch(int rank, cudaStream_t stream, const Call& call, int blocks) const {
    const Peers peers = group_.peers(rank);
    switch (step_.kind) {
      case Kind::OneShot: return launch_one_shot(peers, call, in_[rank], out_[rank], step_.n, blocks, stream);
      case Kind::TwoShot: return launch_two_shot(peers, call, in_[rank], out_[rank], step_.n, blocks, stream);
      case Kind::Multicast: return launch_multicast(peers, call, in_[rank], out_[rank], step_.n, blocks, stream);
      case Kind::ReduceScatter:
        return launch_reduce_scatter(peers, call, in_[rank], out_[rank], launched_, blocks, stream);
      default: return launch_all_gather(peers, call, in_[rank], out_[rank], cut_, blocks, stream);
    }
  }

  void check() const {
    for (int r = 0; r < group_.ranks(); ++r) {
      std::string where;
      const bool same = same_values(step_.dtype, result(r), expected(r), &where);
      EXPECT(same, text_of(step_), " over ", group_.ranks(), " ranks: rank ", r, ", ", where);
    }
  }
  void check_untouched() const {
    for (int r = 0; r < group_.ranks(); ++r) {
      EXPECT(outputs_[r]->values() == before_[r], text_of(step_), ": the output of rank ", r, " was written");
    }
  }

 private:
  size_t size() const { return wire_.value_bytes; }
  size_t part_start(int r) const { return cut_.first[r] * size(); }
  size_t part_bytes(int r) const { return cut_.count[r] * size(); }

  void prepare(int r, const HeapPlan& heap) {
    inputs_.push_back(random_values(step_.dtype, moves(step_.kind) ? cut_.count[r] : step_.n,
                                    step_.seed * 16 + static_cast<uint64_t>(r), step_.all_finite));
    const Bytes& input = inputs_.back();
    const bool gathers = moves(step_.kind);
    // In place the buffer is the full tensor, with the input where it belongs.
    Bytes buffer = gathers ? Bytes(step_.n * size(), 'x') : input;
    if (gathers && step_.in_place)
      std::copy(input.begin(), input.end(), buffer.begin() + static_cast<long>(part_start(r)));
    if (!step_.in_place) buffer = Bytes(step_.kind == Kind::ReduceScatter ? part_bytes(r) : step_.n * size(), 'x');
    outputs_.push_back(std::make_unique<DeviceBytes>(r, buffer, step_.out_shift * size()));
    before_.push_back(buffer);
    out_[r] = outputs_.back()->data();
    in_[r] = out_[r];
    if (step_.in_place && step_.kind == Kind::ReduceScatter) out_[r] += part_start(r);
    if (step_.in_place && gathers) in_[r] += part_start(r);
    heap_offsets_[r] = kNotInHeap;
    if (step_.in_place) return;
    if (step_.heap == Heap::None || (step_.heap == Heap::Some && r == 0)) {
      const size_t shift = step_.packed ? step_.in_shift : step_.in_shift * size();
      sources_.push_back(std::make_unique<DeviceBytes>(r, step_.packed ? packed(input) : input, shift));
      in_[r] = sources_.back()->data();
      return;
    }
    heap_offsets_[r] = heap.used + 16 * static_cast<size_t>(r) + (step_.heap == Heap::Crooked ? size() : 0);
    in_[r] = group_.heap(r) + heap_offsets_[r];
    std::copy(input.begin(), input.end(), in_[r]);
  }

  Bytes packed(const Bytes& input) const {
    if (!cuts(step_.kind)) return encoded(wire_, input);
    Bytes parts;
    for (int r = 0; r < group_.ranks(); ++r) {
      const Bytes part = encoded(wire_, slice(input, part_start(r), part_bytes(r)));
      parts.insert(parts.end(), part.begin(), part.end());
    }
    return parts;
  }

  Bytes result(int r) const {
    const Bytes all = outputs_[static_cast<size_t>(r)]->values();
    return step_.in_place && step_.kind == Kind::ReduceScatter ? slice(all, part_start(r), part_bytes(r)) : all;
  }

  Bytes expected(int r) const {
    if (step_.kind == Kind::AllGather) {
      Bytes all;
      for (size_t from = 0; from < inputs_.size(); ++from) {
        const Bytes part = decoded(wire_, encoded(wire_, inputs_[from]), cut_.count[from]);
        all.insert(all.end(), part.begin(), part.end());
      }
      return all;
    }
    if (step_.kind != Kind::ReduceScatter) return all_reduced(wire_, inputs_);
    std::vector<Bytes> parts;
    for (const Bytes& input : inputs_) parts.push_back(slice(input, part_start(r), part_bytes(r)));
    return reduced(wire_, parts);
  }

  const EmulatedGroup& group_;
  const Step step_;
  const Wire& wire_;
  DeviceCut cut_{}, launched_{};
  std::vector<Bytes> inputs_, before_;
  std::vector<std::unique_ptr<DeviceBytes>> outputs_, sources_;
  char* in_[kMaxPeers] = {};
  char* out_[kMaxPeers] = {};
  uint64_t heap_offsets_[kMaxPeers] = {};
};

// Launches the steps one after the other, without a wait in between, on one stream of every rank; then checks them all.
inline void run_steps(const EmulatedGroup& group, const std::vector<Step>& steps) {
  HeapPlan heap;
  std::vector<std::unique_ptr<PreparedStep>> prepared;
  for (const Step& step : steps) prepared.push_back(std::make_unique<PreparedStep>(group, step, heap));
  emu::run_ranks(group.ranks(), [&](int rank) {
    cudaStream_t stream;
    EXPECT(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess);
    for (size_t i = 0; i < steps.size(); ++i) {
      EXPECT(prepared[i]->launch(rank, stream) == cudaSuccess, text_of(steps[i]), " did not launch");
    }
    EXPECT(cudaStreamSynchronize(stream) == cudaSuccess, text_of(steps[0]));
  });
  expect_no_reports(text_of(steps[0]));
  group.expect_no_failure();
  for (const auto& step : prepared) step->check();
}

}  // namespace tpk::testing
