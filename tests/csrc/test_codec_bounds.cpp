// The error bound that the head of each codec states, over everything a float can be: magnitudes from 1e-30 to 1e30 and
// beyond, subnormals, zeros of both signs, tails of every length, and what becomes of NaN and infinity.
#include <algorithm>
#include <cmath>
#include <limits>
#include <random>

#include "core/codec/codec.h"
#include "core/wire.h"
#include "expect.h"

using namespace tpk;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
const size_t kLengths[] = {0, 1, 2, 31, 32, 33, 63, 511, 512, 513, 1021, 1024, 1300};

// |x - decoded| <= share * |x|, or of_largest * the largest magnitude of its group, whichever is more, and `least` on
// top. What rounds to 2^128 is infinity afterwards: `highest` is the largest magnitude that does not.
struct Bound {
  Codec codec;
  size_t group;  // values that share a scale
  double share, of_largest, least;
  float highest;
  double at(double value, double largest) const {
    return std::max(share * std::abs(value), of_largest * largest) + least;
  }
};
const Bound kBounds[] = {{Codec::Fp16, 512, 0x1p-11, 0x1p-39, 0x1p-150, 0x1.ffdfp127f},
                         {Codec::Bf16, 1, 0x1p-8, 0, 0x1p-134, 0x1.fep127f},
                         {Codec::Int8, 32, 0, 1.0 / 252, 0x1p-149, 0x1.fffffep127f},
                         {Codec::Fp8, 32, 0x1p-4, 0x1p-17, 0x1p-144, 0x1.efp127f}};

std::vector<float> round_trip(const Wire& wire, const std::vector<float>& values) {
  std::vector<char> packed(wire.bytes(values.size()));
  std::vector<float> decoded(values.size());
  wire.encode(values.data(), packed.data(), values.size());
  wire.decode(packed.data(), decoded.data(), values.size());
  return decoded;
}

void expect_within(const Bound& bound, const std::vector<float>& values, const std::string& what) {
  const std::vector<float> decoded = round_trip(wire_of(DType::F32, bound.codec, ReduceOp::Sum), values);
  for (size_t start = 0; start < values.size(); start += bound.group) {
    const size_t end = std::min(values.size(), start + bound.group);
    double largest = 0;
    bool finite = true;
    for (size_t i = start; i < end; ++i) {
      finite = finite && std::isfinite(values[i]);
      largest = std::max(largest, std::abs(static_cast<double>(values[i])));
    }
    for (size_t i = start; i < end; ++i) {
      if (!finite) {
        EXPECT(!std::isfinite(decoded[i]), name_of(bound.codec), " ", what, ": value ", i, " hides what is not finite");
        continue;
      }
      const double off = std::abs(static_cast<double>(decoded[i]) - static_cast<double>(values[i]));
      EXPECT(off <= bound.at(values[i], largest), name_of(bound.codec), " ", what, ": value ", i, " is ", values[i],
             ", decoded ", decoded[i], ", the largest beside it ", largest);
    }
  }
}

// Around 10^exponent, most within `decades` of the largest.
std::vector<float> around(double exponent, double decades, size_t n, uint64_t seed, float highest = 3e38f) {
  std::mt19937_64 random(seed);
  std::uniform_real_distribution<double> below(-decades, 0.0);
  std::vector<float> values(n);
  for (float& value : values) {
    const float size = std::min(static_cast<float>(std::pow(10.0, exponent + below(random))), highest);
    value = random() % 2 == 0 ? size : -size;
  }
  return values;
}

CASE(every_codec_has_a_bound_here) {
  EXPECT(std::size(kBounds) == static_cast<size_t>(Codec::Count) - 1, "a codec's head states its bound: test it");
}

CASE(every_magnitude_and_length_stays_within_the_bound) {
  uint64_t seed = 0;
  for (const Bound& bound : kBounds) {
    for (double exponent = -45; exponent <= 39; exponent += 1.5) {
      for (size_t n : kLengths) {
        const double decades = std::vector<double>{0.1, 1, 3, 8}[++seed % 4];
        expect_within(bound, around(exponent, decades, n, seed, bound.highest),
                      concat("around 1e", exponent, ", n = ", n));
      }
    }
    for (double exponent = -8; exponent <= -3; exponent += 0.05) {  // where others lose gradients
      expect_within(bound, around(exponent, 1, 64, ++seed), concat("around 1e", exponent));
    }
    for (float value : {333824.0f, 65504.0f, 65520.0f, 1e-6f, 1e30f, 1e-30f, 1.0f, 0x1p-126f, 0x1p-149f, 3.0e38f}) {
      for (size_t n : {1, 33, 600}) expect_within(bound, std::vector<float>(n, value), concat("all ", value));
    }
  }
}

CASE(subnormals_zeros_and_every_mantissa_stay_within_the_bound) {
  for (const Bound& bound : kBounds) {
    std::vector<float> subnormal(1021);
    for (size_t i = 0; i < subnormal.size(); ++i) subnormal[i] = from_bits(static_cast<uint32_t>(i * i % 99991));
    expect_within(bound, subnormal, "subnormals");
    for (float zero : {0.0f, -0.0f}) {
      const std::vector<float> decoded =
          round_trip(wire_of(DType::F32, bound.codec, ReduceOp::Sum), std::vector<float>(1000, zero));
      for (float value : decoded) EXPECT(value == 0.0f, name_of(bound.codec), ": zeros stay zeros");
    }
    // A largest value with every leading mantissa, beside values at every fraction of it.
    for (uint32_t mantissa = 0; mantissa < (1u << 23); mantissa += 16381) {
      std::vector<float> values(32);
      const float largest = from_bits(0x3f800000u + mantissa);
      for (size_t i = 0; i < 32; ++i) values[i] = largest * (1.0f - static_cast<float>(i) / 32.0f);
      expect_within(bound, values, concat("mantissa ", mantissa));
    }
    for (uint32_t exponent = 1; exponent < 255; ++exponent) {
      std::vector<float> values(32, from_bits(exponent << 23));
      values[3] = std::min(from_bits((exponent << 23) | 0x7fffffu), bound.highest);
      values[5] = from_bits((exponent << 23) | 0x600000u);
      expect_within(bound, values, concat("exponent ", exponent));
    }
  }
}

CASE(what_is_not_finite_poisons_its_group_and_no_other) {
  for (const Bound& bound : kBounds) {
    for (float bad : {kInfinity, -kInfinity, std::nanf(""), from_bits(0x7f800001u), from_bits(0xffffffffu)}) {
      for (size_t n : {1300, 700, 33}) {
        for (size_t at : {size_t{0}, n / 2, n - 1}) {
          std::vector<float> values = around(0, 2, n, at + 1);
          values[at] = bad;
          expect_within(bound, values, concat(bad, " at ", at, " of ", n));
        }
      }
    }
  }
}

// What is left over is what was not sent, to the bit: so that nothing is lost between messages.
CASE(residuals_are_exact) {
  uint64_t seed = 0;
  for (const Bound& bound : kBounds) {
    const Wire& wire = wire_of(DType::F32, bound.codec, ReduceOp::Sum);
    for (double exponent = -40; exponent <= 36; exponent += 2) {
      for (size_t n : {33, 513, 1021}) {
        const std::vector<float> values = around(exponent, 3, n, ++seed);
        std::vector<float> residual = around(exponent - 2, 3, n, ++seed), put_in(n), sent(n);
        for (size_t i = 0; i < n; ++i) put_in[i] = 0.25f * values[i] + residual[i];
        std::vector<char> packed(wire.bytes(n)), again(wire.bytes(n));
        wire.encode_with_feedback(values.data(), residual.data(), packed.data(), 0.25f, n);
        wire.decode(packed.data(), sent.data(), n);
        wire.encode(put_in.data(), again.data(), n);
        EXPECT(packed == again, name_of(bound.codec), ": the wire is that of the sum");
        for (size_t i = 0; i < n; ++i) {
          const double whole = static_cast<double>(residual[i]) + static_cast<double>(sent[i]);
          EXPECT(whole == static_cast<double>(put_in[i]), name_of(bound.codec), " around 1e", exponent, ": value ", i,
                 " is ", put_in[i], ", sent ", sent[i], ", kept ", residual[i]);
        }
      }
    }
  }
}

}  // namespace
