// The residual add and RMSNorm on emulated devices, fused with the all-reduce and alone, against the CPU's row loops.
#include <memory>

#include "cpu/loops/norm_rows.h"
#include "emu_local.h"

using namespace tpk;
using namespace tpk::testing;

namespace {

constexpr double kEps = 1e-5;

bool is_slow() { return emu::detects_races(); }

struct Step {
  DType dtype;
  Codec codec = Codec::None;
  size_t tokens, width;
  int blocks = 2;
  size_t shift = 0;  // values; rank r is shifted by r more
  uint64_t seed = 1;
  size_t cut = 0;  // tokens of the first of two pieces; 0: one piece
  bool all_finite = true;
};

std::string text_of(const Step& step) {
  return concat(name_of(step.dtype), " codec ", name_of(step.codec), " [", step.tokens, ", ", step.width, "] blocks ",
                step.blocks, " shift ", step.shift, " cut ", step.cut, " seed ", step.seed);
}

struct Results {
  Bytes y, residual_out, inverse_rms;
};

// What the CPU makes of the sum over the ranks.
Results on_cpu(const Step& step, Bytes sum, const Bytes& residual, const Bytes& weight) {
  Results found{Bytes(sum.size()), sum, Bytes(step.tokens * size_of(sum_dtype_of(step.dtype)))};
  const auto rows = [&](auto value) {
    using T = decltype(value);
    using S = SumOf<T>;
    for (size_t token = 0; token < step.tokens; ++token) {
      const size_t at = token * step.width;
      add_norm_row<T>(reinterpret_cast<T*>(found.residual_out.data()) + at,
                      reinterpret_cast<const T*>(residual.data()) + at, reinterpret_cast<const T*>(weight.data()),
                      step.width, static_cast<S>(kEps), reinterpret_cast<T*>(found.y.data()) + at,
                      reinterpret_cast<S*>(found.inverse_rms.data()) + token);
    }
  };
  switch (step.dtype) {
    case DType::F64: rows(double{}); break;
    case DType::BF16: rows(Bfloat16{}); break;
    case DType::F16: rows(Half{}); break;
    default: rows(float{}); break;
  }
  return found;
}

// residual_out to the bit; what was summed over a row within the rounding of such sums.
void expect_results(const Step& step, const Results& got, const Results& want, const std::string& what) {
  std::string where;
  EXPECT(same_values(step.dtype, got.residual_out, want.residual_out, &where), what, ": residual_out, ", where);
  const double sums = (static_cast<double>(step.width) + 16) * sum_unit_of(step.dtype);
  for (size_t i = 0; i < step.tokens; ++i) {
    const double inverse = value_at(sum_dtype_of(step.dtype), want.inverse_rms, i);
    expect_near(value_at(sum_dtype_of(step.dtype), got.inverse_rms, i), inverse, sums * inverse,
                what + ": inverse_rms");
  }
  const double relative = sums + 2 * unit_of(step.dtype);
  for (size_t i = 0; i < step.tokens * step.width; ++i) {
    const double y = value_at(step.dtype, want.y, i);
    expect_near(value_at(step.dtype, got.y, i), y, relative * std::abs(y) + smallest_step(step.dtype), what + ": y");
  }
}

// Memory of one rank.
struct OnRank {
  DeviceBytes x, residual, weight, y, residual_out, inverse_rms;
  Results results() const { return {y.values(), residual_out.values(), inverse_rms.values()}; }
};

class Prepared {
 public:
  Prepared(int ranks, const Step& step) : step_(step), wire_(wire_of(step.dtype, step.codec, ReduceOp::Sum)) {
    const size_t n = step.tokens * step.width, size = size_of(step.dtype);
    residual_ = random_values(step.dtype, n, step.seed * 100 + 50, true);
    weight_ = normal_values(step.dtype, step.width, step.seed * 100 + 60);
    for (int r = 0; r < ranks; ++r) {
      inputs_.push_back(random_values(step.dtype, n, step.seed * 100 + static_cast<uint64_t>(r), step.all_finite));
      const size_t shift = (step.shift == 0 ? 0 : step.shift + static_cast<size_t>(r)) * size;
      const Bytes empty(n * size, 'x'), numbers(step.tokens * size_of(sum_dtype_of(step.dtype)), 'x');
      on_.push_back(std::unique_ptr<OnRank>(new OnRank{
          DeviceBytes(r, inputs_.back(), shift), DeviceBytes(r, residual_, shift), DeviceBytes(r, weight_, shift),
          DeviceBytes(r, empty, shift), DeviceBytes(r, empty, shift), DeviceBytes(r, numbers)}));
    }
  }

  cudaError_t launch(const Peers& peers, cudaStream_t stream, uint64_t numel = 0) const {
    if (step_.cut == 0) return launch_tokens(peers, stream, 0, 0, step_.tokens, numel);
    const cudaError_t error = launch_tokens(peers, stream, 0, 0, step_.cut, numel);
    return error != cudaSuccess ? error : launch_tokens(peers, stream, 1, step_.cut, step_.tokens - step_.cut, numel);
  }

  // Every rank to the same bits, which are those of the local kernel, too.
  void check() const {
    const Bytes sum = all_reduced(wire_, inputs_);
    const Results want = on_cpu(step_, sum, residual_, weight_), local = alone(sum, false), again = alone(sum, true);
    for (size_t r = 0; r < on_.size(); ++r) {
      const Results got = on_[r]->results();
      expect_results(step_, got, want, concat(text_of(step_), " rank ", r, " of ", on_.size()));
      expect_same(got, on_[0]->results(), concat("ranks 0 and ", r));
      expect_same(got, local, "fused and alone");
      expect_same(got, again, "fused and alone in place");
    }
  }
  void check_untouched() const {
    for (const auto& on : on_) {
      const Bytes y = on->y.values();
      EXPECT(y == Bytes(y.size(), 'x') && on->residual_out.values() == y, text_of(step_), ": outputs were written");
    }
  }

 private:
  cudaError_t launch_tokens(const Peers& peers, cudaStream_t stream, uint32_t piece, size_t start, size_t tokens,
                            uint64_t numel) const {
    const OnRank& on = *on_[static_cast<size_t>(peers.rank)];
    Call call{};
    call.op = Op::AllReduceAddRmsNorm, call.dtype = step_.dtype, call.codec = step_.codec;
    call.reduce_op = ReduceOp::Sum, call.numel = numel == 0 ? step_.tokens * step_.width : numel;
    call.heap_offset = kNotInHeap, call.piece = piece;
    const size_t at = start * step_.width * size_of(step_.dtype);
    return cuda::launch_all_reduce_add_rms_norm(peers, call, on.x.data() + at, on.residual.data() + at,
                                                on.weight.data(), on.y.data() + at, on.residual_out.data() + at,
                                                on.inverse_rms.data() + start * size_of(sum_dtype_of(step_.dtype)),
                                                tokens, step_.width, kEps, step_.blocks, stream);
  }

  Results alone(const Bytes& sum, bool in_place) const {
    const size_t size = size_of(step_.dtype);
    const DeviceBytes in(0, sum), residual(0, residual_, size), weight(0, weight_), y(0, sum, size), out(0, sum),
        inverse_rms(0, Bytes(step_.tokens * size_of(sum_dtype_of(step_.dtype))));
    EXPECT(cuda::launch_add_rms_norm(step_.dtype, in_place ? out.data() : in.data(), residual.data(), weight.data(),
                                     y.data(), out.data(), inverse_rms.data(), step_.tokens, step_.width, kEps,
                                     nullptr) == cudaSuccess);
    EXPECT(cudaDeviceSynchronize() == cudaSuccess);
    return {y.values(), out.values(), inverse_rms.values()};
  }

  void expect_same(const Results& a, const Results& b, const std::string& who) const {
    std::string where;
    EXPECT(same_values(step_.dtype, a.y, b.y, &where), text_of(step_), ": y of ", who, " differs, ", where);
    EXPECT(same_values(step_.dtype, a.residual_out, b.residual_out, &where), text_of(step_), ": residual_out of ", who);
    EXPECT(same_values(sum_dtype_of(step_.dtype), a.inverse_rms, b.inverse_rms), text_of(step_), ": inverse of ", who);
  }

  const Step step_;
  const Wire& wire_;
  Bytes residual_, weight_;
  std::vector<Bytes> inputs_;
  std::vector<std::unique_ptr<OnRank>> on_;
};

// The calls follow each other without a wait.
void run_steps(int ranks, const std::vector<Step>& steps, size_t slot_bytes = size_t{64} << 10) {
  GroupOptions options;
  options.slot_bytes = slot_bytes;
  EmulatedGroup group(ranks, options);
  std::vector<std::unique_ptr<Prepared>> prepared;
  for (const Step& step : steps) prepared.push_back(std::make_unique<Prepared>(ranks, step));
  emu::run_ranks(ranks, [&](int rank) {
    for (size_t i = 0; i < steps.size(); ++i) {
      EXPECT(prepared[i]->launch(group.peers(rank), nullptr) == cudaSuccess, text_of(steps[i]), " did not launch");
    }
    EXPECT(cudaDeviceSynchronize() == cudaSuccess, text_of(steps[0]));
  });
  expect_no_reports(text_of(steps[0]));
  group.expect_no_failure();
  EXPECT(cudaSetDevice(0) == cudaSuccess);
  for (const auto& step : prepared) step->check();
  expect_no_reports(text_of(steps[0]));
  emu::reset();
}

}  // namespace

CASE(any_dtype_codec_and_number_of_ranks) {
  uint64_t seed = 0;
  for (int ranks : {1, 2, 3, 4, 8}) {
    configure(ranks, 0);
    for (DType dtype : kFloating) {
      std::vector<Step> steps;
      for (Codec codec : {Codec::None, packing_codec(seed / 4), packing_codec(seed / 4 + 1)}) {
        if (dtype == DType::F64 && codec != Codec::None) continue;
        steps.push_back({.dtype = dtype, .codec = codec, .tokens = 3, .width = 264, .seed = ++seed});
        steps.push_back({.dtype = dtype, .codec = codec, .tokens = 5, .width = 37, .blocks = 3, .seed = ++seed});
      }
      run_steps(ranks, steps);
      if (is_slow() && ranks > 3) break;
    }
  }
}

CASE(any_shape_in_any_place) {
  const std::vector<std::pair<size_t, size_t>> shapes = {{0, 8},  {4, 0},   {1, 1},   {1, 1000}, {17, 3},
                                                         {9, 16}, {2, 513}, {33, 24}, {8, 129},  {3, 512}};
  uint64_t seed = 100;
  for (int ranks : {2, 3}) {
    configure(ranks, 0);
    for (const auto& [tokens, width] : shapes) {
      std::vector<Step> steps;
      for (size_t shift : {0, 1, 3}) {
        const DType dtype = kFloating[++seed % 4];
        const Codec codec = dtype == DType::F64 ? Codec::None : static_cast<Codec>(seed % 3);
        for (int blocks : {1, 4}) {
          steps.push_back({dtype, codec, tokens, width, blocks, shift, seed});
        }
      }
      run_steps(ranks, steps);
    }
  }
}

CASE(rows_wider_than_the_registers_of_a_block) {
  configure(2, 0);
  for (DType dtype : {DType::F32, DType::BF16}) {
    const size_t width = dtype == DType::F32 ? 9001 : 17003;
    if (is_slow() && dtype != DType::F32) continue;
    run_steps(
        2, {{.dtype = dtype, .tokens = 2, .width = width}, {.dtype = dtype, .tokens = 1, .width = width, .shift = 1}},
        size_t{128} << 10);
  }
}

CASE(any_calls_under_any_schedule) {
  const uint64_t runs = is_slow() ? 8 : 40;
  for (uint64_t run = 1; run <= runs; ++run) {
    std::mt19937_64 random(run);
    const int ranks = static_cast<int>(2 + run % (is_slow() ? 2 : 3));
    configure(ranks, run, static_cast<int>(4 + random() % 3));
    std::vector<Step> steps;
    for (int i = 0; i < 4; ++i) {
      const DType dtype = kFloating[random() % 4];
      Step step{.dtype = dtype, .tokens = random() % 12, .width = 1 + random() % 150, .seed = random() % 10000};
      if (dtype != DType::F64) step.codec = static_cast<Codec>(random() % 3);
      step.blocks = static_cast<int>(1 + random() % 4), step.shift = random() % 3;
      step.all_finite = random() % 4 != 0;
      if (step.codec == Codec::None && step.tokens > 2 && random() % 2 == 0)
        step.cut = 1 + random() % (step.tokens - 1);
      steps.push_back(step);
    }
    run_steps(ranks, steps);
  }
}

CASE(a_call_that_the_ranks_do_not_agree_on_writes_nothing) {
  configure(3, 5);
  EmulatedGroup group(3);
  const Prepared refused(3, {.dtype = DType::F32, .tokens = 4, .width = 40, .cut = 2});
  const Prepared after(3, {.dtype = DType::F32, .tokens = 4, .width = 40, .seed = 2});
  emu::run_ranks(3, [&](int rank) {
    EXPECT(refused.launch(group.peers(rank), nullptr, rank == 1 ? 77 : 0) == cudaSuccess);
    EXPECT(after.launch(group.peers(rank), nullptr) == cudaSuccess);
    EXPECT(cudaDeviceSynchronize() == cudaSuccess);
  });
  expect_no_reports("a disagreement");
  EXPECT(cudaSetDevice(0) == cudaSuccess);
  for (int r = 0; r < 3; ++r) {
    EXPECT(group.record(r).failure == static_cast<uint32_t>(cuda::Failure::Mismatch));
  }
  refused.check_untouched();
  after.check();
  emu::reset();
}

CASE(what_does_not_fit_is_refused_by_the_launch) {
  configure(1, 0);
  GroupOptions options;
  options.slot_bytes = 1024;
  EmulatedGroup group(1, options);
  const Prepared large(1, {.dtype = DType::F32, .tokens = 5, .width = 52}),
      fits(1, {.dtype = DType::F32, .tokens = 4, .width = 64});
  EXPECT(cudaSetDevice(0) == cudaSuccess);
  EXPECT(large.launch(group.peers(0), nullptr) == cudaErrorInvalidValue);
  EXPECT(fits.launch(group.peers(0), nullptr) == cudaSuccess && cudaDeviceSynchronize() == cudaSuccess);
  const Prepared blocks(1, {.dtype = DType::F32, .tokens = 1, .width = 8, .blocks = 65});
  EXPECT(blocks.launch(group.peers(0), nullptr) == cudaErrorInvalidValue);
  emu::reset();
}
