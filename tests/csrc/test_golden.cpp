// The wire, byte by byte: what every backend must write, wherever a message is cut.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "core/codec/codec.h"
#include "core/wire.h"
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
  // The largest magnitude, 333824, is 1.27 * 2^18: the shift is 14 - 18 = -4, and 1.0 is sent as 2^-4.
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

CASE(the_int8_wire_has_these_bytes) {
  // 100 / 127 is 1.5748 * 2^-1 and goes up to 202 / 128 * 2^-1: exponent 190, mantissa 74, so 0x5f4a. In the second
  // group 2^-149 / 127, lifted by 2^64: 1.008 * 2^-92 goes up to 130 / 128 * 2^-92, so exponent 35, mantissa 2.
  std::vector<float> values(34);
  values[0] = 100.0f, values[1] = -100.0f, values[2] = 0.39f, values[3] = 0.4f, values[4] = 50.0f;
  values[33] = -0x1p-149f;
  std::vector<unsigned char> golden(32 + 34);
  golden[0] = 0x4a, golden[1] = 0x5f, golden[2] = 0x82, golden[3] = 0x11;
  golden[32] = 127, golden[33] = 0x81, golden[34] = 0, golden[35] = 1, golden[36] = 63, golden[32 + 33] = 0x82;
  EXPECT(encoded(Codec::Int8, values) == golden);
}

CASE(the_fp8_wire_has_these_bytes_and_rounds_ties_to_even) {
  // 448 is the largest e4m3 and 2^-9 the smallest: the exponent that leaves them is 134. 449 needs one more.
  std::vector<float> values(40);
  values[0] = 448.0f, values[1] = -0.0f, values[2] = 0x1p-9f, values[3] = -1.0f, values[4] = 17.0f, values[5] = 19.0f;
  values[6] = 0x1p-10f, values[7] = 0x1.8p-9f, values[32] = 449.0f, values[33] = 2.0f;
  std::vector<unsigned char> golden(16 + 40);
  golden[0] = 134, golden[1] = 135;
  const unsigned char payloads[] = {0x7e, 0x80, 0x01, 0xb8, 0x58, 0x5a, 0x00, 0x02};
  std::copy(std::begin(payloads), std::end(payloads), golden.begin() + 16);
  golden[48] = 0x76, golden[49] = 0x38;
  EXPECT(encoded(Codec::Fp8, values) == golden);
}

CASE(a_group_that_is_not_finite_has_no_payload_and_spares_its_neighbours) {
  std::vector<float> values(64, 1.0f);
  std::vector<unsigned char> int8(32 + 64), fp8(16 + 64);
  int8[0] = int8[1] = 0xff, fp8[0] = 0xff;
  int8[2] = 0x02, int8[3] = 0x5c, fp8[1] = 134 - 8;  // 1 / 127 goes up to 130 / 128 * 2^-7; 1 is sent as 256
  std::fill(int8.begin() + 64, int8.end(), 126), std::fill(fp8.begin() + 48, fp8.end(), 0x78);
  for (float bad : {kInfinity, -kInfinity, std::nanf(""), -std::nanf("")}) {
    values[7] = bad;
    EXPECT(encoded(Codec::Int8, values) == int8);
    EXPECT(encoded(Codec::Fp8, values) == fp8);
  }
}

CASE(every_e4m3_survives_the_way_through_float) {
  for (uint8_t exponent : {uint8_t{0}, uint8_t{1}, uint8_t{134}, uint8_t{253}}) {
    for (uint32_t bits = 0; bits < 256; ++bits) {
      if ((bits & 0x7f) == 0x7f) continue;  // e4m3's NaN, which is never sent
      const float value = Fp8Codec::unpack(static_cast<Fp8>(bits), Fp8Codec::unpacking(exponent));
      const auto packed = static_cast<uint8_t>(Fp8Codec::pack(value, Fp8Codec::packing(exponent)));
      EXPECT(std::isfinite(value) && packed == bits, bits);
      const int e = static_cast<int>(bits >> 3 & 15);
      const double significand = static_cast<double>((bits & 7) + (e > 0 ? 8 : 0)) * (bits & 0x80 ? -1 : 1);
      EXPECT(static_cast<double>(value) == std::ldexp(significand, (e > 0 ? e : 1) - 10 + exponent - 134), bits);
    }
  }
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
  for (int c = 0; c < static_cast<int>(Codec::Count); ++c) {
    const Codec codec = static_cast<Codec>(c);
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
