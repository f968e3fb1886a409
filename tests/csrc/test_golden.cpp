// The wire, byte by byte: what every backend must write, wherever a message is cut.
#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "codec/codec.h"
#include "cpu/wire.h"
#include "expect.h"

using namespace tpk;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

std::vector<unsigned char> encoded(Codec codec, const std::vector<float>& values) {
  const Wire& wire = wire_of(DType::F32, codec, ReduceOp::Sum);
  std::vector<unsigned char> bytes(wire.bytes(values.size()));
  wire.encode(values.data(), bytes.data(), values.size());
  return bytes;
}

}  // namespace

CASE(the_fp16_wire_has_these_bytes) {
  // The largest magnitude, 333824, is 1.27 * 2^18: the shift is 14 - 18 = -4, and 1.0 travels as 2^-4.
  const std::vector<unsigned char> golden = {0xfc, 0xff, 0, 0, 0,    0,    0,    0,    0,    0,    0,    0,
                                             0,    0,    0, 0, 0x00, 0x00, 0x00, 0x2c, 0x00, 0xb1, 0x18, 0x75};
  EXPECT(encoded(Codec::Fp16, {0.0f, 1.0f, -2.5f, 333824.0f}) == golden);
}

CASE(a_block_that_is_not_finite_has_no_payload_whatever_made_it_so) {
  std::vector<unsigned char> golden(16 + 8);
  golden[1] = 0x80;  // the shift no finite block has
  for (float bad : {kInfinity, -kInfinity, std::nanf(""), -std::nanf("")}) {
    EXPECT(encoded(Codec::Fp16, {1.0f, -2.0f, bad, 0.0f}) == golden);
  }
}

CASE(exponents_of_floats_are_the_library_s) {
  for (uint32_t bits = 1; bits < 0x7f800000u; bits += bits < 0x01000000u ? 1777 : 99991) {
    EXPECT(exponent_of(bits) == std::ilogb(from_bits(bits)), bits);
  }
  for (uint32_t bits : {1u, 2u, 3u, 0x007fffffu, 0x00800000u, 0x7f7fffffu}) {
    EXPECT(exponent_of(bits) == std::ilogb(from_bits(bits)), bits);
  }
  for (int exponent = -126; exponent <= 127; ++exponent) EXPECT(power_of_two(exponent) == std::ldexp(1.0f, exponent));
}

CASE(the_bf16_wire_has_these_bytes_and_rounds_ties_to_even) {
  const std::vector<unsigned char> golden = {0x80, 0x3f, 0x80, 0x3f, 0x82, 0x3f, 0x20, 0xc0, 0x80, 0x7f};
  EXPECT(encoded(Codec::Bf16, {1.0f, 1.00390625f, 1.01171875f, -2.5f, kInfinity}) == golden);
}

CASE(every_half_survives_the_way_through_float) {
  for (uint32_t bits = 0; bits < 0x10000u; ++bits) {
    const float value = to_float(static_cast<Half>(bits));
    const bool is_nan = (bits & 0x7fffu) > 0x7c00u;
    EXPECT(std::isnan(value) == is_nan);
    EXPECT(is_nan || static_cast<uint32_t>(to_half(value)) == bits);
  }
  EXPECT(to_float(Half{0x3c00}) == 1.0f && to_float(Half{0x0001}) == 0x1p-24f && to_float(Half{0x7bff}) == 65504.0f);
}

CASE(floats_between_two_halves_go_to_the_nearer_and_from_the_middle_to_the_even_one) {
  for (uint32_t bits = 0; bits < 0x7bffu; ++bits) {
    const float low = to_float(static_cast<Half>(bits)), high = to_float(static_cast<Half>(bits + 1));
    const float middle = low + (high - low) / 2;  // exact
    EXPECT(static_cast<uint32_t>(to_half(middle)) == bits + (bits & 1u));
    EXPECT(static_cast<uint32_t>(to_half(std::nextafter(middle, 0.0f))) == bits);
    EXPECT(static_cast<uint32_t>(to_half(std::nextafter(middle, kInfinity))) == bits + 1);
    EXPECT(static_cast<uint32_t>(to_half(-middle)) == (0x8000u | (bits + (bits & 1u))));
  }
  EXPECT(to_half(65520.0f) == Half{0x7c00} && to_half(65519.0f) == Half{0x7bff} && to_half(kInfinity) == Half{0x7c00});
}

CASE(a_message_cut_at_blocks_has_the_bytes_of_the_whole) {
  std::mt19937 random(3);
  std::vector<float> values(5 * 512 + 100);
  for (float& value : values)
    value = std::ldexp(std::normal_distribution<float>()(random), static_cast<int>(random() % 80) - 40);
  for (Codec codec : {Codec::None, Codec::Fp16, Codec::Bf16}) {
    const Wire& wire = wire_of(DType::F32, codec, ReduceOp::Sum);
    const std::vector<unsigned char> whole = encoded(codec, values);
    for (size_t cut = 0; cut < values.size(); cut += 512) {
      const std::vector<unsigned char> part = encoded(codec, {values.begin() + static_cast<long>(cut), values.end()});
      EXPECT(whole.size() == wire.offset(cut) + part.size());
      EXPECT(std::memcmp(whole.data() + wire.offset(cut), part.data(), part.size()) == 0);
    }
  }
}

CASE(names_and_codecs_are_one_list) {
  for (int i = 0; i < static_cast<int>(Codec::Count); ++i) {
    EXPECT(codec_of(name_of(static_cast<Codec>(i))) == static_cast<Codec>(i));
  }
  EXPECT(codec_of("fp17") == Codec::Count && codec_of("") == Codec::Count);
}
