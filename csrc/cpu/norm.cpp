#include "torch_side/norm.h"

#include <algorithm>

#include "cpu/loops/norm_rows.h"
#include "parallel.h"
#include "torch_side/collectives.h"

namespace tpk {
namespace {

constexpr size_t kMaxParts = 64;  // of the tokens, for sums over tokens
constexpr size_t kRun = 1 << 16;  // values whose squares are summed by one thread

// The number of parts depends on the shape alone, so that the bits do not depend on the number of threads.
struct Parts {
  size_t rows, each;
  Parts(size_t rows, size_t width)
      : rows(rows), each(std::max((rows + kMaxParts - 1) / kMaxParts, kGrain / std::max<size_t>(width, 1) + 1)) {}
  size_t count() const { return (rows + each - 1) / each; }
  size_t begin(size_t part) const { return part * each; }
  size_t end(size_t part) const { return std::min(rows, (part + 1) * each); }
};

Shape inverse_shape(const Tensor& x) {
  Shape shape = shape_of(x);
  shape.pop_back();
  return shape;
}

template <class T>
void add_norm(Tensor& sum, const Tensor& residual, const Tensor& weight, double eps, Tensor& y, Tensor& inverse_rms) {
  using Sum = SumOf<T>;
  const size_t width = numel_of(weight), rows = numel_of(inverse_rms);
  T* const to = static_cast<T*>(sum.mutable_data_ptr());
  T* const normed = static_cast<T*>(y.mutable_data_ptr());
  Sum* const inverse = static_cast<Sum*>(inverse_rms.mutable_data_ptr());
  const T* const from = static_cast<const T*>(residual.const_data_ptr());
  const T* const scale = static_cast<const T*>(weight.const_data_ptr());
  in_parallel_rows(rows, width, [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) {
      add_norm_row<T>(to + i * width, from + i * width, scale, width, static_cast<Sum>(eps), normed + i * width,
                      inverse + i);
    }
  });
}

// What rms_norm_backward reads, dense.
struct Saved {
  Tensor dy, r, weight, inverse_rms;
  OptionalTensor dr_out;
};

template <class T>
const T* data(const OptionalTensor& x) {
  return x.has_value() ? static_cast<const T*>(x->const_data_ptr()) : nullptr;
}

// dr may be empty (not wanted); partial_sums of weight's gradient are those of each part of the tokens, or nothing.
template <class T>
void norm_gradient(const Saved& saved, const Parts& parts, T* dr, SumOf<T>* partial_sums) {
  using Sum = SumOf<T>;
  const size_t width = numel_of(saved.weight);
  const T *dy = data<T>(saved.dy), *dr_out = data<T>(saved.dr_out), *r = data<T>(saved.r);
  const T* weight = data<T>(saved.weight);
  const Sum* inverse = static_cast<const Sum*>(saved.inverse_rms.const_data_ptr());
  in_parallel(parts.count(), 1, [&](size_t first, size_t last) {
    for (size_t part = first; part < last; ++part) {
      Sum* const sums = partial_sums == nullptr ? nullptr : partial_sums + part * width;
      if (sums != nullptr) std::fill(sums, sums + width, Sum(0));
      for (size_t i = parts.begin(part); i < parts.end(part); ++i) {
        const size_t at = i * width;
        norm_gradient_row<T>(dy + at, dr_out == nullptr ? nullptr : dr_out + at, r + at, weight, inverse[i], width,
                             dr == nullptr ? nullptr : dr + at, sums);
      }
    }
  });
}

template <class T>
void add_parts(const std::vector<SumOf<T>>& partial_sums, size_t parts, Tensor& dweight) {
  using Sum = SumOf<T>;
  const size_t width = numel_of(dweight);
  T* const to = static_cast<T*>(dweight.mutable_data_ptr());
  for (size_t j = 0; j < width; ++j) {
    Sum total = 0;
    for (size_t part = 0; part < parts; ++part) total += partial_sums[part * width + j];
    store(total, &to[j]);
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> all_reduce_add_rms_norm(const Tensor& x, const Tensor& residual,
                                                           const Tensor& weight, Text group, int64_t world_size,
                                                           double eps, Text codec) {
  constexpr Op op = Op::AllReduceAddRmsNorm;
  const auto comm = communicator_of(op, group, world_size);
  check_add_norm(name_of(op), shape_of(x), shape_of(residual), shape_of(weight));
  TPK_CHECK(x.scalar_type() == residual.scalar_type() && x.scalar_type() == weight.scalar_type(), name_of(op),
            ": x, residual and weight must have the same dtype");
  const Wire& wire = wire_for(op, x, codec);
  const Tensor in = dense(x), from = dense(residual), scale = dense(weight);
  Tensor residual_out = fresh_output(in, shape_of(in)), y = fresh_output(in, shape_of(in));
  Tensor inverse_rms = empty_of(in, inverse_shape(in), sum_type_of(in));
  all_reduce_into(op, *comm, wire, in, residual_out);
  with_float_type(name_of(op), in,
                  [&](auto type) { add_norm<decltype(type)>(residual_out, from, scale, eps, y, inverse_rms); });
  return {y, residual_out, inverse_rms};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& dy, OptionalTensor dresidual_out, const Tensor& residual_out,
                                             const Tensor& weight, const Tensor& inverse_rms, bool need_r,
                                             bool need_w) {
  check_add_norm("rms_norm_backward", shape_of(residual_out), shape_of(dy), shape_of(weight));
  Saved saved{dense(dy), dense(residual_out), dense(weight), dense(inverse_rms), {}};
  if (dresidual_out.has_value()) saved.dr_out = dense(*dresidual_out);
  const size_t width = numel_of(saved.weight);
  const Parts parts(numel_of(saved.inverse_rms), width);
  Tensor dr = need_r ? fresh_output(saved.r, shape_of(saved.r)) : nothing(saved.r);
  Tensor dweight = need_w ? empty_of(saved.weight, shape_of(saved.weight)) : nothing(saved.weight);
  with_float_type("rms_norm_backward", saved.r, [&](auto type) {
    using T = decltype(type);
    std::vector<SumOf<T>> partial_sums(need_w ? parts.count() * width : 0);
    norm_gradient<T>(saved, parts, need_r ? static_cast<T*>(dr.mutable_data_ptr()) : nullptr,
                     need_w ? partial_sums.data() : nullptr);
    if (need_w) add_parts<T>(partial_sums, parts.count(), dweight);
  });
  return {dr, dweight};
}

Tensor squared_norm(std::vector<Tensor> xs) {
  TPK_CHECK(!xs.empty(), "squared_norm: xs must have a tensor at least, got none");
  double total = 0.0;
  for (const Tensor& tensor : xs) {
    const Tensor x = dense(tensor);
    const size_t n = numel_of(x);
    std::vector<double> runs((n + kRun - 1) / kRun);
    with_float_type("squared_norm", x, [&](auto type) {
      using T = decltype(type);
      const T* values = static_cast<const T*>(x.const_data_ptr());
      in_parallel(runs.size(), 1, [&](size_t first, size_t last) {
        for (size_t i = first; i < last; ++i) {
          runs[i] = sum_of_squares<T>(values + i * kRun, std::min(kRun, n - i * kRun));
        }
      });
    });
    for (double run : runs) total += run;
  }
  Tensor out = empty_of(xs.front(), {}, ScalarType::Double);
  *static_cast<double*>(out.mutable_data_ptr()) = total;
  return out;
}

}  // namespace tpk
