#include "tensor_map.h"

#include <cuda.h>

#include <cstring>
#include <stdexcept>
#include <string>

#include "runtime.h"

namespace tpk::cuda {
namespace {

static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) >= alignof(CUtensorMap),
              "as the hardware requires");

// The runtime looks up the function of the driver, so that nothing is linked with the driver.
decltype(&cuTensorMapEncodeTiled) find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
  TPK_CUDA_CHECK(
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result));
#else
  TPK_CUDA_CHECK(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result));
#endif
  if (result != cudaDriverEntryPointSuccess || function == nullptr) {
    throw std::runtime_error("tensor_map: the driver has no cuTensorMapEncodeTiled; CUDA 12.0 or later has");
  }
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
}

void check(bool holds, const char* argument, const char* expected, uint64_t got) {
  if (holds) return;
  throw std::invalid_argument(std::string("tensor_map: ") + argument + ": expected " + expected + ", got " +
                              std::to_string(got));
}

}  // namespace

TensorMap tensor_map_of(DType dtype, const void* base, uint64_t rows, uint64_t columns, uint64_t row_stride_bytes,
                        uint32_t box_rows) {
  static const auto encode = find_encode();
  constexpr uint64_t kMost = uint64_t{1} << 32;
  check(dtype == DType::BF16 || dtype == DType::F16 || dtype == DType::U8, "dtype", "bf16, fp16 or uint8",
        static_cast<uint64_t>(dtype));
  check(reinterpret_cast<uintptr_t>(base) % 16 == 0, "base", "a multiple of 16", reinterpret_cast<uintptr_t>(base));
  check(row_stride_bytes % 16 == 0 && row_stride_bytes < uint64_t{1} << 40, "row stride",
        "a multiple of 16 bytes below 2^40", row_stride_bytes);
  check(rows > 0 && rows <= kMost, "rows", "1 .. 2^32", rows);
  check(columns > 0 && columns <= kMost, "columns", "1 .. 2^32", columns);
  check(box_rows > 0 && box_rows <= 256, "box rows", "1 .. 256", box_rows);

  const cuuint64_t sizes[] = {columns, rows}, strides[] = {row_stride_bytes};  // the innermost dimension comes first
  const cuuint32_t box[] = {static_cast<cuuint32_t>(128 / size_of(dtype)), box_rows}, steps[] = {1, 1};
  const auto type = dtype == DType::BF16  ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                    : dtype == DType::F16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                          : CU_TENSOR_MAP_DATA_TYPE_UINT8;
  CUtensorMap made;
  const CUresult result =
      encode(&made, type, 2, const_cast<void*>(base), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("tensor_map: cuTensorMapEncodeTiled failed with error " + std::to_string(result));
  }
  TensorMap map;
  std::memcpy(&map, &made, sizeof map);
  return map;
}

const TensorMap& TensorMaps::of(DType dtype, const void* base, uint64_t rows, uint64_t columns,
                                uint64_t row_stride_bytes, uint32_t box_rows) {
  // Every address has one place: two that share it displace each other.
  const uint64_t hash = (reinterpret_cast<uintptr_t>(base) / 16 * 31 + rows) * 0x9e3779b97f4a7c15u;
  Made& one = made_[hash >> 32 & (made_.size() - 1)];
  const bool known = one.dtype == dtype && one.base == base && one.rows == rows && one.columns == columns &&
                     one.row_stride_bytes == row_stride_bytes && one.box_rows == box_rows;
  if (!known) {
    const TensorMap map = tensor_map_of(dtype, base, rows, columns, row_stride_bytes, box_rows);
    one = {dtype, box_rows, base, rows, columns, row_stride_bytes, map};
  }
  return one.map;
}

}  // namespace tpk::cuda
