// The torch side of both backends: tensors through torch's stable ABI, and the ATen ops that are called by name.
#pragma once

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/check.h"
#include "core/codec/half.h"
#include "core/communicator.h"
#include "core/shapes.h"
#include "core/types.h"
#include "text.h"
#include "torch_side/stream_order.h"

namespace tpk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// DType::Count for types that have no arithmetic here; those are moved by size.
inline DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return DType::F32;
    case ScalarType::Double: return DType::F64;
    case ScalarType::BFloat16: return DType::BF16;
    case ScalarType::Half: return DType::F16;
    case ScalarType::Char: return DType::I8;
    case ScalarType::Byte: return DType::U8;
    case ScalarType::Short: return DType::I16;
    case ScalarType::Int: return DType::I32;
    case ScalarType::Long: return DType::I64;
    default: return DType::Count;
  }
}

// The type under which x is moved without arithmetic.
inline DType raw_dtype_of(const Tensor& x) {
  const DType dtype = dtype_of(x);
  if (dtype != DType::Count) return dtype;
  switch (x.element_size()) {
    case 1: return DType::Raw1;
    case 2: return DType::Raw2;
    case 4: return DType::Raw4;
    case 8: return DType::Raw8;
    default: return DType::Raw16;
  }
}

inline DType float_dtype_of(const char* op, const Tensor& x) {
  const DType dtype = dtype_of(x);
  TPK_CHECK(dtype <= DType::F16, op, ": needs a floating dtype, got ", name_of(raw_dtype_of(x)));
  return dtype;
}

// Calls body with a value of the C++ type of x: float, double, Half or Bfloat16.
template <class Body>
void with_float_type(const char* op, const Tensor& x, Body&& body) {
  switch (float_dtype_of(op, x)) {
    case DType::F64: return body(double{});
    case DType::F16: return body(Half{});
    case DType::BF16: return body(Bfloat16{});
    default: return body(float{});
  }
}

inline Shape shape_of(const Tensor& x) {
  Shape shape(static_cast<size_t>(x.dim()));
  for (size_t i = 0; i < shape.size(); ++i) shape[i] = x.size(static_cast<int64_t>(i));
  return shape;
}

inline size_t numel_of(const Tensor& x) { return static_cast<size_t>(x.numel()); }

// The dtype in which values of x are summed.
inline ScalarType sum_type_of(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The rows of x[..., K]: all leading dimensions as one.
inline int64_t num_rows(const Tensor& x) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) rows *= x.size(i);
  return rows;
}
inline Tensor as_rows(const Tensor& x) {
  return x.dim() == 2 ? x : kept(torch::stable::reshape(x, {num_rows(x), x.size(x.dim() - 1)}));
}

// to = from
inline void copy_into(Tensor to, const Tensor& from) {
  in_order([to, from]() mutable { torch::stable::copy_(to, from); });
}

// A kernel that is called past the dispatcher can be given a tensor whose values lie nowhere (a ZeroTensor).
inline const Tensor& in_memory(const Tensor& x) {
  TPK_CHECK(
      x.numel() == 0 || x.const_data_ptr() != nullptr,
      "a tensor without memory (a ZeroTensor?) cannot be read here: call the op through torch.ops, or clone() it");
  return x;
}

inline Tensor empty_of(const Tensor& like, const Shape& shape) { return kept(torch::stable::new_empty(like, shape)); }

inline Tensor empty_of(const Tensor& like, const Shape& shape, ScalarType dtype) {
  return kept(torch::stable::new_empty(like, shape, dtype));
}

// What a backward returns for a gradient that is not needed.
inline Tensor nothing(const Tensor& like) { return empty_of(like, {0}); }

// Throws, with torch's text where torch provides it, unless `code` says that the op `name` succeeded.
void check_torch(const char* name, AOTITorchError code);

// Calls an op by its name; the operands must match the schema.
Tensor call_op(const char* name, const char* overload, StableIValue* stack);

template <class... Args>
Tensor call(const char* name, const char* overload, const Args&... args) {
  static_assert((!std::is_convertible_v<Args, std::string> && ...), "torch loses the memory of strings (text.h)");
  return made([=] {
    std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
    return call_op(name, overload, stack.data());
  });
}

inline Tensor dense(const Tensor& x) {
  if (x.is_contiguous()) return in_memory(x);
  return call("aten::contiguous", "", in_memory(x), torch::headeronly::MemoryFormat::Contiguous);
}

// Dimension `dim` first, contiguous; and back.
inline Tensor dim_first(const Tensor& x, int64_t dim) {
  return dense(dim == 0 ? x : call("aten::movedim", "int", x, dim, int64_t{0}));
}
inline Tensor dim_back(const Tensor& x, int64_t dim) {
  return dim == 0 ? x : dense(call("aten::movedim", "int", x, int64_t{0}, dim));
}

}  // namespace tpk
