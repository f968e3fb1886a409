// Rows of [tokens, width]: a block of threads works on one row at a time. What norm.cu and vocab.cu share.
//
// Thread t of T holds the units t, t + T, ... of a row, whatever their alignment, and T depends on the width alone. So
// a sum over a row is taken in one order on every rank, in every kernel, however a message was cut.
#pragma once

#include "dispatch.cuh"

namespace tpk::cuda {

template <class T>
using SumOf = typename Sum<T>::type;

constexpr size_t kMaxRowBlocks = 1024;  // of a kernel whose blocks go over rows
constexpr int kMaxWarps = kMaxThreads / kWarp;
constexpr uint32_t kKept = 4;  // units of a row that a thread keeps in registers from one pass to the next

inline int blocks_for_rows(size_t rows) { return static_cast<int>(rows < kMaxRowBlocks ? rows : kMaxRowBlocks); }

template <class T>
int threads_for_row(size_t width) {
  return threads_for<Plain<T>>(width, 1);
}

// action(T{}) for the floating dtypes.
template <class Action>
cudaError_t with_floating(DType dtype, Action action) {
  switch (dtype) {
    case DType::F32: return action(float{});
    case DType::F64: return action(double{});
    case DType::BF16: return action(Bfloat16{});
    case DType::F16: return action(Half{});
    default: return cudaErrorInvalidValue;
  }
}

// The values of one unit as the type of their sums; those beyond the end of the row are zero.
template <class T>
struct UnitValues {
  static constexpr uint32_t kValues = Plain<T>::kUnitValues;
  SumOf<T> of[kValues];

  __device__ __forceinline__ explicit UnitValues(Word16 word) {
    T values[kValues];
    memcpy(values, &word, sizeof word);
#pragma unroll
    for (uint32_t i = 0; i < kValues; ++i) of[i] = Sum<T>::in(values[i]);
  }

  // Each value rounded to T.
  __device__ __forceinline__ Word16 rounded() const {
    T values[kValues];
#pragma unroll
    for (uint32_t i = 0; i < kValues; ++i) values[i] = Sum<T>::out(of[i]);
    Word16 word;
    memcpy(&word, values, sizeof word);
    return word;
  }
};

// A row and its units.
template <class T>
struct Row {
  Length length;

  __device__ __forceinline__ explicit Row(size_t width) : length(length_of<Plain<T>>(width)) {}
  __device__ __forceinline__ uint32_t units() const { return units_of(length); }
  __device__ __forceinline__ Word16 load(const T* row, uint32_t unit) const {
    return Plain<T>::load(row + size_t{unit} * Plain<T>::kUnitValues, values_in<Plain<T>>(unit, length), Reach::Own);
  }
  __device__ __forceinline__ void store(T* row, uint32_t unit, Word16 word) const {
    Plain<T>::store(row + size_t{unit} * Plain<T>::kUnitValues, word, values_in<Plain<T>>(unit, length));
  }
  __device__ __forceinline__ void store(T* row, uint32_t unit, const UnitValues<T>& values) const {
    store(row, unit, values.rounded());
  }
};

// Folds over all threads of the block, one after the other; every thread gets the same bits. All threads call.
class BlockFold {
 public:
  template <class S>
  __device__ __forceinline__ S sum(S value) {
    return fold(value, [](S a, S b) { return a + b; });
  }
  // A NaN is no largest value.
  template <class S>
  __device__ __forceinline__ S largest(S value) {
    return fold(value, [](S a, S b) { return b > a ? b : a; });
  }

 private:
  // Two halves of the shared memory by turns: between the reads of one half and its next writes is a barrier.
  template <class S, class Fold>
  __device__ __forceinline__ S fold(S value, Fold both) {
    __shared__ S of_warps[2][kMaxWarps];
    S* const mine = of_warps[turn_++ & 1];
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      value = both(value, __shfl_xor_sync(0xffffffffu, value, offset));
    }
    if (lane() == 0) mine[threadIdx.x / kWarp] = value;
    __syncthreads();
    value = mine[0];
    for (uint32_t warp = 1; warp < blockDim.x / kWarp; ++warp) value = both(value, mine[warp]);
    return value;
  }

  uint32_t turn_ = 0;
};

}  // namespace tpk::cuda
