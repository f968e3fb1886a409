// The gradient of RMSNorm, and the squared norm of gradients.
//
// Called by  csrc/cuda/norm.cpp.
// Sums       over a row in fp32 (fp64) in the order of rows.cuh; over tokens in each block, then over the blocks. The
//            squared norm in fp64: no square leaves its range, and a billion of them keep eight digits and more.
// Traffic    each tensor is read once, but for rows too wide for the registers of a block: those twice.
#include "rows.cuh"

namespace tpk::cuda {
namespace {

// ---- gradient ------------------------------------------------------------------------------------------------------

template <class T>
struct GradientArgs {
  const T* dy;
  const T* dr_out;  // or nullptr
  const T* r;
  const T* weight;
  const SumOf<T>* inverse_rms;
  T* dr;              // or nullptr
  SumOf<T>* partial;  // [blocks, width], or nullptr
  size_t tokens, width;
};

// One thread's columns of a block's part of dweight: the first units in registers, the others in memory.
template <class T>
class WeightGradient {
 public:
  using S = SumOf<T>;
  static constexpr uint32_t kValues = UnitValues<T>::kValues;

  __device__ __forceinline__ WeightGradient(S* row, size_t width) : row_(row), width_(static_cast<uint32_t>(width)) {
    for (uint32_t unit = threadIdx.x + kKept * blockDim.x; unit * kValues < width_; unit += blockDim.x) {
      for (uint32_t i = 0; i < kValues && unit * kValues + i < width_; ++i) row_[unit * kValues + i] = 0;
    }
  }
  // dy r i of unit k of this thread.
  __device__ __forceinline__ void add_kept(uint32_t k, const UnitValues<T>& dy, const UnitValues<T>& r, S inverse) {
#pragma unroll
    for (uint32_t i = 0; i < kValues; ++i) kept_[k][i] += dy.of[i] * (r.of[i] * inverse);
  }
  __device__ __forceinline__ void add(uint32_t unit, const UnitValues<T>& dy, const UnitValues<T>& r, S inverse) {
    for (uint32_t i = 0; i < kValues && unit * kValues + i < width_; ++i) {
      row_[unit * kValues + i] += dy.of[i] * (r.of[i] * inverse);
    }
  }
  __device__ __forceinline__ void store() const {
#pragma unroll
    for (uint32_t k = 0; k < kKept; ++k) {
      const uint32_t column = (threadIdx.x + k * blockDim.x) * kValues;
#pragma unroll
      for (uint32_t i = 0; i < kValues; ++i) {
        if (column + i < width_) row_[column + i] = kept_[k][i];
      }
    }
  }

 private:
  S* row_;
  uint32_t width_;
  S kept_[kKept][kValues] = {};
};

template <class T>
__device__ __forceinline__ SumOf<T> sum_of_products(const UnitValues<T>& dy, const UnitValues<T>& weight,
                                                    const UnitValues<T>& r) {
  SumOf<T> sum = 0;
#pragma unroll
  for (uint32_t i = 0; i < dy.kValues; ++i) sum += dy.of[i] * weight.of[i] * r.of[i];
  return sum;
}

// i (g - r along) + dr_out, with along = i^2 mean(g r).
template <class T>
__device__ __forceinline__ void store_gradient(const GradientArgs<T>& args, const Row<T>& row, size_t start,
                                               uint32_t unit, UnitValues<T> dy, const UnitValues<T>& r,
                                               SumOf<T> inverse, SumOf<T> along) {
  const UnitValues<T> weight(row.load(args.weight, unit));
#pragma unroll
  for (uint32_t i = 0; i < dy.kValues; ++i) dy.of[i] = inverse * (dy.of[i] * weight.of[i] - r.of[i] * along);
  if (args.dr_out != nullptr) {
    const UnitValues<T> more(row.load(args.dr_out + start, unit));
#pragma unroll
    for (uint32_t i = 0; i < dy.kValues; ++i) dy.of[i] += more.of[i];
  }
  row.store(args.dr + start, unit, dy);
}

template <class T, bool needs_r, bool needs_weight>
__device__ __forceinline__ void gradient_row(const GradientArgs<T>& args, size_t token, WeightGradient<T>& dweight,
                                             BlockFold& folds) {
  const Row<T> row(args.width);
  const size_t start = token * args.width;
  const uint32_t units = row.units(), first = threadIdx.x, stride = blockDim.x;
  const SumOf<T> inverse = args.inverse_rms[token];
  Word16 dys[kKept], rs[kKept];
#pragma unroll
  for (uint32_t k = 0; k < kKept; ++k) {
    if (first + k * stride >= units) continue;
    dys[k] = row.load(args.dy + start, first + k * stride);
    rs[k] = row.load(args.r + start, first + k * stride);
  }
  SumOf<T> products = 0;
  // One unit: what it adds to the mean and to dweight.
  const auto see = [&](uint32_t unit, const UnitValues<T>& dy, const UnitValues<T>& r) {
    if (needs_r) products += sum_of_products<T>(dy, UnitValues<T>(row.load(args.weight, unit)), r);
  };
#pragma unroll
  for (uint32_t k = 0; k < kKept; ++k) {
    if (first + k * stride >= units) continue;
    const UnitValues<T> dy(dys[k]), r(rs[k]);
    see(first + k * stride, dy, r);
    if (needs_weight) dweight.add_kept(k, dy, r, inverse);
  }
  for (uint32_t unit = first + kKept * stride; unit < units; unit += stride) {
    const UnitValues<T> dy(row.load(args.dy + start, unit)), r(row.load(args.r + start, unit));
    see(unit, dy, r);
    if (needs_weight) dweight.add(unit, dy, r, inverse);
  }
  if (!needs_r) return;
  const SumOf<T> along = folds.sum(products) / static_cast<SumOf<T>>(args.width) * inverse * inverse;
#pragma unroll
  for (uint32_t k = 0; k < kKept; ++k) {
    const uint32_t unit = first + k * stride;
    if (unit >= units) continue;
    store_gradient(args, row, start, unit, UnitValues<T>(dys[k]), UnitValues<T>(rs[k]), inverse, along);
  }
  for (uint32_t unit = first + kKept * stride; unit < units; unit += stride) {
    const UnitValues<T> dy(row.load(args.dy + start, unit)), r(row.load(args.r + start, unit));
    store_gradient(args, row, start, unit, dy, r, inverse, along);
  }
}

template <class T, bool needs_r, bool needs_weight>
TPK_KERNEL void __launch_bounds__(kMaxThreads, 1) norm_gradient_kernel(GradientArgs<T> args) {
  BlockFold folds;
  WeightGradient<T> dweight(args.partial + blockIdx.x * args.width, needs_weight ? args.width : 0);
  for (size_t token = blockIdx.x; token < args.tokens; token += gridDim.x) {
    gradient_row<T, needs_r, needs_weight>(args, token, dweight, folds);
  }
  if (needs_weight) dweight.store();
}

// Column by column, in the order of the blocks.
template <class T>
TPK_KERNEL void __launch_bounds__(kMaxThreads)
    add_parts_kernel(const SumOf<T>* partial, int parts, T* dweight, size_t width) {
  const size_t column = size_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (column >= width) return;
  SumOf<T> sum = 0;
  for (int part = 0; part < parts; ++part) sum += partial[part * width + column];
  dweight[column] = Sum<T>::out(sum);
}

template <class T>
cudaError_t launch_gradient(const GradientArgs<T>& args, T* dweight, int blocks, cudaStream_t stream) {
  const int threads = threads_for_row<T>(args.width);
  cudaError_t error = cudaSuccess;
  if (args.dr == nullptr) {
    error = TPK_LAUNCH((norm_gradient_kernel<T, false, true>), blocks, threads, 0, stream, args);
  } else if (args.partial == nullptr) {
    error = TPK_LAUNCH((norm_gradient_kernel<T, true, false>), blocks, threads, 0, stream, args);
  } else {
    error = TPK_LAUNCH((norm_gradient_kernel<T, true, true>), blocks, threads, 0, stream, args);
  }
  if (error != cudaSuccess || args.partial == nullptr) return error;
  constexpr size_t kColumns = 128;
  const int grid = static_cast<int>((args.width + kColumns - 1) / kColumns);
  return TPK_LAUNCH(add_parts_kernel<T>, grid, kColumns, 0, stream, args.partial, blocks, dweight, args.width);
}

// ---- squared norm --------------------------------------------------------------------------------------------------

constexpr int kNormThreads = 256;

template <class T>
TPK_KERNEL void __launch_bounds__(kNormThreads) squares_kernel(TensorList list, double* partial) {
  double squares = 0.0;
  for (int t = 0; t < list.count; ++t) {
    const T* const values = static_cast<const T*>(list.data[t]);
    const Row<T> all(list.numel[t]);
    const Range mine = share_of<Plain<T>>(0, all.units());
    for (uint32_t unit = mine.first; unit < mine.end; unit += kKept * mine.stride) {
      Word16 words[kKept] = {};
#pragma unroll
      for (uint32_t k = 0; k < kKept; ++k) {
        if (unit + k * mine.stride < mine.end) words[k] = all.load(values, unit + k * mine.stride);
      }
#pragma unroll
      for (uint32_t k = 0; k < kKept; ++k) {
        const UnitValues<T> found(words[k]);
#pragma unroll
        for (uint32_t i = 0; i < found.kValues; ++i) {
          squares += static_cast<double>(found.of[i]) * static_cast<double>(found.of[i]);
        }
      }
    }
  }
  squares = BlockFold().sum(squares);
  if (threadIdx.x == 0) partial[blockIdx.x] = squares;
}

TPK_KERNEL void __launch_bounds__(kNormThreads) add_squares_kernel(const double* partial, int parts, double* total) {
  double squares = 0.0;
  for (int part = static_cast<int>(threadIdx.x); part < parts; part += kNormThreads) squares += partial[part];
  squares = BlockFold().sum(squares);
  if (threadIdx.x == 0) total[0] += squares;
}

}  // namespace

cudaError_t launch_rms_norm_backward(DType dtype, const void* dy, const void* dresidual_out, const void* residual_out,
                                     const void* weight, const void* inverse_rms, void* dr, void* partial,
                                     void* dweight, size_t tokens, size_t width, int blocks, cudaStream_t stream) {
  if (blocks < 1 || blocks > static_cast<int>(kMaxRowBlocks)) return cudaErrorInvalidValue;
  return with_floating(dtype, [&](auto value) -> cudaError_t {
    using T = decltype(value);
    if (width == 0 || (dr == nullptr && partial == nullptr)) return cudaSuccess;
    const GradientArgs<T> args{static_cast<const T*>(dy),
                               static_cast<const T*>(dresidual_out),
                               static_cast<const T*>(residual_out),
                               static_cast<const T*>(weight),
                               static_cast<const SumOf<T>*>(inverse_rms),
                               static_cast<T*>(dr),
                               static_cast<SumOf<T>*>(partial),
                               tokens,
                               width};
    return launch_gradient<T>(args, static_cast<T*>(dweight), blocks, stream);
  });
}

cudaError_t launch_squared_norm(DType dtype, const TensorList& list, double* partial, double* total, int blocks,
                                cudaStream_t stream) {
  if (blocks < 1 || blocks > static_cast<int>(kMaxRowBlocks)) return cudaErrorInvalidValue;
  if (list.count < 0 || list.count > TensorList::kMax) return cudaErrorInvalidValue;
  return with_floating(dtype, [&](auto value) -> cudaError_t {
    const cudaError_t error =
        TPK_LAUNCH(squares_kernel<decltype(value)>, blocks, kNormThreads, 0, stream, list, partial);
    if (error != cudaSuccess) return error;
    return TPK_LAUNCH(add_squares_kernel, 1, kNormThreads, 0, stream, partial, blocks, total);
  });
}

}  // namespace tpk::cuda
