// The loops of this machine's instruction set against the plain ones, bit by bit: every codec, dtype and length, and
// values of every kind in one block.
#include "core/moves.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>

#include "expect.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

using namespace tpk;

namespace {

constexpr size_t kLengths[] = {1, 31, 33, 511, 512, 513, 1024, 1536, 2000};
constexpr size_t kMost = 2000;

using Bytes = std::vector<unsigned char>;

float bits_as_float(uint32_t bits) { return from_bits(bits); }

// Any bits whose exponent is at most `exponent`, and at least `below` less.
float random_float(std::mt19937_64& random, int exponent, int below) {
  const int own = std::max(0, exponent - static_cast<int>(random() % static_cast<unsigned>(below + 1)));
  return bits_as_float(static_cast<uint32_t>(random() & 0x807fffffu) | static_cast<uint32_t>(own) << 23);
}

// Values in the middle between two that a codec can send, and beside it: few leading bits, then a one, then -1, 0 or 1.
float random_tie(std::mt19937_64& random, int exponent, int below) {
  uint32_t bits = bits_of(random_float(random, exponent, below));
  const unsigned kept = static_cast<unsigned>(random() % 12);
  bits = (bits >> (22 - kept) | 1u) << (22 - kept);
  return bits_as_float(bits + static_cast<uint32_t>(random() % 3) - 1u);
}

// Message number `which`: exponents move through all of float; some groups are zeros, some hold NaN or infinity.
std::vector<float> message(size_t n, unsigned which) {
  std::mt19937_64 random(which);
  const int exponent = static_cast<int>(which % 255),
            below = static_cast<int>(std::vector<unsigned>{0, 3, 20, 60}[which / 3 % 4]);
  std::vector<float> values(n);
  for (float& value : values) {
    value = random() % 2 == 0 ? random_float(random, exponent, below) : random_tie(random, exponent, below);
  }
  for (size_t start = 0; start < n; start += 32) {
    const unsigned kind = static_cast<unsigned>(random() % (which % 2 == 0 ? 4 : 60));
    const size_t end = std::min(n, start + 32);
    if (kind == 1)
      std::fill(values.begin() + static_cast<long>(start), values.begin() + static_cast<long>(end),
                kind % 3 ? 0.0f : -0.0f);
    if (kind == 2)
      values[start + random() % (end - start)] =
          bits_as_float(0x7f800000u | static_cast<uint32_t>(random() & 0x80400001u));
    if (kind == 3) values[start] = 0.0f, values[end - 1] = -0.0f;
  }
  return values;
}

bool equal(const std::vector<float>& a, const std::vector<float>& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

template <class Body>
void for_each_codec(Body body) {
#define TPK_BODY(name, id, C) body(Codec::id, C::bytes(kMost), &C::bytes);
  TPK_CODECS(TPK_BODY)
#undef TPK_BODY
}

}  // namespace

CASE(every_block_is_packed_and_unpacked_to_the_bits_of_the_plain_loops) {
  for_each_codec([](Codec codec, size_t, size_t (*bytes)(size_t)) {
    const CodecMoves &ours = moves().codecs[static_cast<size_t>(codec)],
                     &plain = kPlainMoves.codecs[static_cast<size_t>(codec)];
    for (unsigned which = 0; which < 5000; ++which) {
      const size_t n = kLengths[which % std::size(kLengths)];
      const std::vector<float> values = message(n, which);
      Bytes wire(bytes(n)), expected(bytes(n));
      ours.encode(values.data(), reinterpret_cast<char*>(wire.data()), n);
      plain.encode(values.data(), reinterpret_cast<char*>(expected.data()), n);
      const auto off = std::mismatch(wire.begin(), wire.end(), expected.begin());
      EXPECT(wire == expected, name_of(codec), ", message ", which, " of ", n, ": byte ", off.first - wire.begin());
      std::vector<float> back(n), expected_back(n);
      ours.decode(reinterpret_cast<const char*>(wire.data()), back.data(), n);
      plain.decode(reinterpret_cast<const char*>(wire.data()), expected_back.data(), n);
      EXPECT(equal(back, expected_back), name_of(codec), ", message ", which, " of ", n);
    }
  });
}

CASE(what_was_sent_and_what_is_left_come_with_the_wire_to_the_bits_of_the_plain_loops) {
  for_each_codec([](Codec codec, size_t, size_t (*bytes)(size_t)) {
    const CodecMoves &ours = moves().codecs[static_cast<size_t>(codec)],
                     &plain = kPlainMoves.codecs[static_cast<size_t>(codec)];
    for (unsigned which = 0; which < 2500; ++which) {
      const size_t n = kLengths[which % std::size(kLengths)], off = which % 4;  // values and wires at any address
      const auto what = [&] { return concat(name_of(codec), ", message ", which, " of ", n); };
      std::vector<float> values = message(n + off, which), expected(n);
      values.erase(values.begin(), values.begin() + static_cast<long>(off));
      values.insert(values.begin(), off, 0.0f);
      Bytes packed(bytes(n)), wire(bytes(n) + 2 * off);
      plain.encode(values.data() + off, reinterpret_cast<char*>(packed.data()), n);
      plain.decode(reinterpret_cast<const char*>(packed.data()), expected.data(), n);
      char* const to = reinterpret_cast<char*>(wire.data() + 2 * off);
      const auto is_wire = [&] {
        return std::equal(packed.begin(), packed.end(), wire.begin() + static_cast<long>(2 * off));
      };

      std::vector<float> sent(n + off), in_place = values;
      ours.encode_sent(values.data() + off, to, sent.data() + off, n);
      EXPECT(is_wire() && std::memcmp(sent.data() + off, expected.data(), n * sizeof(float)) == 0, what());
      ours.encode_sent(in_place.data() + off, to, in_place.data() + off, n);
      EXPECT(is_wire() && std::memcmp(in_place.data() + off, expected.data(), n * sizeof(float)) == 0, what(),
             " in place");

      std::vector<float> rest(n + off, 0.75f), expected_rest(n, 0.75f);
      for (size_t i = 0; i < n; ++i) {
        const float left = values[off + i] - expected[i];
        if (std::isfinite(left)) expected_rest[i] = left;
      }
      ours.encode_rest(values.data() + off, to, rest.data() + off, n);
      EXPECT(is_wire() && std::memcmp(rest.data() + off, expected_rest.data(), n * sizeof(float)) == 0, what(),
             " rest");
    }
  });
}

CASE(wires_are_added_in_order_to_the_bits_of_the_plain_loops) {
  for_each_codec([](Codec codec, size_t most, size_t (*bytes)(size_t)) {
    const CodecMoves &ours = moves().codecs[static_cast<size_t>(codec)],
                     &plain = kPlainMoves.codecs[static_cast<size_t>(codec)];
    for (unsigned which = 0; which < 600; ++which) {
      const size_t n = kLengths[which % std::size(kLengths)], start = which % 3 == 0 && n > 512 ? 512 : 0;
      std::vector<std::vector<char>> wires(5, std::vector<char>(most));
      std::vector<const char*> inputs;
      for (unsigned r = 0; r < wires.size(); ++r) {
        plain.encode(message(n, which + r % 2).data(), wires[r].data(), n);
        inputs.push_back(wires[r].data());
      }
      for (int num_wires = 1; num_wires <= 5; ++num_wires) {
        std::vector<float> sums(n - start), expected(n - start);
        ours.sum(inputs.data(), num_wires, bytes(start), sums.data(), n - start);
        plain.sum(inputs.data(), num_wires, bytes(start), expected.data(), n - start);
        for (size_t i = 0; i < sums.size(); ++i) {
          // The bits of a NaN that comes of two others are the processor's choice.
          EXPECT(bits_of(sums[i]) == bits_of(expected[i]) || (std::isnan(sums[i]) && std::isnan(expected[i])),
                 name_of(codec), ", ", num_wires, " wires, message ", which, " of ", n, ": value ", i);
        }
      }
    }
  });
}

CASE(halves_and_bfloats_become_floats_and_back_with_the_bits_of_the_plain_loops) {
  for (DType dtype : {DType::BF16, DType::F16}) {
    const DTypeMoves &ours = moves().dtypes[static_cast<size_t>(dtype)],
                     &plain = kPlainMoves.dtypes[static_cast<size_t>(dtype)];
    std::vector<uint16_t> all(65536), back(65536), expected_back(65536);
    for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<uint16_t>(i);
    for (size_t n : {size_t{65536}, size_t{65521}, size_t{7}}) {
      std::vector<float> values(n), expected(n);
      ours.to_floats(all.data(), values.data(), n);
      plain.to_floats(all.data(), expected.data(), n);
      EXPECT(equal(values, expected), name_of(dtype), ", n = ", n);
    }
    for (uint64_t start = 0; start < (uint64_t{1} << 32); start += 65536 * 61) {
      std::vector<float> values(65536);
      for (size_t i = 0; i < values.size(); ++i) values[i] = bits_as_float(static_cast<uint32_t>(start + i * 61));
      ours.from_floats(values.data(), back.data(), values.size());
      plain.from_floats(values.data(), expected_back.data(), values.size());
      EXPECT(back == expected_back, name_of(dtype), " from ", start);
    }
  }
}

CASE(what_was_not_sent_is_kept_to_the_bits_of_the_plain_loops) {
  for (unsigned which = 0; which < 300; ++which) {
    const size_t n = kLengths[which % std::size(kLengths)];
    const std::vector<float> values = message(n, which), sent = message(n, which + 1);
    std::vector<float> sum(n), expected(n), residual = message(n, which + 2), expected_residual = residual;
    moves().add_residual(values.data(), 0.37f, residual.data(), sum.data(), n);
    kPlainMoves.add_residual(values.data(), 0.37f, residual.data(), expected.data(), n);
    for (size_t i = 0; i < n; ++i)
      EXPECT(bits_of(sum[i]) == bits_of(expected[i]) || std::isnan(sum[i]), which, ", ", i);
    moves().keep_rest(expected.data(), sent.data(), residual.data(), n);
    kPlainMoves.keep_rest(expected.data(), sent.data(), expected_residual.data(), n);
    EXPECT(equal(residual, expected_residual), which);
  }
}

#if defined(__x86_64__)
CASE(other_rounding_and_flushed_subnormals_are_for_the_plain_loops) {
  const Moves& usual = moves();
  const unsigned before = _mm_getcsr();
  for (unsigned change : {0x0040u, 0x2000u, 0x4000u, 0x6000u, 0x8000u, 0x8040u}) {
    _mm_setcsr(before | change);
    const Moves& now = moves();
    _mm_setcsr(before);
    EXPECT(&now == &kPlainMoves, "MXCSR ", change);
  }
  EXPECT(&moves() == &usual);
}
#endif

CASE(an_average_is_the_quotient) {
  for (int by = 1; by <= 9; ++by) {
    for (unsigned which = 0; which < 255; which += 2) {
      std::vector<float> values = message(1000, which), expected = values;
      for (float& value : expected) value /= static_cast<float>(by);
      moves().divide(values.data(), by, values.size());
      EXPECT(equal(values, expected), "by ", by, ", message ", which);
    }
  }
}
