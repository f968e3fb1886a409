// Tensors as the communicator sees them: values of a dtype one behind the other.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>

#include <cstring>
#include <string>
#include <vector>

#include "core/communicator.h"

namespace tpk {

using Tensors = std::vector<at::Tensor>;

// What one value of a tensor is to a reduction: `count` values of a dtype, a raw one where there is no arithmetic.
// has_order: whether the order of the values is that of the dtype.
struct ValueType {
  DType dtype;
  size_t count;
  bool has_order;
};

inline DType raw_of(size_t bytes) {
  switch (bytes) {
    case 1: return DType::Raw1;
    case 2: return DType::Raw2;
    case 4: return DType::Raw4;
    case 8: return DType::Raw8;
    default: return DType::Raw16;
  }
}

inline ValueType value_type_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return {DType::F32, 1, true};
    case at::kDouble: return {DType::F64, 1, true};
    case at::kBFloat16: return {DType::BF16, 1, true};
    case at::kHalf: return {DType::F16, 1, true};
    case at::kChar: return {DType::I8, 1, true};
    case at::kByte: return {DType::U8, 1, true};
    case at::kBool: return {DType::U8, 1, true};
    case at::kShort: return {DType::I16, 1, true};
    case at::kInt: return {DType::I32, 1, true};
    case at::kLong: return {DType::I64, 1, true};
    case at::kUInt16: return {DType::I16, 1, false};
    case at::kUInt32: return {DType::I32, 1, false};
    case at::kUInt64: return {DType::I64, 1, false};
    case at::kComplexHalf: return {DType::F16, 2, false};
    case at::kComplexFloat: return {DType::F32, 2, false};
    case at::kComplexDouble: return {DType::F64, 2, false};
    default: return {raw_of(tensor.element_size()), 1, false};
  }
}

// A tensor's values in the memory order of a contiguous tensor: the tensor itself where it has that order.
class Values {
 public:
  // reads: whether the values that the tensor has now are needed.
  Values(const at::Tensor& tensor, bool reads) : tensor_(tensor) {
    const bool is_plain = tensor.is_contiguous() && !tensor.is_conj() && !tensor.is_neg();
    memory_ =
        is_plain ? tensor : at::empty(tensor.sizes(), tensor.options().memory_format(at::MemoryFormat::Contiguous));
    if (!is_plain && reads) memory_.copy_(tensor);
  }
  const at::Tensor& memory() const { return memory_; }
  char* data() const { return static_cast<char*>(memory_.data_ptr()); }
  size_t numel() const { return static_cast<size_t>(memory_.numel()); }
  bool is_copy() const { return !memory_.is_same(tensor_); }
  void write_back() const {
    if (is_copy()) tensor_.copy_(memory_);
  }

 private:
  const at::Tensor tensor_;
  at::Tensor memory_;
};

// Several tensors of one dtype one behind the other: in the memory that they are parts of where that is so.
class Parts {
 public:
  Parts(const Tensors& tensors, bool reads) : tensors_(tensors) {
    cut.starts.push_back(0);
    for (const at::Tensor& tensor : tensors)
      cut.starts.push_back(cut.starts.back() + static_cast<size_t>(tensor.numel()));
    if (tensors.empty()) return;
    if (are_adjacent()) {
      for (const at::Tensor& tensor : tensors) {
        if (tensor.numel() > 0 && data_ == nullptr) data_ = static_cast<char*>(tensor.data_ptr());
      }
      return;
    }
    memory_ = at::empty({static_cast<int64_t>(cut.total())},
                        tensors[0].options().memory_format(at::MemoryFormat::Contiguous));
    data_ = static_cast<char*>(memory_.data_ptr());
    if (reads) {
      for (size_t i = 0; i < tensors.size(); ++i) part(i).copy_(tensors[i]);
    }
  }
  char* data() const { return data_; }
  void write_back() const {
    if (!memory_.defined()) return;
    for (size_t i = 0; i < tensors_.size(); ++i) tensors_[i].copy_(part(i));
  }

  Cut cut;  // in values of the tensors

 private:
  at::Tensor part(size_t i) const {
    return memory_.narrow(0, static_cast<int64_t>(cut.starts[i]), tensors_[i].numel()).view(tensors_[i].sizes());
  }
  bool are_adjacent() const {
    const char* next = nullptr;
    for (const at::Tensor& tensor : tensors_) {
      if (tensor.numel() == 0) continue;
      if (!tensor.is_contiguous() || tensor.is_conj() || tensor.is_neg()) return false;
      const char* const begin = static_cast<const char*>(tensor.const_data_ptr());
      if (next != nullptr && begin != next) return false;
      next = begin + tensor.nbytes();
    }
    return true;
  }

  const Tensors tensors_;
  at::Tensor memory_;
  char* data_ = nullptr;
};

// Bytes that are read while others are written: themselves, or a copy of them where the two share memory.
// is_in_place: they share it in the one way that is right without a copy.
class Apart {
 public:
  Apart(const char* read, size_t bytes, const char* written, size_t written_bytes, bool is_in_place = false)
      : data_(read) {
    if (is_in_place || read + bytes <= written || written + written_bytes <= read) return;
    copy_ = at::empty({static_cast<int64_t>(bytes)}, at::kByte);
    data_ = static_cast<const char*>(std::memcpy(copy_.data_ptr(), read, bytes));
  }
  const char* data() const { return data_; }

 private:
  const char* data_;
  at::Tensor copy_;
};

inline void check_tensor(const std::string& what, const at::Tensor& tensor) {
  TORCH_CHECK(tensor.device().is_cpu(), what, " takes tensors on the cpu, got one on ", tensor.device());
  TORCH_CHECK(tensor.layout() == at::kStrided && !tensor.is_quantized(), what, " takes dense tensors, got ",
              tensor.toString());
}

inline void check_alike(const std::string& what, const at::Tensor& a, const at::Tensor& b) {
  check_tensor(what, b);
  TORCH_CHECK(a.scalar_type() == b.scalar_type(), what, " takes tensors of one dtype, got ", a.scalar_type(), " and ",
              b.scalar_type());
}

// All values of a cut belong to one rank.
inline Cut all_of(int owner, size_t n, int world_size) {
  Cut cut;
  for (int r = 0; r <= world_size; ++r) cut.starts.push_back(r <= owner ? 0 : n);
  return cut;
}

// Copies between a user's tensors and ours record no gradient, bump no version, and accept inference tensors.
struct WithoutAutograd {
  at::NoGradGuard no_grad;
  at::AutoDispatchBelowADInplaceOrView below;
};

}  // namespace tpk
