// Embedding and cross entropy over a vocabulary that is cut over the ranks: what each rank does with its own shard.
//
// Called by  csrc/cuda/vocab.cpp, which moves rows and stats between the ranks in between.
// Sums       over a row in fp32 (fp64) in the order of rows.cuh, over the ranks in rank order, over the tokens of an id
//            in token order: every run and every rank gives the same bits, and nothing is added by atomics.
// Traffic    logits are read twice for the stats, the second time from a cache; everything else is touched once.
#include <cmath>

#include "rows.cuh"

namespace tpk::cuda {
namespace {

// int64 or int32 numbers.
struct Ids {
  const void* data;
  bool are_64;

  __device__ __forceinline__ int64_t operator[](size_t i) const {
    return are_64 ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

// This rank's part of the vocabulary: ids [start, start + shard) of [0, size).
struct Shard {
  int64_t start, shard, size;

  __device__ __forceinline__ bool knows(int64_t id) const { return id >= 0 && id < size; }
  __device__ __forceinline__ bool has(int64_t id) const { return id >= start && id < start + shard; }
};

// ---- embedding -----------------------------------------------------------------------------------------------------

constexpr int kTokensPerBlock = 8;

struct EmbeddingArgs {
  Ids ids;
  const char* table;
  char* out;
  size_t tokens, words;  // of a row
  Shard vocab;
  uint32_t* bad;
};

// A warp copies a row, in the widest words that its place and length allow.
template <class Word>
TPK_KERNEL void __launch_bounds__(kTokensPerBlock* kWarp) embedding_kernel(EmbeddingArgs args) {
  const size_t step = size_t{gridDim.x} * kTokensPerBlock;
  for (size_t token = size_t{blockIdx.x} * kTokensPerBlock + threadIdx.x / kWarp; token < args.tokens; token += step) {
    const int64_t id = args.ids[token];
    if (lane() == 0 && !args.vocab.knows(id)) atomicAdd(args.bad, 1u);
    const bool mine = args.vocab.knows(id) && args.vocab.has(id);
    const Word* from = reinterpret_cast<const Word*>(args.table) +
                       (mine ? static_cast<size_t>(id - args.vocab.start) : 0) * args.words;
    Word* to = reinterpret_cast<Word*>(args.out) + token * args.words;
    for (size_t start = lane(); start < args.words; start += kKept * kWarp) {
      Word words[kKept] = {};
#pragma unroll
      for (uint32_t k = 0; k < kKept; ++k) {
        if (mine && start + k * kWarp < args.words) words[k] = from[start + k * kWarp];
      }
#pragma unroll
      for (uint32_t k = 0; k < kKept; ++k) {
        if (start + k * kWarp < args.words) to[start + k * kWarp] = words[k];
      }
    }
  }
}

template <class Word>
cudaError_t launch_rows(EmbeddingArgs args, size_t row_bytes, cudaStream_t stream) {
  args.words = row_bytes / sizeof(Word);
  const int blocks = blocks_for_rows((args.tokens + kTokensPerBlock - 1) / kTokensPerBlock);
  return TPK_LAUNCH(embedding_kernel<Word>, blocks, kTokensPerBlock * kWarp, 0, stream, args);
}

constexpr uint32_t kColumnThreads = 128;
// Rows that a thread has on the way. The sum of an id is taken one token after the other, as on the CPU, to the same
// bits: an id that is there 10,000 times takes 10,000 / 16 times the latency of memory, some 0.5 ms. (A model, not
// measured.) Sums of stretches of tokens would be faster, and other bits.
constexpr uint32_t kRowsInFlight = 16;

template <class T>
struct ScatterArgs {
  const T* dy;
  const int64_t* sorted_ids;
  const int64_t* order;
  T* table_gradient;
  size_t tokens, width;
  int64_t start, shard;
};

// Block (i, c) adds up columns c of the ids that begin at place i, if they are this rank's and none before is equal.
template <class T>
TPK_KERNEL void __launch_bounds__(kColumnThreads) scatter_kernel(ScatterArgs<T> args) {
  const size_t first = blockIdx.x;
  const int64_t id = args.sorted_ids[first], row_of_table = id - args.start;
  if (row_of_table < 0 || row_of_table >= args.shard || (first > 0 && args.sorted_ids[first - 1] == id)) return;
  const Row<T> row(args.width);
  const uint32_t unit = blockIdx.y * blockDim.x + threadIdx.x;
  if (unit >= row.units()) return;
  UnitValues<T> sums{Word16{}};
  for (size_t place = first; place < args.tokens && args.sorted_ids[place] == id; place += kRowsInFlight) {
    Word16 words[kRowsInFlight];
    bool there[kRowsInFlight];
#pragma unroll
    for (uint32_t k = 0; k < kRowsInFlight; ++k) {
      there[k] = place + k < args.tokens && args.sorted_ids[place + k] == id;
      if (there[k]) words[k] = row.load(args.dy + static_cast<size_t>(args.order[place + k]) * args.width, unit);
    }
#pragma unroll
    for (uint32_t k = 0; k < kRowsInFlight; ++k) {
      if (!there[k]) continue;
      const UnitValues<T> values(words[k]);
#pragma unroll
      for (uint32_t i = 0; i < sums.kValues; ++i) sums.of[i] += values.of[i];
    }
  }
  row.store(args.table_gradient + static_cast<size_t>(row_of_table) * args.width, unit, sums);
}

// ---- loss ----------------------------------------------------------------------------------------------------------

// As RowStats of cpu/softmax.h.
template <class S>
struct Stats {
  S largest, exponents, target, total;
};

template <class S>
__device__ __forceinline__ constexpr S minus_infinity() {
  return static_cast<S>(-INFINITY);
}

template <class T>
struct StatsArgs {
  const T* logits;
  Ids targets;
  Stats<SumOf<T>>* stats;
  size_t tokens;
  Shard vocab;
  int64_t ignore_index;
  uint32_t* bad;
};

// Calls see(value) for this thread's values of a row, in order; some units are on their way at once.
template <class T, class See>
__device__ __forceinline__ void for_values(const Row<T>& row, const T* values, See see) {
  const uint32_t stride = blockDim.x;
  for (uint32_t start = threadIdx.x; start < row.units(); start += kKept * stride) {
    Word16 words[kKept];
#pragma unroll
    for (uint32_t k = 0; k < kKept; ++k) {
      if (start + k * stride < row.units()) words[k] = row.load(values, start + k * stride);
    }
#pragma unroll
    for (uint32_t k = 0; k < kKept; ++k) {
      if (start + k * stride >= row.units()) continue;
      const UnitValues<T> found(words[k]);
      const uint32_t count = values_in<Plain<T>>(start + k * stride, row.length);
#pragma unroll
      for (uint32_t i = 0; i < found.kValues; ++i) {
        if (i < count) see(found.of[i]);
      }
    }
  }
}

template <class T>
TPK_KERNEL void __launch_bounds__(kMaxThreads) row_stats_kernel(StatsArgs<T> args) {
  using S = SumOf<T>;
  const size_t width = static_cast<size_t>(args.vocab.shard);
  const Row<T> row(width);
  BlockFold folds;
  for (size_t token = blockIdx.x; token < args.tokens; token += gridDim.x) {
    const T* const logits = args.logits + token * width;
    S largest = minus_infinity<S>(), total = 0, exponents = 0;
    for_values(row, logits, [&](S value) {
      largest = value > largest ? value : largest;
      total += value;
    });
    largest = folds.largest(largest);
    total = folds.sum(total);
    // A row of nothing but -inf (or an empty one): no exponents, instead of exp(-inf + inf). A NaN is in them.
    const S base = largest == minus_infinity<S>() ? S(0) : largest;
    for_values(row, logits, [&](S value) { exponents += std::exp(value - base); });
    exponents = folds.sum(exponents);
    if (threadIdx.x > 0) continue;
    const int64_t target = args.targets[token];
    const bool ignored = target == args.ignore_index;
    if (!ignored && !args.vocab.knows(target)) atomicAdd(args.bad, 1u);
    const S logit = args.vocab.has(target) ? Sum<T>::in(logits[target - args.vocab.start]) : S(0);
    args.stats[token] = {largest, exponents, logit, total};
  }
}

template <class S>
struct CombineArgs {
  const Stats<S>* stats;
  int world_size;
  Ids targets;
  S* loss;
  double* lse;
  size_t tokens;
  int64_t vocab_size, ignore_index;
  S smoothing;
};

template <class S>
TPK_KERNEL void __launch_bounds__(kColumnThreads) combine_stats_kernel(CombineArgs<S> args) {
  const size_t token = size_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (token >= args.tokens) return;
  S largest = minus_infinity<S>(), exponents = 0, target = 0, total = 0;
  for (int r = 0; r < args.world_size; ++r) {
    const S found = args.stats[r * args.tokens + token].largest;
    largest = found > largest ? found : largest;
  }
  for (int r = 0; r < args.world_size; ++r) {
    const Stats<S> row = args.stats[r * args.tokens + token];
    const bool empty = row.largest == minus_infinity<S>() && row.exponents == 0;
    exponents += empty ? S(0) : row.exponents * std::exp(row.largest - largest);
    target += row.target;
    total += row.total;
  }
  // Differences of logits first: they are small where the logits themselves are large.
  S loss = std::log(exponents) + (1 - args.smoothing) * (largest - target);
  if (args.smoothing != 0) loss += args.smoothing * (largest - total / static_cast<S>(args.vocab_size));
  args.lse[token] = static_cast<double>(largest) + std::log(static_cast<double>(exponents));
  args.loss[token] = args.targets[token] == args.ignore_index ? S(0) : loss;
}

template <class T>
struct LossGradientArgs {
  const SumOf<T>* dloss;
  const T* logits;
  Ids targets;
  const double* lse;
  T* dlogits;
  size_t tokens;
  Shard vocab;
  int64_t ignore_index;
  SumOf<T> smoothing;
};

template <class T>
TPK_KERNEL void __launch_bounds__(kMaxThreads) loss_gradient_kernel(LossGradientArgs<T> args) {
  using S = SumOf<T>;
  const size_t width = static_cast<size_t>(args.vocab.shard);
  const Row<T> row(width);
  const S uniform = args.smoothing / static_cast<S>(args.vocab.size);
  for (size_t token = blockIdx.x; token < args.tokens; token += gridDim.x) {
    const int64_t target = args.targets[token], local = target - args.vocab.start;
    const S scale = args.dloss[token], near = static_cast<S>(args.lse[token]);
    const S rest = static_cast<S>(args.lse[token] - near);
    for (uint32_t unit = threadIdx.x; unit < row.units(); unit += blockDim.x) {
      UnitValues<T> values{Word16{}};
      if (target != args.ignore_index) {
        values = UnitValues<T>(row.load(args.logits + token * width, unit));
#pragma unroll
        for (uint32_t i = 0; i < values.kValues; ++i) {
          const bool hot = static_cast<int64_t>(unit) * values.kValues + i == local;
          values.of[i] = scale * (std::exp(values.of[i] - near - rest) - (hot ? 1 - args.smoothing : S(0)) - uniform);
        }
      }
      row.store(args.dlogits + token * width, unit, values);
    }
  }
}

}  // namespace

cudaError_t launch_embedding(const void* ids, bool ids_are_64, const void* table, void* out, size_t tokens,
                             size_t row_bytes, int64_t vocab_start, int64_t shard, int64_t vocab_size, uint32_t* bad,
                             cudaStream_t stream) {
  if (tokens == 0) return cudaSuccess;
  const EmbeddingArgs args{{ids, ids_are_64},
                           static_cast<const char*>(table),
                           static_cast<char*>(out),
                           tokens,
                           row_bytes,
                           {vocab_start, shard, vocab_size},
                           bad};
  const uintptr_t together = reinterpret_cast<uintptr_t>(table) | reinterpret_cast<uintptr_t>(out) | row_bytes;
  if (together % 16 == 0) return launch_rows<uint4>(args, row_bytes, stream);
  if (together % 4 == 0) return launch_rows<uint32_t>(args, row_bytes, stream);
  if (together % 2 == 0) return launch_rows<uint16_t>(args, row_bytes, stream);
  return launch_rows<uint8_t>(args, row_bytes, stream);
}

cudaError_t launch_embedding_backward(DType dtype, const void* dy, const int64_t* sorted_ids, const int64_t* order,
                                      void* table_gradient, size_t tokens, size_t width, int64_t vocab_start,
                                      int64_t shard, cudaStream_t stream) {
  if (shard == 0 || width == 0) return cudaSuccess;
  const size_t bytes = static_cast<size_t>(shard) * width * size_of(dtype);
  if (const cudaError_t error = cudaMemsetAsync(table_gradient, 0, bytes, stream); error != cudaSuccess) return error;
  if (tokens == 0) return cudaSuccess;
  return with_floating(dtype, [&](auto value) -> cudaError_t {
    using T = decltype(value);
    const ScatterArgs<T> args{static_cast<const T*>(dy),
                              sorted_ids,
                              order,
                              static_cast<T*>(table_gradient),
                              tokens,
                              width,
                              vocab_start,
                              shard};
    const uint32_t units = units_of(length_of<Plain<T>>(width));
    const dim3 grid(static_cast<uint32_t>(tokens), (units + kColumnThreads - 1) / kColumnThreads);
    const uint32_t threads = units < kColumnThreads ? (units + kWarp - 1) / kWarp * kWarp : kColumnThreads;
    return TPK_LAUNCH(scatter_kernel<T>, grid, threads, 0, stream, args);
  });
}

cudaError_t launch_row_stats(DType dtype, const void* logits, const void* targets, bool targets_are_64, void* stats,
                             size_t tokens, size_t shard, int64_t vocab_start, int64_t vocab_size, int64_t ignore_index,
                             uint32_t* bad, cudaStream_t stream) {
  if (tokens == 0) return cudaSuccess;
  return with_floating(dtype, [&](auto value) -> cudaError_t {
    using T = decltype(value);
    const StatsArgs<T> args{static_cast<const T*>(logits),
                            {targets, targets_are_64},
                            static_cast<Stats<SumOf<T>>*>(stats),
                            tokens,
                            {vocab_start, static_cast<int64_t>(shard), vocab_size},
                            ignore_index,
                            bad};
    return TPK_LAUNCH(row_stats_kernel<T>, blocks_for_rows(tokens), threads_for_row<T>(shard), 0, stream, args);
  });
}

cudaError_t launch_combine_stats(DType dtype, const void* stats, int world_size, const void* targets,
                                 bool targets_are_64, void* loss, void* lse, size_t tokens, int64_t vocab_size,
                                 int64_t ignore_index, double label_smoothing, cudaStream_t stream) {
  if (tokens == 0) return cudaSuccess;
  return with_floating(dtype, [&](auto value) -> cudaError_t {
    using S = SumOf<decltype(value)>;
    const CombineArgs<S> args{static_cast<const Stats<S>*>(stats),
                              world_size,
                              {targets, targets_are_64},
                              static_cast<S*>(loss),
                              static_cast<double*>(lse),
                              tokens,
                              vocab_size,
                              ignore_index,
                              static_cast<S>(label_smoothing)};
    const size_t blocks = (tokens + kColumnThreads - 1) / kColumnThreads;
    return TPK_LAUNCH(combine_stats_kernel<S>, static_cast<uint32_t>(blocks), kColumnThreads, 0, stream, args);
  });
}

cudaError_t launch_loss_gradient(DType dtype, const void* dloss, const void* logits, const void* targets,
                                 bool targets_are_64, const void* lse, void* dlogits, size_t tokens, size_t shard,
                                 int64_t vocab_start, int64_t vocab_size, int64_t ignore_index, double label_smoothing,
                                 cudaStream_t stream) {
  if (tokens == 0 || shard == 0) return cudaSuccess;
  return with_floating(dtype, [&](auto value) -> cudaError_t {
    using T = decltype(value);
    const LossGradientArgs<T> args{static_cast<const SumOf<T>*>(dloss),
                                   static_cast<const T*>(logits),
                                   {targets, targets_are_64},
                                   static_cast<const double*>(lse),
                                   static_cast<T*>(dlogits),
                                   tokens,
                                   {vocab_start, static_cast<int64_t>(shard), vocab_size},
                                   ignore_index,
                                   static_cast<SumOf<T>>(label_smoothing)};
    return TPK_LAUNCH(loss_gradient_kernel<T>, blocks_for_rows(tokens), threads_for_row<T>(shard), 0, stream, args);
  });
}

}  // namespace tpk::cuda
