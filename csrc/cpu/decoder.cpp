#include "decoder.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "core/check.h"
#include "cpu/loops/decode_rows.h"
#include "cpu/loops/gemv.h"
#include "cpu/loops/lanes.h"
#include "cpu/loops/norm_rows.h"

namespace tpk {
namespace {

constexpr size_t kGrain = size_t{1} << 16;  // weights, or values of a cache, that are worth a thread of their own
constexpr size_t kCachedBlock = 32;         // rows of weights that several groups of rows of x multiply in turn

// Uninitialised memory of one type, aligned for vectors.
template <class T>
class Scratch {
 public:
  explicit Scratch(size_t count) : memory_(std::aligned_alloc(kAlignment, rounded(count * sizeof(T)))) {
    if (memory_ == nullptr) throw std::bad_alloc();
  }
  T* data() { return static_cast<T*>(memory_.get()); }
  T* row(size_t i, size_t width) { return data() + i * width; }

 private:
  static constexpr size_t kAlignment = 64;
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  static size_t rounded(size_t bytes) { return (bytes / kAlignment + 1) * kAlignment; }
  std::unique_ptr<void, Free> memory_;
};

struct Sizes {
  size_t query = 0, kv = 0, inner = 0;  // the most values of a row that a layer has
};

Sizes largest(const DecoderStep& step, const std::vector<DecoderLayer>& layers) {
  Sizes found;
  for (const DecoderLayer& layer : layers) {
    found.query = std::max(found.query, layer.query_heads * step.head_dim);
    found.kv = std::max(found.kv, layer.kv_heads * step.head_dim);
    found.inner = std::max(found.inner, layer.inner);
  }
  return found;
}

template <class T>
class Decoding {
 public:
  Decoding(Communicator& comm, const DecoderStep& step, const std::vector<DecoderLayer>& layers,
           const ParallelFor& parallel_for)
      : Decoding(comm, step, largest(step, layers), parallel_for) {
    std::memcpy(x_.data(), step.x, step.rows * step.width * sizeof(T));
    normalise(layers.empty() ? step.last_norm : layers[0].input_norm,
              layers.empty() ? step.last_eps : layers[0].input_eps);
    for (size_t i = 0; i < layers.size(); ++i) {
      const DecoderLayer& layer = layers[i];
      attention(layer);
      add_and_normalise(layer.post_norm, layer.post_eps);
      gated(layer);
      const bool last = i + 1 == layers.size();
      add_and_normalise(last ? step.last_norm : layers[i + 1].input_norm,
                        last ? step.last_eps : layers[i + 1].input_eps);
    }
    std::memcpy(step.y, normed_.data(), step.rows * step.width * sizeof(T));
  }

 private:
  Decoding(Communicator& comm, const DecoderStep& step, const Sizes& sizes, const ParallelFor& parallel_for)
      : comm_(comm),
        step_(step),
        parallel_for_(parallel_for),
        wire_(wire_of(step.dtype, Codec::None, ReduceOp::Sum)),
        x_(step.rows * step.width),
        normed_(step.rows * step.width),
        sum_(step.rows * step.width),
        q_(step.rows * sizes.query),
        attended_(step.rows * sizes.query),
        k_(step.rows * sizes.kv),
        v_(step.rows * sizes.kv),
        gate_(step.rows * sizes.inner),
        up_(step.rows * sizes.inner),
        packed_(num_groups() * gemv_packed_bytes(kMostGemvRows, std::max({step.width, sizes.query, sizes.inner}))) {}

  struct Product {
    const void *w, *bias;
    T* y;
    size_t N;
  };

  size_t num_groups() const { return (step_.rows + kMostGemvRows - 1) / kMostGemvRows; }

  // Every product of one x[rows, K], which is packed once. Each block of weights multiplies all groups of rows before
  // the next one is read.
  void multiply(const T* x, size_t K, std::initializer_list<Product> products) {
    const GemvPath& path = gemv_paths(step_.dtype).front();
    const size_t groups = num_groups(), packed_bytes = gemv_packed_bytes(kMostGemvRows, K);
    const auto group_of = [&](const Product& product, size_t g) {
      const size_t first = g * kMostGemvRows, count = std::min(kMostGemvRows, step_.rows - first);
      return Gemv{
          x + first * K, product.w, static_cast<ptrdiff_t>(K), product.bias, product.y + first * product.N, count,
          product.N,     K};
    };
    for (size_t g = 0; g < groups; ++g) path.pack(group_of(*products.begin(), g), packed_.data() + g * packed_bytes);
    for (const Product& product : products) {
      parallel_for_(product.N, kGrain / (groups * std::max<size_t>(K, 1)) + 1, [&](size_t begin, size_t end) {
        const size_t block = groups == 1 ? end - begin : kCachedBlock;
        for (size_t n = begin; n < end; n += block) {
          for (size_t g = 0; g < groups; ++g) {
            path.multiply(group_of(product, g), packed_.data() + g * packed_bytes, n, std::min(n + block, end));
          }
        }
      });
    }
  }

  void attention(const DecoderLayer& layer) {
    const size_t d = step_.head_dim, queries = layer.query_heads * d, kvs = layer.kv_heads * d;
    multiply(normed_.data(), step_.width,
             {{layer.q, layer.q_bias, q_.data(), queries},
              {layer.k, layer.k_bias, k_.data(), kvs},
              {layer.v, layer.v_bias, v_.data(), kvs}});
    for (size_t m = 0; m < step_.rows; ++m) {
      const T *cos = static_cast<const T*>(step_.cos) + m * d, *sin = static_cast<const T*>(step_.sin) + m * d;
      rotate_heads<T>(q_.row(m, queries), layer.query_heads, d, cos, sin);
      rotate_heads<T>(k_.row(m, kvs), layer.kv_heads, d, cos, sin);
      for (size_t h = 0; h < layer.kv_heads; ++h) {
        const size_t at = head_start(layer, slot_of(m), h) + static_cast<size_t>(step_.positions[m]) * d;
        std::memcpy(static_cast<T*>(layer.keys) + at, k_.row(m, kvs) + h * d, d * sizeof(T));
        std::memcpy(static_cast<T*>(layer.values) + at, v_.row(m, kvs) + h * d, d * sizeof(T));
      }
    }
    const size_t longest = static_cast<size_t>(*std::max_element(step_.positions, step_.positions + step_.rows)) + 1;
    parallel_for_(step_.rows * layer.query_heads, kGrain / (longest * d) + 1, [&](size_t begin, size_t end) {
      Scratch<float> scores(longest), sums(d);
      for (size_t i = begin; i < end; ++i) {
        const size_t m = i / layer.query_heads, h = i % layer.query_heads;
        const size_t at = head_start(layer, slot_of(m), h / (layer.query_heads / layer.kv_heads));
        const CachedHead<T> head{static_cast<const T*>(layer.keys) + at, static_cast<const T*>(layer.values) + at,
                                 static_cast<size_t>(step_.positions[m]) + 1, d};
        attend<T>(q_.data() + i * d, head, layer.scale, scores.data(), sums.data(), attended_.data() + i * d);
      }
    });
    multiply(attended_.data(), queries, {{layer.o, nullptr, sum_.data(), step_.width}});
  }

  void gated(const DecoderLayer& layer) {
    multiply(normed_.data(), step_.width,
             {{layer.gate, nullptr, gate_.data(), layer.inner}, {layer.up, nullptr, up_.data(), layer.inner}});
    gate_rows<T>(gate_.data(), up_.data(), step_.rows * layer.inner, gate_.data());
    multiply(gate_.data(), layer.inner, {{layer.down, nullptr, sum_.data(), step_.width}});
  }

  // The sum over the ranks, as gemm_all_reduce of [rows, 1, width] announces it: ranks may differ in how they compute.
  void add_and_normalise(const void* weight, float eps) {
    const size_t numel = step_.rows * step_.width;
    const int64_t shape[] = {static_cast<int64_t>(step_.rows), 1, static_cast<int64_t>(step_.width)};
    const CallSpec spec{Op::GemmAllReduce, step_.dtype, ReduceOp::Sum, Codec::None, numel, hash_of(shape, 3), 0};
    comm_.all_reduce(spec, wire_, sum_.data(), sum_.data(), numel);
    for (size_t m = 0; m < step_.rows; ++m) {
      float inverse;
      add_norm_row<T>(sum_.row(m, step_.width), x_.row(m, step_.width), static_cast<const T*>(weight), step_.width, eps,
                      normed_.row(m, step_.width), &inverse);
    }
    std::memcpy(x_.data(), sum_.data(), numel * sizeof(T));  // x + the sum
  }

  void normalise(const void* weight, float eps) {
    std::memset(sum_.data(), 0, step_.rows * step_.width * sizeof(T));
    for (size_t m = 0; m < step_.rows; ++m) {
      float inverse;
      add_norm_row<T>(x_.row(m, step_.width), sum_.row(m, step_.width), static_cast<const T*>(weight), step_.width, eps,
                      normed_.row(m, step_.width), &inverse);
    }
  }

  size_t slot_of(size_t row) const { return static_cast<size_t>(step_.row_slots[row]); }

  size_t head_start(const DecoderLayer& layer, size_t slot, size_t head) const {
    return (slot * layer.kv_heads + head) * step_.max_length * step_.head_dim;
  }

  Communicator& comm_;
  const DecoderStep& step_;
  const ParallelFor& parallel_for_;
  const Wire& wire_;
  Scratch<T> x_, normed_, sum_, q_, attended_, k_, v_, gate_, up_;
  Scratch<char> packed_;
};

}  // namespace

void decode_step(Communicator& comm, const DecoderStep& step, const std::vector<DecoderLayer>& layers,
                 const ParallelFor& parallel_for) {
  TPK_CHECK(step.rows >= 1, "decode_step: x must have one row or more, got 0");
  for (size_t m = 0; m < step.rows; ++m) {
    TPK_CHECK(step.positions[m] >= 0 && static_cast<size_t>(step.positions[m]) < step.max_length,
              "decode_step: positions must be in [0, ", step.max_length, "), got ", step.positions[m]);
    TPK_CHECK(step.row_slots[m] >= 0 && static_cast<size_t>(step.row_slots[m]) < step.slots,
              "decode_step: slots must be in [0, ", step.slots, "), got ", step.row_slots[m]);
  }
  switch (step.dtype) {
    case DType::F32: Decoding<float>(comm, step, layers, parallel_for); return;
    case DType::BF16: Decoding<Bfloat16>(comm, step, layers, parallel_for); return;
    case DType::F16: Decoding<Half>(comm, step, layers, parallel_for); return;
    default: TPK_CHECK(false, "decode_step: dtype must be float32, bfloat16 or float16, got ", name_of(step.dtype));
  }
}

}  // namespace tpk
