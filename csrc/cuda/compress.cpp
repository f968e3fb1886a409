// Packing of tensors outside collectives, on a device.
#include "torch_side/compress.h"

#include "kernels/kernels.h"
#include "stream.h"
#include "torch_side/packing.h"

namespace tpk {
namespace {

using cuda::current_stream;

void copy(const Tensor& from, const Tensor& to, size_t bytes) {
  if (bytes == 0) return;
  TPK_CUDA_CHECK(
      cudaMemcpyAsync(to.mutable_data_ptr(), from.const_data_ptr(), bytes, cudaMemcpyDeviceToDevice, current_stream()));
}

}  // namespace

Tensor compress(const Tensor& x, Text codec) {
  const Wire& wire = packing("compress", x, codec);
  const Tensor values = dense(x);
  const size_t n = numel_of(values);
  const Tensor out = empty_wire(values, wire, n);
  if (wire.is_plain()) {
    copy(values, out, wire.bytes(n));
  } else if (n > 0) {
    TPK_CUDA_CHECK(cuda::launch_encode(wire.dtype, wire.codec, values.const_data_ptr(), out.mutable_data_ptr(), n,
                                       current_stream()));
  }
  return out;
}

Tensor decompress(const Tensor& wire_bytes, std::vector<int64_t> shape, ScalarType dtype, Text codec) {
  const auto [out, wire] = unpacking(wire_bytes, shape, dtype, codec);
  const size_t n = numel_of(out);
  const Tensor packed = readable(wire_bytes);
  if (wire.is_plain()) {
    copy(packed, out, wire.bytes(n));
  } else if (n > 0) {
    TPK_CUDA_CHECK(cuda::launch_decode(wire.dtype, wire.codec, packed.const_data_ptr(), out.mutable_data_ptr(), n,
                                       current_stream()));
  }
  return out;
}

Tensor compress_with_feedback(const Tensor& x, Tensor residual, Text codec, double scale) {
  const char* const op = "compress_with_feedback";
  check_residual(op, x, residual);
  const Wire& wire = packing(op, x, codec);
  TPK_CHECK(wire.dtype == DType::F32 || wire.dtype == DType::BF16 || wire.dtype == DType::F16, op,
            ": error feedback is for float32, bfloat16 or float16, got ", name_of(wire.dtype));
  const Tensor values = dense(x);
  const size_t n = numel_of(values);
  const Tensor out = empty_wire(values, wire, n);
  if (n == 0) return out;
  TPK_CUDA_CHECK(cuda::launch_encode_with_feedback(
      wire.dtype, wire.codec, values.const_data_ptr(), static_cast<float*>(residual.mutable_data_ptr()),
      out.mutable_data_ptr(), static_cast<float>(scale), n, current_stream()));
  return out;
}

}  // namespace tpk
