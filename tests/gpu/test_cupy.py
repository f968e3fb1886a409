"""CuPy: arrays come and go without a copy, and independent kernels say what the wire and its sum must be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.harness.ops import run_at
from tpkernels import ops
from tpkernels.comm.group import Group

N = 200_003
R = 2

# Written from the description of the codecs (csrc/codec), one thread for a block of 512 values.
SOURCE = r"""
__device__ unsigned short half_of(float v) {
  unsigned short h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(v));
  return h;
}
extern "C" __global__ void encode_fp16(const float* x, unsigned char* wire, int n) {
  int first = (blockIdx.x * blockDim.x + threadIdx.x) * 512;
  if (first >= n) return;
  int count = min(512, n - first);
  float largest = 0;
  for (int i = 0; i < count; ++i) largest = fmaxf(largest, fabsf(x[first + i]));
  int shift = largest == 0 ? 0 : 14 - ilogbf(largest);
  unsigned char* block = wire + (long long)(first / 512) * (16 + 1024);
  for (int i = 0; i < 16; ++i) block[i] = 0;
  *reinterpret_cast<short*>(block) = (short)shift;
  unsigned short* payload = reinterpret_cast<unsigned short*>(block + 16);
  for (int i = 0; i < count; ++i) payload[i] = half_of(ldexpf(x[first + i], shift));
}
__device__ unsigned short bfloat_of(float v) {
  unsigned bits = __float_as_uint(v);
  unsigned low = bits & 0xffff, kept = bits >> 16;
  return kept + (low > 0x8000 || (low == 0x8000 && (kept & 1)));
}
extern "C" __global__ void encode_bf16(const float* x, unsigned short* wire, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) wire[i] = bfloat_of(x[i]);
}
extern "C" __global__ void reduce_bf16(const unsigned short* a, const unsigned short* b, float* y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  float sum = __uint_as_float((unsigned)a[i] << 16) + __uint_as_float((unsigned)b[i] << 16);
  y[i] = __uint_as_float((unsigned)bfloat_of(sum) << 16);
}
"""


@pytest.fixture
def cp() -> Any:
    found = pytest.importorskip("cupy", reason="needs CuPy: pip install 'tpkernels[cuda13]' or [cuda12]")
    if not found.cuda.is_available():
        pytest.skip("needs a GPU that CuPy can use")
    return found


def values(rank: int) -> Tensor:
    """A few decades, on the CPU."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(N, generator=generator) * 10 ** torch.randn(N, generator=generator)


def launch(cp: Any, name: str, threads: int, *arguments: Any) -> None:
    """Run a kernel of SOURCE on torch's stream."""
    stream = cp.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream)
    with stream:
        cp.RawKernel(SOURCE, name)(((threads + 127) // 128,), (128,), (*arguments, cp.int32(N)))


def test_tensors_become_arrays_and_arrays_tensors_where_they_are(cp: Any) -> None:
    x = torch.arange(12.0, device="cuda").reshape(3, 4)
    array = cp.from_dlpack(x)
    assert (array.data.ptr, array.shape) == (x.data_ptr(), (3, 4))
    array += 1
    cp.cuda.get_current_stream().synchronize()
    assert x[0, 0].item() == 1.0
    tensor = torch.from_dlpack(cp.arange(5, dtype=cp.float16))
    assert (tensor.dtype, tensor.device.type, tensor.tolist()) == (torch.float16, "cuda", [0, 1, 2, 3, 4])


def test_an_op_works_on_an_array_where_it_is(cp: Any, alone: Group) -> None:
    array = cp.arange(1000, dtype=cp.float32)
    cp.cuda.get_current_stream().synchronize()
    x = torch.from_dlpack(array)
    assert x.data_ptr() == array.data.ptr
    assert ops.all_reduce_(x, group=alone) is x
    alone.check()
    assert cp.from_dlpack(x).data.ptr == array.data.ptr
    assert float(array.sum()) == 999 * 500


def test_the_wire_of_fp16_is_what_another_kernel_makes_of_its_description(cp: Any) -> None:
    x = values(0).cuda()
    got = ops.compress(x, "fp16")
    want = torch.zeros_like(got)
    launch(cp, "encode_fp16", (N + 511) // 512, cp.from_dlpack(x), cp.from_dlpack(want))
    assert torch.equal(got, want)


def test_the_wire_of_bf16_is_what_another_kernel_makes_of_its_description(cp: Any) -> None:
    x = values(0).cuda()
    got = ops.compress(x, "bf16")
    want = torch.zeros_like(got)
    launch(cp, "encode_bf16", N, cp.from_dlpack(x), cp.from_dlpack(want))
    assert torch.equal(got, want)


def reduce_packed(group: Group) -> Tensor:
    return ops.all_reduce(values(group.rank).to(group.device), group=group, codec="bf16").cpu()


def test_the_packed_sum_of_two_ranks_is_what_another_kernel_adds(cp: Any) -> None:
    wires = [ops.compress(values(r).cuda(), "bf16") for r in range(R)]
    want = torch.empty(N, device="cuda")
    launch(cp, "reduce_bf16", N, *map(cp.from_dlpack, wires), cp.from_dlpack(want))
    for y in run_at("virtual", reduce_packed, R, timeout=40.0):
        assert torch.equal(y, want.cpu())
