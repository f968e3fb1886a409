// What Hopper does beside its threads: tiles come, swizzled; products are right; maps say what they cannot do.
#include "hopper_tile.cuh"
#include "ptx_tables.h"

using namespace tpk;
using namespace tpk::planted;

namespace {

CASE(a_tile_is_multiplied) {
  must_be_silent([] { return multiplies<Bfloat16, 128>(128, 128, 256); });
}
CASE(a_wide_tile_of_the_other_dtype_is_multiplied) {
  must_be_silent([] { return multiplies<Half, 256>(128, 256, 192); }, {0, 1});
}
CASE(what_lies_outside_comes_as_zeros) {
  must_be_silent([] { return multiplies<Bfloat16, 128>(100, 72, 328); });
  must_be_silent([] { return multiplies<Half, 256>(1, 8, 8); }, {0, 1});
}

CASE(a_tile_of_a_transposed_w_is_multiplied) {
  constexpr Fault kNone = Fault::None;
  must_be_silent([] { return multiplies<Bfloat16, 128>(128, 128, 256, kNone, true); }, {0, 1});
  must_be_silent([] { return multiplies<Half, 256>(100, 168, 328, kNone, true); }, {0, 1});
  must_be_silent([] { return multiplies<Half, 128>(1, 8, 8, kNone, true); }, {0, 1});
}

// ---- bits, against the formulas of the PTX ISA ----------------------------------------------------------------------

struct DumpArgs {
  TensorMap map;
  uint16_t* tile;        // as it lies in shared memory
  uint64_t* descriptor;  // of its row 64, and where that is
  int32_t column, row;
};

TPK_KERNEL void dump_tile(const __grid_constant__ DumpArgs args) {
  TPK_DYNAMIC_SHARED(char, dynamic);
  __shared__ uint64_t full;
  char* const tile = dynamic + (1024 - reinterpret_cast<uintptr_t>(dynamic) % 1024) % 1024;
  if (threadIdx.x == 0) {
    transaction_init(&full, 1);
    transaction_init_done();
    prefetch(&args.map);
    transaction_expect(&full, 128 * 128);
    load_tile(tile, &args.map, &full, args.column, args.row);
    args.descriptor[0] = operand(tile + 64 * 128);
    args.descriptor[1] = shared_address(tile + 64 * 128);
  }
  __syncthreads();
  while (!transaction_done(&full, 0)) {
  }
  for (uint32_t i = threadIdx.x; i < 128 * 64; i += blockDim.x) {
    uint16_t value;
    memcpy(&value, tile + 2 * i, 2);
    args.tile[i] = value;
  }
}

bool lies_as_specified(int rows, int columns, int32_t column, int32_t row) {
  const Matrix<Bfloat16> x(rows, columns, 3);
  uint16_t* const tile = filled<uint16_t>(128 * 64, 7);
  uint64_t* const descriptor = filled<uint64_t>(2);
  const DumpArgs args{x.map(128), tile, descriptor, column, row};
  EXPECT(TPK_LAUNCH(dump_tile, 1, 64, 128 * 128 + 1024, nullptr, args) == cudaSuccess);
  EXPECT(cudaDeviceSynchronize() == cudaSuccess);
  const std::vector<uint16_t> got = values_of(tile, 128 * 64);
  bool right = true;
  for (int r = 0; r < 128; ++r) {
    for (int c = 0; c < 64; ++c) {
      const int at_row = row + r, at_column = column + c;
      uint16_t wanted = 0;
      if (at_row >= 0 && at_row < rows && at_column >= 0 && at_column < columns)
        std::memcpy(&wanted, &x.values[static_cast<size_t>(at_row * columns + at_column)], 2);
      right &= got[testing::swizzled_place(static_cast<uint32_t>(r), static_cast<uint32_t>(c))] == wanted;
    }
  }
  // Start address, leading and stride offsets without 4 bits each, no base offset, the 128-byte swizzle.
  const std::vector<uint64_t> bits = values_of(descriptor, 2);
  const uint64_t start = (bits[1] & 0x3ffff) >> 4, leading = 1, stride = 64, swizzle = 1;
  return right && bits[0] == (start | leading << 16 | stride << 32 | swizzle << 62);
}

CASE(a_tile_lies_in_shared_memory_as_its_map_says) {
  must_be_silent([] { return lies_as_specified(200, 136, 64, 64); }, {0, 1});
  must_be_silent([] { return lies_as_specified(200, 136, 128, 128); }, {0, 1});
  must_be_silent([] { return lies_as_specified(50, 40, -8, -16); }, {0, 1});
}

// Threads write a transposed operand as the PTX ISA draws it; the first row of x picks value 5 of K.
TPK_KERNEL void read_transposed(float* y) {
  TPK_DYNAMIC_SHARED(char, dynamic);
  char* const x = dynamic + (1024 - reinterpret_cast<uintptr_t>(dynamic) % 1024) % 1024;
  char* const w = x + 64 * 128;
  for (uint32_t i = threadIdx.x; i < 64 * 64; i += blockDim.x) {
    const Half value = from_float<Half>(i / 64 % 16 == i % 64 ? 1 : 0);
    memcpy(x + testing::swizzled_place(i / 64, i % 64) * 2, &value, 2);
  }
  for (uint32_t i = threadIdx.x; i < 128 * 64; i += blockDim.x) {
    const Half value = from_float<Half>(static_cast<float>(i / 64 * 16 + i % 16));
    memcpy(w + testing::transposed_place(i / 64, i % 64) * 2, &value, 2);
  }
  fence_async_shared();
  __syncthreads();
  float d[64];
  products_begin();
  product<Half, 128, true>(d, operand(x), transposed_operand(w), false);
  products_commit();
  products_wait<0>();
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (uint32_t i = 0; i < 64; ++i) {
    const uint32_t row = 16 * warp + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + 2 * (lane % 4) + i % 2;
    y[row * 128 + column] = d[i];
  }
}

CASE(a_transposed_operand_is_read_as_the_isa_draws_it) {
  must_be_silent([] {
    float* const y = filled<float>(64 * 128, -1);
    EXPECT(TPK_LAUNCH(read_transposed, 1, 128, 3 * 64 * 128 + 1024, nullptr, y) == cudaSuccess);
    if (cudaDeviceSynchronize() != cudaSuccess) return false;
    const std::vector<float> got = values_of(y, 64 * 128);
    for (uint32_t i = 0; i < 64 * 128; ++i) {  // row r has value r % 16 of K of row i % 128 of w
      if (got[i] != static_cast<float>(i % 128 * 16 + i / 128 % 16)) return false;
    }
    return true;
  });
}

// ---- maps -----------------------------------------------------------------------------------------------------------

CASE(maps_say_what_they_cannot_do) {
  alignas(16) static char matrix[4096];
  const auto refusal = [](const void* base, uint64_t rows, uint64_t stride, uint32_t box_rows) -> std::string {
    try {
      tensor_map_of(DType::BF16, base, rows, 64, stride, box_rows);
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
    return "";
  };
  EXPECT(refusal(matrix, 8, 128, 8).empty());
  EXPECT(refusal(matrix + 2, 8, 128, 8).find("base") != std::string::npos);
  EXPECT(refusal(matrix, 8, 136, 8).find("row stride") != std::string::npos);
  EXPECT(refusal(matrix, 0, 128, 8).find("rows: expected 1 .. 2^32, got 0") != std::string::npos);
  EXPECT(refusal(matrix, 8, 128, 257).find("box rows") != std::string::npos);
  try {
    tensor_map_of(DType::F32, matrix, 8, 64, 128, 8);
    EXPECT(false, "fp32 was taken");
  } catch (const std::invalid_argument& error) {
    EXPECT(std::string(error.what()).find("dtype") != std::string::npos);
  }
}

CASE(a_map_that_was_made_serves_again) {
  alignas(16) static char matrix[4096];
  TensorMaps maps;
  const auto bytes_of = [](const TensorMap& map) { return std::string(map.opaque, sizeof map.opaque); };
  const size_t before = emu::encoded_maps();
  const auto ask = [&](const void* base, uint64_t rows, uint64_t stride, uint32_t box_rows, size_t made) {
    const std::string found = bytes_of(maps.of(DType::BF16, base, rows, 64, stride, box_rows));
    EXPECT(emu::encoded_maps() - before == made, rows, " ", stride, " ", box_rows);
    EXPECT(found == bytes_of(tensor_map_of(DType::BF16, base, rows, 64, stride, box_rows)));
  };
  ask(matrix, 8, 128, 8, 1), ask(matrix, 8, 128, 8, 2);  // the comparison makes one each time, the second ask none
  ask(matrix, 8, 256, 8, 4), ask(matrix, 8, 256, 16, 6), ask(matrix + 16, 8, 256, 16, 8);
  for (uint64_t rows = 1; rows <= 200; ++rows) {
    EXPECT(bytes_of(maps.of(DType::BF16, matrix, rows, 64, 128, 8)) ==
               bytes_of(tensor_map_of(DType::BF16, matrix, rows, 64, 128, 8)),
           rows);
  }
}

}  // namespace
