// The moves of a wire on one device against the CPU's, byte for byte: what either packs, the other can read.
#include "emu_ranks.h"

using namespace tpk;
using namespace tpk::cuda;
using namespace tpk::testing;

namespace {

constexpr DType kPacked[] = {DType::F32, DType::BF16, DType::F16};
constexpr size_t kLengths[] = {0, 1, 7, 8, 9, 255, 256, 257, 511, 512, 513, 1024, 1300};

std::vector<Codec> codecs() {
  std::vector<Codec> all;
  for (int c = 1; c < static_cast<int>(Codec::Count); ++c) all.push_back(static_cast<Codec>(c));
  return all;
}

// Blocks of many magnitudes; every fourth block of a tensor with more than three has something else: zeros, subnormals,
// NaN.
Bytes values_of_all_kinds(DType dtype, size_t n, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<double> normal;
  Bytes values(n * size_of(dtype));
  for (size_t i = 0; i < n; ++i) {
    const size_t block = (i / 512 + seed) % 8;
    const int exponent = static_cast<int>((i / 512 * 7 + seed) % 20) - 10;
    double value = std::ldexp(normal(random), exponent - static_cast<int>(random() % 4));
    if (block == 3) value = i % 2 == 0 ? 0.0 : -0.0;
    if (block == 5) value = std::ldexp(normal(random), dtype == DType::F16 ? -22 : -130);
    if (block == 6 && i % 97 == 11) value = i % 2 == 0 ? INFINITY : NAN;
    put(dtype, values, i, value);
  }
  return values;
}

Bytes device_encoded(DType dtype, Codec codec, const Bytes& values, size_t shift) {
  const size_t n = values.size() / size_of(dtype);
  const DeviceBytes in(0, values, shift), out(0, Bytes(wire_of(dtype, codec, ReduceOp::Sum).bytes(n), 'x'));
  EXPECT(launch_encode(dtype, codec, in.data(), out.data(), n, nullptr) == cudaSuccess);
  EXPECT(cudaDeviceSynchronize() == cudaSuccess);
  return out.values();
}

Bytes device_decoded(DType dtype, Codec codec, const Bytes& wire, size_t n, size_t shift) {
  const DeviceBytes in(0, wire), out(0, Bytes(n * size_of(dtype), 'x'), shift);
  EXPECT(launch_decode(dtype, codec, in.data(), out.data(), n, nullptr) == cudaSuccess);
  EXPECT(cudaDeviceSynchronize() == cudaSuccess);
  return out.values();
}

// What a device makes of several wires: {the wire of their sum, its values not packed again}.
struct Reduced {
  Bytes wire, values;
};
Reduced device_reduced(DType dtype, Codec codec, ReduceOp op, const std::vector<Bytes>& wires, size_t n,
                       bool in_place) {
  WireList list{};
  std::vector<std::unique_ptr<DeviceBytes>> inputs;
  for (size_t r = 0; r < wires.size(); ++r) {
    inputs.push_back(std::make_unique<DeviceBytes>(0, wires[r]));
    list.wire[r] = inputs.back()->data();
  }
  const int count = static_cast<int>(wires.size());
  const DeviceBytes values(0, Bytes(n * size_of(dtype), 'x')), wire(0, Bytes(wires[0].size(), 'x'));
  EXPECT(launch_reduce_wires_to_values(dtype, codec, op, list, count, values.data(), n, nullptr) == cudaSuccess);
  const DeviceBytes& packed = in_place ? *inputs.back() : wire;
  EXPECT(launch_reduce_wires(dtype, codec, op, list, count, packed.data(), n, nullptr) == cudaSuccess);
  EXPECT(cudaDeviceSynchronize() == cudaSuccess);
  return {packed.values(), values.values()};
}

Bytes cpu_reduced(const Wire& wire, const std::vector<Bytes>& wires, size_t n) {
  Bytes packed(wire.bytes(n));
  void* const output = packed.data();
  wire.reduce(pointers_to(wires).data(), static_cast<int>(wires.size()), &output, 1, n);
  return packed;
}

// Half of all dtypes with all codecs in one round, the other half in the next.
bool is_the_turn_of(DType dtype, Codec codec, uint64_t round) {
  return (static_cast<uint64_t>(dtype) + static_cast<uint64_t>(codec) + round) % 2 == 0;
}

}  // namespace

CASE(a_device_writes_the_bytes_of_the_cpu_and_reads_them) {
  for (uint64_t seed = 0; seed < (emu::detects_races() ? 3 : 8); ++seed) {
    configure(1, seed);
    for (DType dtype : kPacked) {
      for (Codec codec : codecs()) {
        if (!is_the_turn_of(dtype, codec, seed)) continue;
        const Wire& wire = wire_of(dtype, codec, ReduceOp::Sum);
        for (size_t n : kLengths) {
          const Bytes values = values_of_all_kinds(dtype, n, seed + n), packed = encoded(wire, values);
          const size_t shift = seed % 3 * size_of(dtype);
          EXPECT(device_encoded(dtype, codec, values, shift) == packed, name_of(codec), " of ", n, " ", name_of(dtype));
          const Bytes back = device_decoded(dtype, codec, packed, n, shift);
          EXPECT(same_values(dtype, back, decoded(wire, packed, n)), name_of(codec), " to ", n, " ", name_of(dtype));
        }
      }
    }
    expect_no_reports("encode and decode");
    emu::reset();
  }
}

CASE(a_device_writes_the_golden_bytes_of_fp16) {
  Bytes values(4 * 4);
  for (size_t i = 0; i < 4; ++i) put(DType::F32, values, i, std::array{0.0, 1.0, -2.5, 333824.0}[i]);
  const unsigned char golden[] = {0xfc, 0xff, 0, 0, 0, 0, 0,    0,    0,    0,    0,    0,
                                  0,    0,    0, 0, 0, 0, 0x00, 0x2c, 0x00, 0xb1, 0x18, 0x75};
  const Bytes got = device_encoded(DType::F32, Codec::Fp16, values, 0);
  EXPECT(got.size() == sizeof golden && std::memcmp(got.data(), golden, sizeof golden) == 0);
  emu::reset();
}

CASE(many_blocks_are_spread_over_the_grid) {
  const size_t n = emu::detects_races() ? 9000 : 600000;
  const Wire& wire = wire_of(DType::F32, Codec::Fp16, ReduceOp::Sum);
  const Bytes values = values_of_all_kinds(DType::F32, n, 1), packed = encoded(wire, values);
  EXPECT(device_encoded(DType::F32, Codec::Fp16, values, 0) == packed);
  EXPECT(same_values(DType::F32, device_decoded(DType::F32, Codec::Fp16, packed, n, 0), decoded(wire, packed, n)));
  expect_no_reports("many blocks");
  emu::reset();
}

CASE(wires_are_reduced_to_the_bytes_of_the_cpu) {
  uint64_t seed = 0;
  for (DType dtype : kPacked) {
    for (Codec codec : codecs()) {
      for (ReduceOp op : {ReduceOp::Sum, ReduceOp::Avg}) {
        if (!is_the_turn_of(dtype, codec, static_cast<uint64_t>(op))) continue;
        for (int count : {1, 2, 3, 4, 5, 8, 9, 64}) {
          configure(1, ++seed % 5);
          const size_t n = kLengths[seed % std::size(kLengths)];
          const Wire& wire = wire_of(dtype, codec, op);
          std::vector<Bytes> wires;
          for (int r = 0; r < count; ++r)
            wires.push_back(encoded(wire, values_of_all_kinds(dtype, n, seed * 64 + static_cast<uint64_t>(r))));
          const Reduced got = device_reduced(dtype, codec, op, wires, n, seed % 2 == 0);
          const std::string what =
              concat(name_of(codec), " ", name_of(op), " of ", count, " times ", n, " ", name_of(dtype));
          EXPECT(same_values(codec == Codec::Bf16 ? DType::BF16 : DType::Raw1, got.wire, cpu_reduced(wire, wires, n)),
                 what);
          Bytes values(n * size_of(dtype));
          wire.reduce_to_values(pointers_to(wires).data(), count, values.data(), n);
          EXPECT(same_values(dtype, got.values, values), what, " to values");
          expect_no_reports(what);
          emu::reset();
        }
      }
    }
  }
}

CASE(plain_values_are_reduced_to_the_bits_of_the_cpu) {
  uint64_t seed = 0;
  for (int d = 0; d < static_cast<int>(DType::Raw1); ++d) {
    const DType dtype = static_cast<DType>(d);
    for (ReduceOp op : {ReduceOp::Sum, ReduceOp::Avg, ReduceOp::Max, ReduceOp::Min}) {
      if (op == ReduceOp::Avg && !is_floating(dtype)) continue;
      for (int count : {1, 3, 8, 20}) {
        configure(1, ++seed % 5);
        const size_t n = kLengths[seed % std::size(kLengths)];
        const Wire& wire = wire_of(dtype, Codec::None, op);
        std::vector<Bytes> inputs;
        for (int r = 0; r < count; ++r) inputs.push_back(random_values(dtype, n, seed * 64 + static_cast<uint64_t>(r)));
        const Reduced got = device_reduced(dtype, Codec::None, op, inputs, n, seed % 2 == 0);
        const std::string what = concat(name_of(op), " of ", count, " times ", n, " ", name_of(dtype));
        EXPECT(same_values(dtype, got.values, reduced(wire, inputs)), what);
        EXPECT(same_values(dtype, got.wire, got.values), what);
        expect_no_reports(what);
        emu::reset();
      }
    }
  }
}

// wire = encode(scale * values + residual), residual = what the wire does not say.
CASE(what_packing_loses_is_kept_for_the_next_time) {
  uint64_t seed = 0;
  std::vector<Codec> all = codecs();
  all.push_back(Codec::None);  // rounds to the dtype
  for (DType dtype : kPacked) {
    for (Codec codec : all) {
      for (size_t n : kLengths) {
        if (!is_the_turn_of(dtype, codec, n)) continue;
        configure(1, ++seed % 5);
        const float scale = seed % 2 == 0 ? 1.0f : 0.3f;
        const Bytes values = values_of_all_kinds(dtype, n, seed);
        Bytes kept = random_values(DType::F32, n, seed, true), sent(n * 4);
        const DeviceBytes in(0, values, seed % 3 * size_of(dtype)), residual(0, kept, seed % 2 * 4);
        const bool plain = codec == Codec::None;
        const Wire& wire = wire_of(plain ? dtype : DType::F32, codec, ReduceOp::Sum);
        const DeviceBytes out(0, Bytes(wire.bytes(n), 'x'));
        EXPECT(launch_encode_with_feedback(dtype, codec, in.data(), reinterpret_cast<float*>(residual.data()),
                                           out.data(), scale, n, nullptr) == cudaSuccess);
        EXPECT(cudaDeviceSynchronize() == cudaSuccess);

        const auto value = [&](DType of, const Bytes& from, size_t i) {
          return static_cast<float>(value_at(of, from, i));
        };
        for (size_t i = 0; i < n; ++i)
          put(DType::F32, sent, i, scale * value(dtype, values, i) + value(DType::F32, kept, i));
        Bytes packed(wire.bytes(n)), back(n * 4);
        for (size_t i = 0; plain && i < n; ++i) put(dtype, packed, i, value(DType::F32, sent, i));
        for (size_t i = 0; plain && i < n; ++i) put(DType::F32, back, i, value(dtype, packed, i));
        if (!plain) packed = encoded(wire, sent), back = decoded(wire, packed, n);
        for (size_t i = 0; i < n; ++i) {
          const float error = value(DType::F32, sent, i) - value(DType::F32, back, i);
          if (std::isfinite(error)) put(DType::F32, kept, i, error);
        }
        const std::string what = concat(name_of(codec), " of ", n, " ", name_of(dtype));
        EXPECT(same_values(plain                  ? dtype
                           : codec == Codec::Bf16 ? DType::BF16
                                                  : DType::Raw1,
                           out.values(), packed),
               what);
        EXPECT(residual.values() == kept, what, ": the residual");
        expect_no_reports(what);
        emu::reset();
      }
    }
  }
}

CASE(plain_wires_are_copies) {
  const Bytes values = random_values(DType::I16, 1000, 3);
  EXPECT(device_encoded(DType::I16, Codec::None, values, 2) == values);
  EXPECT(device_decoded(DType::I16, Codec::None, values, 1000, 6) == values);
  emu::reset();
}

CASE(what_has_no_meaning_is_refused_and_not_launched) {
  const DeviceBytes data(0, Bytes(4096));
  char* const at = data.data();
  WireList list{};
  list.wire[0] = list.wire[1] = at;
  const auto reduces = [&](DType dtype, Codec codec, ReduceOp op, int inputs) {
    return launch_reduce_wires(dtype, codec, op, list, inputs, at, 100, nullptr);
  };
  EXPECT(reduces(DType::I32, Codec::None, ReduceOp::Avg, 2) == cudaErrorInvalidValue);
  EXPECT(reduces(DType::I32, Codec::Fp16, ReduceOp::Sum, 2) == cudaErrorInvalidValue);
  EXPECT(reduces(DType::F64, Codec::Bf16, ReduceOp::Sum, 2) == cudaErrorInvalidValue);
  EXPECT(reduces(DType::F32, Codec::Fp16, ReduceOp::Max, 2) == cudaErrorInvalidValue);
  EXPECT(reduces(DType::Raw4, Codec::None, ReduceOp::Sum, 2) == cudaErrorInvalidValue);
  EXPECT(reduces(DType::F32, Codec::None, ReduceOp::None, 2) == cudaErrorInvalidValue);
  EXPECT(reduces(DType::F32, Codec::None, ReduceOp::Sum, 0) == cudaErrorInvalidValue);
  EXPECT(reduces(DType::F32, Codec::None, ReduceOp::Sum, 65) == cudaErrorInvalidValue);
  EXPECT(launch_encode(DType::I32, Codec::Fp16, at, at, 9, nullptr) == cudaErrorInvalidValue);
  EXPECT(launch_encode(DType::F32, Codec::Fp16, at, at + 8, 9, nullptr) == cudaErrorInvalidValue, "a crooked wire");
  EXPECT(launch_decode(DType::F32, Codec::Count, at, at, 9, nullptr) == cudaErrorInvalidValue);
  EXPECT(launch_encode_with_feedback(DType::F64, Codec::Fp16, at, reinterpret_cast<float*>(at), at, 1, 9, nullptr) ==
         cudaErrorInvalidValue);
  emu::reset();
}
