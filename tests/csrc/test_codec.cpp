// Every codec's promises: error bound, NaN, zeros, tails; and the conversions against the compiler's own.
#include <cmath>
#include <limits>
#include <random>

#include "core/codec/codec.h"
#include "core/wire.h"
#include "expect.h"

using namespace tpk;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
const size_t kLengths[] = {1, 2, 31, 511, 512, 513, 1024, 5000};

std::vector<float> round_trip(Codec codec, const std::vector<float>& values) {
  const Wire& wire = wire_of(DType::F32, codec, ReduceOp::Sum);
  std::vector<char> packed(wire.bytes(values.size()));
  std::vector<float> decoded(values.size());
  wire.encode(values.data(), packed.data(), values.size());
  wire.decode(packed.data(), decoded.data(), values.size());
  return decoded;
}

// Values of one block around 10^exponent, most within three decades of the largest.
std::vector<float> around(double exponent, size_t n, uint32_t seed) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<double> decades(-3.0, 0.0), sign(-1.0, 1.0);
  std::vector<float> values(n);
  for (float& value : values) {
    value = static_cast<float>(std::pow(10.0, exponent + decades(random))) * (sign(random) < 0 ? -1.0f : 1.0f);
  }
  return values;
}

CASE(fp16_keeps_eleven_bits_at_every_magnitude) {
  for (double exponent = -36; exponent <= 38; exponent += 0.5) {
    for (size_t n : kLengths) {
      const std::vector<float> values = around(exponent, n, static_cast<uint32_t>(n));
      const std::vector<float> decoded = round_trip(Codec::Fp16, values);
      for (size_t i = 0; i < n; ++i) {
        EXPECT(std::abs(decoded[i] - values[i]) <= std::ldexp(std::abs(values[i]), -11));
      }
    }
  }
}

// What is far below the block's largest value loses at most 2^-39 of that largest value.
CASE(fp16_bounds_the_error_of_small_values_beside_large_ones) {
  std::vector<float> values(512);
  for (size_t i = 0; i < values.size(); ++i) values[i] = std::ldexp(1.2345f, -static_cast<int>(i % 60));
  const std::vector<float> decoded = round_trip(Codec::Fp16, values);
  for (size_t i = 0; i < values.size(); ++i) {
    const float bound = std::max(std::ldexp(std::abs(values[i]), -11), std::ldexp(values[0], -39));
    EXPECT(std::abs(decoded[i] - values[i]) <= bound);
  }
}

CASE(fp16_packs_subnormals) {
  std::vector<float> values(512);
  for (size_t i = 0; i < values.size(); ++i) values[i] = from_bits(static_cast<uint32_t>(i));  // i * 2^-149
  const std::vector<float> decoded = round_trip(Codec::Fp16, values);
  for (size_t i = 0; i < values.size(); ++i) EXPECT(decoded[i] == values[i]);
}

CASE(a_value_that_is_not_finite_poisons_its_block_only) {
  for (float bad : {kNan, kInfinity, -kInfinity}) {
    std::vector<float> values(1536, 1.0f);
    values[700] = bad;
    const std::vector<float> decoded = round_trip(Codec::Fp16, values);
    for (size_t i = 0; i < values.size(); ++i) EXPECT(i / 512 == 1 ? std::isnan(decoded[i]) : decoded[i] == 1.0f);
  }
}

CASE(bf16_keeps_eight_bits_and_never_hides_a_nan) {
  for (double exponent = -34; exponent <= 37; exponent += 0.5) {
    const std::vector<float> values = around(exponent, 999, 5);
    const std::vector<float> decoded = round_trip(Codec::Bf16, values);
    for (size_t i = 0; i < values.size(); ++i) {
      EXPECT(std::abs(decoded[i] - values[i]) <= std::ldexp(std::abs(values[i]), -8));
    }
  }
  const std::vector<float> decoded = round_trip(Codec::Bf16, {kNan, kInfinity, -kInfinity, from_bits(0x7f800001u)});
  EXPECT(std::isnan(decoded[0]) && decoded[1] == kInfinity && decoded[2] == -kInfinity && std::isnan(decoded[3]));
}

CASE(zeros_keep_their_sign_and_integers_their_value) {
  for (Codec codec : {Codec::Fp16, Codec::Bf16}) {
    std::vector<float> values(600);
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(static_cast<int>(i % 257) - 128);
    values[1] = 0.0f, values[2] = -0.0f;
    const std::vector<float> decoded = round_trip(codec, values);
    for (size_t i = 0; i < values.size(); ++i) EXPECT(decoded[i] == values[i]);
    EXPECT(!std::signbit(decoded[1]) && std::signbit(decoded[2]));
  }
}

CASE(bytes_on_the_wire_are_what_the_headers_say) {
  EXPECT(Fp16Codec::bytes(512) == 1040 && Fp16Codec::bytes(513) == 1040 + 18 && Fp16Codec::bytes(0) == 0);
  EXPECT(Bf16Codec::bytes(513) == 1026);
  EXPECT(Int8Codec::bytes(512) == 544 && Int8Codec::bytes(513) == 544 + 33 && Int8Codec::bytes(0) == 0);
  EXPECT(Fp8Codec::bytes(512) == 528 && Fp8Codec::bytes(513) == 528 + 17 && Fp8Codec::bytes(0) == 0);
}

// The sum of three wires, decoded, against double; and packing the sum again costs one more rounding.
CASE(sums_are_taken_in_float) {
  const size_t n = 1300;
  for (Codec codec : {Codec::None, Codec::Fp16, Codec::Bf16}) {
    const double step = codec == Codec::None ? 0x1p-24 : codec == Codec::Fp16 ? 0x1p-11 : 0x1p-8;
    const Wire& wire = wire_of(DType::F32, codec, ReduceOp::Avg);
    std::vector<std::vector<char>> wires;
    std::vector<double> exact(n), size(n);
    for (uint32_t r = 0; r < 3; ++r) {
      const std::vector<float> values = around(0, n, 40 + r);
      for (size_t i = 0; i < n; ++i) exact[i] += values[i] / 3.0, size[i] += std::abs(values[i]) / 3.0;
      wires.emplace_back(wire.bytes(n));
      wire.encode(values.data(), wires.back().data(), n);
    }
    const void* inputs[] = {wires[0].data(), wires[1].data(), wires[2].data()};
    std::vector<float> sum(n), again(n);
    wire.reduce_to_values(inputs, 3, sum.data(), n);
    std::vector<char> packed(wire.bytes(n));
    void* output = packed.data();
    wire.reduce(inputs, 3, &output, 1, n);
    wire.decode(packed.data(), again.data(), n);
    for (size_t i = 0; i < n; ++i) {
      EXPECT(std::abs(sum[i] - exact[i]) <= (step + 0x1p-22) * size[i]);
      EXPECT(std::abs(again[i] - exact[i]) <= (2.1 * step + 0x1p-22) * size[i] + 0x1p-39);
    }
  }
}

CASE(conversions_equal_the_compilers) {
#if defined(__ARM_FP16_FORMAT_IEEE)  // g++ before 13 has no _Float16 there
  using CompilersHalf = __fp16;
#elif defined(__FLT16_MANT_DIG__)
  using CompilersHalf = _Float16;
#endif
#if defined(__FLT16_MANT_DIG__)
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const uint16_t half = static_cast<uint16_t>(bits);
    CompilersHalf value;
    std::memcpy(&value, &half, sizeof value);
    const float expected = static_cast<float>(value), got = to_float(static_cast<Half>(half));
    EXPECT(std::isnan(expected) ? std::isnan(got) : bits_of(expected) == bits_of(got));
  }
  for (uint64_t bits = 0; bits < (uint64_t{1} << 32); bits += 4999) {
    const float value = from_bits(static_cast<uint32_t>(bits));
    const auto half = static_cast<CompilersHalf>(value);
    uint16_t expected;
    std::memcpy(&expected, &half, sizeof expected);
    if (value == value) EXPECT(static_cast<uint16_t>(to_half(value)) == expected);
  }
#endif
  EXPECT(std::isnan(to_float(to_half(kNan))));
  EXPECT(to_float(to_half(65519.0f)) == 65504.0f && to_float(to_half(65520.0f)) == kInfinity);
}

CASE(max_and_min_keep_a_nan) {
  for (ReduceOp op : {ReduceOp::Max, ReduceOp::Min}) {
    const Wire& wire = wire_of(DType::F32, Codec::None, op);
    const float a[] = {1, kNan, 3, -0.5f}, b[] = {2, 1, kNan, -1}, c[] = {0, 0, 0, 0};
    for (int ranks : {2, 3}) {
      const void* inputs[] = {a, b, c};
      float out[4];
      wire.reduce_to_values(inputs, ranks, out, 4);
      EXPECT(std::isnan(out[1]) && std::isnan(out[2]));
      EXPECT(out[0] == (op == ReduceOp::Max ? 2 : ranks == 2 ? 1 : 0));
    }
  }
}

}  // namespace
