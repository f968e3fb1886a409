// The driver's functions that the host side asks for by name.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <atomic>
#include <cstring>

#include "control.h"
#include "tensor_map_emu.h"

using tpk::emu::EmulatedMap;

namespace {

std::atomic<size_t> encoded{0};

// Maps of matrices of 2-byte floats or of bytes, whose tiles are rows of 128 swizzled bytes; refuses what the driver
// refuses.
CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base, const cuuint64_t* sizes,
                      const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps,
                      CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                      CUtensorMapFloatOOBfill) {
  constexpr cuuint64_t kMostSize = cuuint64_t{1} << 32, kMostStride = cuuint64_t{1} << 40;
  const bool two_bytes = type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const cuuint32_t value_bytes = two_bytes ? 2 : 1;
  const bool known = (two_bytes || type == CU_TENSOR_MAP_DATA_TYPE_UINT8) && rank == 2 &&
                     interleave == CU_TENSOR_MAP_INTERLEAVE_NONE && swizzle == CU_TENSOR_MAP_SWIZZLE_128B &&
                     steps[0] == 1 && steps[1] == 1;
  const bool sizes_fit = sizes[0] >= 1 && sizes[0] <= kMostSize && sizes[1] >= 1 && sizes[1] <= kMostSize;
  const bool box_fits = box[0] * value_bytes == 128 && box[1] >= 1 && box[1] <= 256;
  const bool aligned = reinterpret_cast<uintptr_t>(base) % 16 == 0 && strides[0] % 16 == 0 &&
                       strides[0] < kMostStride && reinterpret_cast<uintptr_t>(map) % 64 == 0;
  if (!known || !sizes_fit || !box_fits || !aligned) return CUDA_ERROR_INVALID_VALUE;
  const EmulatedMap made{
      EmulatedMap::kMagic, static_cast<const char*>(base), sizes[1], sizes[0], strides[0], box[1], box[0], value_bytes};
  std::memset(map, 0, sizeof *map);
  std::memcpy(map, &made, sizeof made);
  ++encoded;
  return CUDA_SUCCESS;
}

}  // namespace

size_t tpk::emu::encoded_maps() { return encoded; }

extern "C" cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned,
                                                        unsigned long long, cudaDriverEntryPointQueryResult* result) {
  const bool known = std::strcmp(symbol, "cuTensorMapEncodeTiled") == 0;
  *function = known ? reinterpret_cast<void*>(&encode_tiled) : nullptr;
  if (result != nullptr) *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
