// The gradient of RMSNorm and the squared norm on an emulated device, against plain loops in double.
#include <memory>

#include "emu_local.h"

using namespace tpk;
using namespace tpk::testing;

namespace {

constexpr double kEps = 1e-5;

bool is_slow() { return emu::detects_races(); }

struct Step {
  DType dtype;
  size_t tokens, width;
  int blocks = 2;
  size_t shift = 0;  // values
  bool has_more = true, needs_r = true, needs_weight = true;
  uint64_t seed = 1;
};

std::string text_of(const Step& step) {
  return concat(name_of(step.dtype), " [", step.tokens, ", ", step.width, "] blocks ", step.blocks, " shift ",
                step.shift, step.has_more ? " with dr_out" : "", step.needs_r ? " dr" : "",
                step.needs_weight ? " dweight" : "");
}

struct Inputs {
  std::vector<double> dy, more, r, weight, inverse;
};

// The gradients and how far off they may be, a value after the other.
struct Expected {
  std::vector<double> dr, off_r, dweight, off_weight;
};

Expected expected(const Step& step, const Inputs& in) {
  const double sums = sum_unit_of(step.dtype), unit = unit_of(step.dtype), width = static_cast<double>(step.width);
  Expected found{std::vector<double>(in.dy.size()), std::vector<double>(in.dy.size()), std::vector<double>(step.width),
                 std::vector<double>(step.width)};
  for (size_t token = 0; token < step.tokens; ++token) {
    const double i = in.inverse[token];
    double mean = 0.0, magnitude = 0.0;
    for (size_t j = 0; j < step.width; ++j) {
      const size_t at = token * step.width + j;
      mean += in.dy[at] * in.weight[j] * in.r[at] / width;
      magnitude += std::abs(in.dy[at] * in.weight[j] * in.r[at]) / width;
    }
    for (size_t j = 0; j < step.width; ++j) {
      const size_t at = token * step.width + j;
      const double more = step.has_more ? in.more[at] : 0.0, g = in.dy[at] * in.weight[j];
      found.dr[at] = i * (g - in.r[at] * i * i * mean) + more;
      const double size = i * (std::abs(g) + std::abs(in.r[at]) * i * i * magnitude) + std::abs(more);
      found.off_r[at] = size * ((width + 16) * sums + unit) + smallest_step(step.dtype);
      const double part = in.dy[at] * in.r[at] * i;
      found.dweight[j] += part;
      found.off_weight[j] += std::abs(part) * ((static_cast<double>(step.tokens) + 16) * sums + unit);
    }
  }
  return found;
}

void check(const Step& step) {
  const size_t n = step.tokens * step.width, shift = step.shift * size_of(step.dtype);
  const DType sum_dtype = sum_dtype_of(step.dtype);
  const Bytes dy = normal_values(step.dtype, n, step.seed), more = normal_values(step.dtype, n, step.seed + 1);
  const Bytes r = normal_values(step.dtype, n, step.seed + 2, 3.0);
  const Bytes weight = normal_values(step.dtype, step.width, step.seed + 3);
  std::vector<double> inverse(step.tokens);
  for (size_t token = 0; token < step.tokens; ++token) {
    double squares = 0.0;
    for (size_t j = 0; j < step.width; ++j) {
      squares += std::pow(value_at(step.dtype, r, token * step.width + j), 2) / static_cast<double>(step.width);
    }
    inverse[token] = 1.0 / std::sqrt(squares + kEps);
  }
  const Bytes inverse_bytes = bytes_of(sum_dtype, inverse);
  const DeviceBytes dy_on(0, dy, shift), more_on(0, more, shift), r_on(0, r, shift), weight_on(0, weight, shift);
  const DeviceBytes inverse_on(0, inverse_bytes), dr(0, Bytes(n * size_of(step.dtype), 'x'), shift);
  const DeviceBytes dweight(0, Bytes(weight.size(), 'x'));
  const DeviceBytes partial(0, Bytes(static_cast<size_t>(step.blocks) * step.width * size_of(sum_dtype), 'x'));
  EXPECT(cuda::launch_rms_norm_backward(step.dtype, dy_on.data(), step.has_more ? more_on.data() : nullptr, r_on.data(),
                                        weight_on.data(), inverse_on.data(), step.needs_r ? dr.data() : nullptr,
                                        step.needs_weight ? partial.data() : nullptr,
                                        step.needs_weight ? dweight.data() : nullptr, step.tokens, step.width,
                                        step.blocks, nullptr) == cudaSuccess);
  EXPECT(cudaDeviceSynchronize() == cudaSuccess);
  expect_no_reports(text_of(step));
  partial.values();  // looks behind its end
  const Inputs in{doubles(step.dtype, dy), doubles(step.dtype, more), doubles(step.dtype, r),
                  doubles(step.dtype, weight), doubles(sum_dtype, inverse_bytes)};
  const Expected want = expected(step, in);
  const Bytes got_r = dr.values(), got_weight = dweight.values();
  for (size_t at = 0; at < n && step.needs_r; ++at) {
    expect_near(value_at(step.dtype, got_r, at), want.dr[at], want.off_r[at], text_of(step) + ": dr");
  }
  for (size_t j = 0; j < step.width && step.needs_weight; ++j) {
    expect_near(value_at(step.dtype, got_weight, j), want.dweight[j], want.off_weight[j] + smallest_step(step.dtype),
                text_of(step) + ": dweight");
  }
  EXPECT(step.needs_r || got_r == Bytes(got_r.size(), 'x'), "dr was written, and was not asked for");
  EXPECT(step.needs_weight || got_weight == Bytes(got_weight.size(), 'x'),
         "dweight was written, and was not asked for");
  emu::reset();
}

cuda::TensorList list_of(const std::vector<std::unique_ptr<DeviceBytes>>& tensors, const std::vector<size_t>& sizes) {
  cuda::TensorList list{};
  for (; list.count < static_cast<int>(tensors.size()); ++list.count) {
    list.data[list.count] = tensors[static_cast<size_t>(list.count)]->data();
    list.numel[list.count] = sizes[static_cast<size_t>(list.count)];
  }
  return list;
}

double squared_norm(DType dtype, const cuda::TensorList& list, int blocks, double before) {
  const DeviceBytes partial(0, Bytes(static_cast<size_t>(blocks) * sizeof(double), 'x'));
  const DeviceBytes total(0, bytes_of(DType::F64, {before}));
  double* const sums = reinterpret_cast<double*>(partial.data());
  double* const to = reinterpret_cast<double*>(total.data());
  EXPECT(cuda::launch_squared_norm(dtype, list, sums, to, blocks, nullptr) == cudaSuccess);
  EXPECT(cudaDeviceSynchronize() == cudaSuccess);
  partial.values();
  return value_at(DType::F64, total.values(), 0);
}

}  // namespace

CASE(gradients_of_any_shape_in_any_place) {
  configure(1, 0);
  const std::vector<std::pair<size_t, size_t>> shapes = {{0, 8},  {3, 0},   {1, 1},  {1, 1000}, {17, 3},
                                                         {9, 16}, {2, 513}, {70, 5}, {8, 129},  {40, 512}};
  uint64_t seed = 0;
  for (const auto& [tokens, width] : shapes) {
    for (DType dtype : kFloating) {
      for (size_t shift : {0, 1}) {
        const int blocks = static_cast<int>(1 + ++seed % 5);
        if (is_slow() && (tokens * width > 2000 || seed % 2 == 0)) continue;
        check({.dtype = dtype, .tokens = tokens, .width = width, .blocks = blocks, .shift = shift, .seed = seed});
      }
    }
  }
}

CASE(only_what_is_wanted_is_written) {
  configure(1, 3);
  for (DType dtype : kFloating) {
    for (bool more : {false, true}) {
      check({.dtype = dtype, .tokens = 6, .width = 75, .has_more = more, .needs_weight = false});
      check({.dtype = dtype, .tokens = 6, .width = 75, .blocks = 4, .has_more = more, .needs_r = false});
    }
  }
}

CASE(gradients_of_rows_wider_than_the_registers_of_a_block) {
  configure(1, 0);
  check({.dtype = DType::F32, .tokens = 3, .width = 8500, .shift = 1});
  if (is_slow()) return;
  check({.dtype = DType::BF16, .tokens = 3, .width = 16800});
  check({.dtype = DType::F64, .tokens = 3, .width = 4500, .blocks = 1});
}

CASE(the_gradient_may_overwrite_what_arrives) {
  configure(1, 0);
  const size_t tokens = 5, width = 70;
  const Bytes dy = normal_values(DType::F32, tokens * width, 1), more = normal_values(DType::F32, tokens * width, 2);
  const Bytes r = normal_values(DType::F32, tokens * width, 3), weight = normal_values(DType::F32, width, 4);
  const DeviceBytes r_on(0, r), weight_on(0, weight),
      inverse(0, bytes_of(DType::F32, std::vector<double>(tokens, 0.7)));
  const DeviceBytes out(0, dy), over_dy(0, dy), over_more(0, more), dy_on(0, dy), more_on(0, more);
  const auto launch = [&](const DeviceBytes& g, const DeviceBytes& m, const DeviceBytes& dr) {
    EXPECT(cuda::launch_rms_norm_backward(DType::F32, g.data(), m.data(), r_on.data(), weight_on.data(), inverse.data(),
                                          dr.data(), nullptr, nullptr, tokens, width, 2, nullptr) == cudaSuccess);
  };
  launch(dy_on, more_on, out), launch(over_dy, more_on, over_dy), launch(dy_on, over_more, over_more);
  EXPECT(cudaDeviceSynchronize() == cudaSuccess);
  EXPECT(out.values() == over_dy.values() && out.values() == over_more.values() && out.values() != dy);
  expect_no_reports("in place");
  emu::reset();
}

CASE(the_squared_norm_of_many_tensors) {
  for (DType dtype : kFloating) {
    configure(1, 0);
    const std::vector<size_t> sizes = {1, 0, 7, 1025, 64, 3000, 5};
    std::vector<std::unique_ptr<DeviceBytes>> tensors;
    double want = 2.5;
    for (size_t i = 0; i < sizes.size(); ++i) {
      const double scale = dtype == DType::F16 ? 1.0 : dtype == DType::F64 ? 1e100 : 1e25;
      const Bytes values = normal_values(dtype, sizes[i], i, i % 2 == 0 ? scale : 1.0);
      tensors.push_back(std::make_unique<DeviceBytes>(0, values, i * size_of(dtype)));
      for (double value : doubles(dtype, values)) want += value * value;
    }
    const double one = squared_norm(dtype, list_of(tensors, sizes), 1, 2.5);
    const double many = squared_norm(dtype, list_of(tensors, sizes), 5, 2.5);
    EXPECT(std::abs(one - want) <= 1e-12 * want && std::abs(many - want) <= 1e-12 * want, name_of(dtype), ": ", one);
    EXPECT(many == squared_norm(dtype, list_of(tensors, sizes), 5, 2.5), "another run, another sum");
    expect_no_reports(name_of(dtype));
    emu::reset();
  }
}

CASE(the_squared_norm_shows_what_is_not_finite) {
  for (DType dtype : kFloating) {
    configure(1, 0);
    for (double bad : {static_cast<double>(NAN), static_cast<double>(INFINITY)}) {
      for (size_t place : {0, 500, 1002}) {
        std::vector<double> values(1003, 1.0);
        values[place] = bad;
        std::vector<std::unique_ptr<DeviceBytes>> tensors;
        tensors.push_back(std::make_unique<DeviceBytes>(0, bytes_of(dtype, values)));
        const double got = squared_norm(dtype, list_of(tensors, {values.size()}), 3, 0.0);
        EXPECT(std::isnan(bad) ? std::isnan(got) : got == INFINITY, name_of(dtype), ": ", got);
      }
    }
    emu::reset();
  }
}

CASE(launches_refuse_what_has_no_meaning) {
  configure(1, 0);
  cuda::TensorList list{};
  double scratch[2] = {};
  EXPECT(cuda::launch_squared_norm(DType::I32, list, scratch, scratch, 1, nullptr) == cudaErrorInvalidValue);
  EXPECT(cuda::launch_squared_norm(DType::F32, list, scratch, scratch, 0, nullptr) == cudaErrorInvalidValue);
  list.count = cuda::TensorList::kMax + 1;
  EXPECT(cuda::launch_squared_norm(DType::F32, list, scratch, scratch, 1, nullptr) == cudaErrorInvalidValue);
  for (int blocks : {0, 1025}) {
    EXPECT(cuda::launch_rms_norm_backward(DType::F32, scratch, nullptr, scratch, scratch, scratch, scratch, nullptr,
                                          nullptr, 1, 1, blocks, nullptr) == cudaErrorInvalidValue);
  }
  emu::reset();
}
