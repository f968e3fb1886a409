// Sums over ranks: the order, the rounding, what overflows, what NaN does, for every dtype, count and size.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "core/wire.h"
#include "expect.h"

using namespace tpk;

namespace {

constexpr size_t kSizes[] = {0, 1, 7, 16, 511, 512, 513, 1023, 1024, 1025, 3000};

template <class T>
struct Of;
template <>
struct Of<float> {
  static constexpr DType dtype = DType::F32;
};
template <>
struct Of<double> {
  static constexpr DType dtype = DType::F64;
};
template <>
struct Of<int8_t> {
  static constexpr DType dtype = DType::I8;
};
template <>
struct Of<uint8_t> {
  static constexpr DType dtype = DType::U8;
};
template <>
struct Of<int16_t> {
  static constexpr DType dtype = DType::I16;
};
template <>
struct Of<int32_t> {
  static constexpr DType dtype = DType::I32;
};
template <>
struct Of<int64_t> {
  static constexpr DType dtype = DType::I64;
};

template <class T>
using Ranks = std::vector<std::vector<T>>;

template <class T>
Ranks<T> random_ranks(int num_ranks, size_t n, unsigned seed) {
  std::mt19937_64 random(seed);
  Ranks<T> ranks(static_cast<size_t>(num_ranks), std::vector<T>(n));
  for (auto& rank : ranks) {
    for (T& value : rank) {
      if constexpr (std::is_floating_point_v<T>) {
        value = std::normal_distribution<T>()(random);
      } else {
        value = static_cast<T>(random());  // all bits: overflow is part of the test
      }
    }
  }
  return ranks;
}

// What torch does with two integers, and what the contract says of floats: one after the other, in rank order.
template <class T>
T combined(ReduceOp op, T left, T right) {
  if (op == ReduceOp::Max) return left > right ? left : right;
  if (op == ReduceOp::Min) return left < right ? left : right;
  if constexpr (std::is_floating_point_v<T>) {
    return op == ReduceOp::Product ? left * right : left + right;
  } else {
    const uint64_t a = static_cast<uint64_t>(left), b = static_cast<uint64_t>(right);
    switch (op) {
      case ReduceOp::Product: return static_cast<T>(a * b);
      case ReduceOp::BitAnd: return static_cast<T>(a & b);
      case ReduceOp::BitOr: return static_cast<T>(a | b);
      case ReduceOp::BitXor: return static_cast<T>(a ^ b);
      default: return static_cast<T>(a + b);
    }
  }
}

template <class T>
void check_plain(ReduceOp op, int num_ranks, size_t n) {
  const Ranks<T> ranks = random_ranks<T>(num_ranks, n, static_cast<unsigned>(n) + 17u);
  std::vector<T> expected = ranks[0];
  for (size_t i = 0; i < n; ++i) {
    for (int r = 1; r < num_ranks; ++r) expected[i] = combined(op, expected[i], ranks[static_cast<size_t>(r)][i]);
    if (op == ReduceOp::Avg) expected[i] = expected[i] / static_cast<T>(num_ranks);
  }
  const Wire& wire = wire_of(Of<T>::dtype, Codec::None, op);

  Ranks<T> in_place = ranks;  // every input is an output, too
  std::vector<const void*> inputs;
  std::vector<void*> outputs;
  for (auto& rank : in_place) inputs.push_back(rank.data()), outputs.push_back(rank.data());
  wire.reduce(inputs.data(), num_ranks, outputs.data(), num_ranks, n);
  for (const auto& rank : in_place)
    EXPECT(rank == expected, name_of(wire.dtype), " ", name_of(op), " in place, n = ", n);

  std::vector<T> values(n);
  for (size_t r = 0; r < ranks.size(); ++r) inputs[r] = ranks[r].data();
  wire.reduce_to_values(inputs.data(), num_ranks, values.data(), n);
  EXPECT(values == expected, name_of(wire.dtype), " ", name_of(op), " to values, n = ", n);
}

constexpr std::initializer_list<ReduceOp> kOfIntegers = {ReduceOp::Sum,     ReduceOp::Max,    ReduceOp::Min,
                                                         ReduceOp::Product, ReduceOp::BitAnd, ReduceOp::BitOr,
                                                         ReduceOp::BitXor};

template <class T>
void check_every_way(std::initializer_list<ReduceOp> ops) {
  for (ReduceOp op : ops) {
    for (int num_ranks = 1; num_ranks <= 5; ++num_ranks) {
      for (size_t n : kSizes) check_plain<T>(op, num_ranks, n);
    }
  }
}

}  // namespace

CASE(floats_are_summed_in_rank_order_and_divided_once) {
  check_every_way<float>({ReduceOp::Sum, ReduceOp::Avg, ReduceOp::Max, ReduceOp::Min, ReduceOp::Product});
  check_every_way<double>({ReduceOp::Sum, ReduceOp::Avg, ReduceOp::Max, ReduceOp::Min, ReduceOp::Product});
}

CASE(integers_are_exact_and_wrap_around) {
  check_every_way<int8_t>(kOfIntegers);
  check_every_way<uint8_t>(kOfIntegers);
  check_every_way<int16_t>(kOfIntegers);
  check_every_way<int32_t>(kOfIntegers);
  check_every_way<int64_t>(kOfIntegers);
}

CASE(sixteen_bit_floats_are_summed_in_float_and_rounded_once) {
  // 1 + 2^-8 + 2^-8: rounded to bf16 after each step it stays 1, rounded once it is 1 + 2^-7.
  const Bfloat16 inputs[3] = {to_bfloat16(1.0f), to_bfloat16(0x1p-8f), to_bfloat16(0x1p-8f)};
  const void* ranks[3] = {&inputs[0], &inputs[1], &inputs[2]};
  Bfloat16 sum;
  wire_of(DType::BF16, Codec::None, ReduceOp::Sum).reduce_to_values(ranks, 3, &sum, 1);
  EXPECT(to_float(sum) == 1.0f + 0x1p-7f, to_float(sum));
  // 60000 + 60000 - 60000 passes through a number that fp16 has not.
  const Half halves[3] = {to_half(60000.0f), to_half(60000.0f), to_half(-60000.0f)};
  const void* half_ranks[3] = {&halves[0], &halves[1], &halves[2]};
  Half half_sum;
  wire_of(DType::F16, Codec::None, ReduceOp::Sum).reduce_to_values(half_ranks, 3, &half_sum, 1);
  EXPECT(half_sum == halves[0], to_float(half_sum));
}

namespace {

template <class Float, class ToFloat, class FromFloat>
void check_sixteen_bits(DType dtype, ToFloat to_floats, FromFloat from_floats) {
  for (ReduceOp op : {ReduceOp::Sum, ReduceOp::Avg, ReduceOp::Max, ReduceOp::Min, ReduceOp::Product}) {
    for (int num_ranks = 1; num_ranks <= 4; ++num_ranks) {
      for (size_t n : kSizes) {
        Ranks<Float> ranks;
        for (const std::vector<float>& rank : random_ranks<float>(num_ranks, n, 23u)) {
          std::vector<Float> packed;
          for (float value : rank) packed.push_back(from_floats(value));
          ranks.push_back(std::move(packed));
        }
        std::vector<Float> expected;
        std::vector<const void*> inputs;
        for (const auto& rank : ranks) inputs.push_back(rank.data());
        for (size_t i = 0; i < n; ++i) {
          float sum = to_floats(ranks[0][i]);
          for (size_t r = 1; r < ranks.size(); ++r) sum = combined(op, sum, static_cast<float>(to_floats(ranks[r][i])));
          expected.push_back(from_floats(op == ReduceOp::Avg ? sum / static_cast<float>(num_ranks) : sum));
        }
        std::vector<Float> values(n);
        wire_of(dtype, Codec::None, op).reduce_to_values(inputs.data(), num_ranks, values.data(), n);
        EXPECT(n == 0 || std::memcmp(values.data(), expected.data(), n * sizeof(Float)) == 0, name_of(dtype), " ",
               name_of(op), ", n = ", n);
      }
    }
  }
}

}  // namespace

CASE(every_reduction_of_sixteen_bit_floats_is_rounded_once) {
  check_sixteen_bits<Bfloat16>(
      DType::BF16, [](Bfloat16 value) { return to_float(value); }, [](float value) { return to_bfloat16(value); });
  check_sixteen_bits<Half>(
      DType::F16, [](Half value) { return to_float(value); }, [](float value) { return to_half(value); });
}

// Booleans are bytes of 0 and 1: the sum is the maximum, the product is the minimum.
CASE(booleans_stay_booleans) {
  const std::vector<uint8_t> a{0, 0, 1, 1}, b{0, 1, 0, 1};
  const struct {
    ReduceOp op;
    std::vector<uint8_t> result;
  } rows[] = {{ReduceOp::Max, {0, 1, 1, 1}},
              {ReduceOp::Min, {0, 0, 0, 1}},
              {ReduceOp::BitAnd, {0, 0, 0, 1}},
              {ReduceOp::BitOr, {0, 1, 1, 1}},
              {ReduceOp::BitXor, {0, 1, 1, 0}}};
  for (const auto& [op, result] : rows) {
    const void* inputs[2] = {a.data(), b.data()};
    std::vector<uint8_t> values(4, 7);
    wire_of(DType::U8, Codec::None, op).reduce_to_values(inputs, 2, values.data(), 4);
    EXPECT(values == result, name_of(op));
  }
}

CASE(a_nan_of_any_rank_is_in_every_result) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (ReduceOp op : {ReduceOp::Sum, ReduceOp::Avg, ReduceOp::Max, ReduceOp::Min, ReduceOp::Product}) {
    for (size_t num_ranks = 2; num_ranks <= 4; ++num_ranks) {
      for (size_t bad = 0; bad < num_ranks; ++bad) {
        Ranks<float> ranks(num_ranks, std::vector<float>(1030, 1.0f));
        ranks[bad].assign(1030, nan);
        std::vector<const void*> inputs;
        for (const auto& rank : ranks) inputs.push_back(rank.data());
        std::vector<float> values(1030);
        wire_of(DType::F32, Codec::None, op)
            .reduce_to_values(inputs.data(), static_cast<int>(num_ranks), values.data(), 1030);
        for (float value : values) EXPECT(std::isnan(value), name_of(op), " with NaN on rank ", bad);
      }
    }
  }
}

CASE(packed_sums_are_the_float_sum_of_what_was_sent) {
  for (int c = 1; c < static_cast<int>(Codec::Count); ++c) {
    const Codec codec = static_cast<Codec>(c);
    for (ReduceOp op : {ReduceOp::Sum, ReduceOp::Avg}) {
      const Wire& wire = wire_of(DType::F32, codec, op);
      for (size_t n : kSizes) {
        for (size_t num_ranks = 1; num_ranks <= 4; ++num_ranks) {
          const Ranks<float> ranks = random_ranks<float>(static_cast<int>(num_ranks), n, 5u);
          Ranks<unsigned char> wires(num_ranks, std::vector<unsigned char>(wire.bytes(n)));
          std::vector<float> expected(n, 0.0f), sent(n);
          std::vector<const void*> inputs;
          for (size_t r = 0; r < num_ranks; ++r) {
            wire.encode(ranks[r].data(), wires[r].data(), n);
            wire.decode(wires[r].data(), sent.data(), n);
            for (size_t i = 0; i < n; ++i) expected[i] = r == 0 ? sent[i] : expected[i] + sent[i];
            inputs.push_back(wires[r].data());
          }
          if (op == ReduceOp::Avg) {
            for (float& value : expected) value /= static_cast<float>(num_ranks);
          }
          std::vector<float> values(n);
          wire.reduce_to_values(inputs.data(), static_cast<int>(num_ranks), values.data(), n);
          EXPECT(values == expected, name_of(codec), " ", name_of(op), ", n = ", n);

          // The owner's re-encoded sum is what every output gets.
          std::vector<unsigned char> packed(wire.bytes(n)), out_0(wire.bytes(n)), out_1(wire.bytes(n));
          wire.encode(expected.data(), packed.data(), n);
          void* outputs[2] = {out_0.data(), out_1.data()};
          wire.reduce(inputs.data(), static_cast<int>(num_ranks), outputs, 2, n);
          EXPECT(out_0 == packed && out_1 == packed, name_of(codec), ", n = ", n);

          // And the owner decodes, of every dtype and all but a part of it, what the others decode.
          for (DType dtype : {DType::F32, DType::BF16, DType::F16}) {
            const Wire& own = wire_of(dtype, codec, op);
            std::vector<unsigned char> decoded(n * own.value_bytes), got(decoded), parts(decoded);
            own.decode(packed.data(), decoded.data(), n);
            out_0.assign(out_0.size(), 0);
            own.reduce_and_decode(inputs.data(), static_cast<int>(num_ranks), outputs, 2, got.data(), n);
            EXPECT(out_0 == packed && got == decoded, name_of(codec), " ", name_of(dtype), ", n = ", n);
            const size_t begin = std::min(n, wire.block_values), end = std::min(n, 2 * wire.block_values);
            own.decode_around(begin, end, packed.data(), parts.data(), n);
            std::copy_n(decoded.data() + begin * own.value_bytes, (end - begin) * own.value_bytes,
                        parts.data() + begin * own.value_bytes);
            EXPECT(parts == decoded, name_of(codec), " ", name_of(dtype), ", n = ", n);
          }
        }
      }
    }
  }
}

CASE(combinations_without_a_meaning_are_refused) {
  const struct {
    DType dtype;
    Codec codec;
    ReduceOp op;
  } refused[] = {{DType::I32, Codec::None, ReduceOp::Avg},     {DType::I32, Codec::Fp16, ReduceOp::Sum},
                 {DType::F64, Codec::Bf16, ReduceOp::Sum},     {DType::F32, Codec::Fp16, ReduceOp::Max},
                 {DType::F32, Codec::Fp16, ReduceOp::Product}, {DType::F32, Codec::None, ReduceOp::BitAnd},
                 {DType::F16, Codec::None, ReduceOp::BitXor},  {DType::Raw4, Codec::None, ReduceOp::Sum}};
  for (const auto& [dtype, codec, op] : refused) {
    bool threw = false;
    try {
      wire_of(dtype, codec, op);
    } catch (const std::invalid_argument&) {
      threw = true;
    }
    EXPECT(threw, name_of(dtype), " ", name_of(codec), " ", name_of(op));
  }
}
