#include "cpu/compress.h"

#include <algorithm>

#include "core/bytes.h"
#include "core/check.h"
#include "torch_side/compress.h"
#include "torch_side/packing.h"

namespace tpk {
namespace {

constexpr size_t kTask = 1 << 16;  // values that are worth a thread of their own

// Calls body(start, count) for pieces of n values that begin with a block.
template <class Body>
void over_blocks(const Wire& wire, size_t n, Body&& body) {
  const size_t block = std::max(wire.block_values, kTask / wire.block_values * wire.block_values);
  const size_t blocks = (n + block - 1) / block;
  if (blocks == 0) return;
  torch::stable::parallel_for(0, static_cast<int64_t>(blocks), 1, [&](int64_t first, int64_t last) {
    const size_t start = static_cast<size_t>(first) * block;
    body(start, std::min(n, static_cast<size_t>(last) * block) - start);
  });
}

}  // namespace

void pack(const Wire& wire, const void* values, void* packed, size_t n) {
  over_blocks(wire, n, [&](size_t start, size_t count) {
    wire.encode(at(values, start * wire.value_bytes), at(packed, wire.offset(start)), count);
  });
}

void unpack(const Wire& wire, const void* packed, void* values, size_t n) {
  over_blocks(wire, n, [&](size_t start, size_t count) {
    wire.decode(at(packed, wire.offset(start)), at(values, start * wire.value_bytes), count);
  });
}

void pack_with_feedback(const Wire& wire, const void* values, float* residual, void* packed, float scale, size_t n) {
  over_blocks(wire, n, [&](size_t start, size_t count) {
    wire.encode_with_feedback(at(values, start * wire.value_bytes), residual + start, at(packed, wire.offset(start)),
                              scale, count);
  });
}

Tensor compress(const Tensor& x, Text codec) {
  const Wire& wire = packing("compress", x, codec);
  const Tensor values = dense(x);
  Tensor out = empty_wire(values, wire, numel_of(values));
  pack(wire, values.const_data_ptr(), out.mutable_data_ptr(), numel_of(values));
  return out;
}

Tensor decompress(const Tensor& wire_bytes, std::vector<int64_t> shape, ScalarType dtype, Text codec) {
  auto [out, wire] = unpacking(wire_bytes, shape, dtype, codec);
  const Tensor packed = dense(wire_bytes);
  unpack(wire, packed.const_data_ptr(), out.mutable_data_ptr(), numel_of(out));
  return out;
}

Tensor compress_with_feedback(const Tensor& x, Tensor residual, Text codec, double scale) {
  const char* const op = "compress_with_feedback";
  check_residual(op, x, residual);
  const Wire& wire = packing(op, x, codec);
  TPK_CHECK(wire.has_feedback(), op, ": error feedback is for float32, bfloat16 or float16, got ", name_of(wire.dtype));
  const Tensor values = dense(x);
  Tensor out = empty_wire(values, wire, numel_of(values));
  pack_with_feedback(wire, values.const_data_ptr(), static_cast<float*>(residual.mutable_data_ptr()),
                     out.mutable_data_ptr(), static_cast<float>(scale), numel_of(values));
  return out;
}

}  // namespace tpk
