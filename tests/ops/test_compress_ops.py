"""Packing outside collectives: what is unpacked, what error feedback keeps, how many bytes there are."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from tests.harness.ops import assert_within
from tpkernels import ops
from tpkernels._native import _C
from tpkernels.compress import CODECS, bytes_per_value, wire_bytes
from tpkernels.testing.case import CODEC_FLOOR, CODEC_ROUNDING, unit

PACKED = tuple(codec for codec in CODECS if codec != "none")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LENGTHS = (0, 1, 31, 511, 512, 513, 5000, 200_001)


def values(n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Most within a few decades of one."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, generator=generator) * 10 ** torch.randn(n, generator=generator)).to(dtype)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_what_was_packed_is_unpacked_within_the_bound_of_the_codec(dtype: torch.dtype, codec: str) -> None:
    for n in LENGTHS:
        x = values(n, dtype)
        wire, largest = ops.compress(x, codec), float(x.abs().max() if n else 0)
        assert (wire.dtype, wire.shape) == (torch.uint8, (wire_bytes(codec, n, x.itemsize),))
        for into in FLOATS if codec != "none" else (dtype,):
            back = ops.decompress(wire, (n,), into, codec)
            smallest = torch.finfo(into).smallest_normal * unit(into) + CODEC_FLOOR[codec] * largest
            bound = (CODEC_ROUNDING[codec] + unit(into)) * x.double().abs() + smallest
            assert_within(back, x.double(), torch.zeros(()) if codec == "none" else bound, f"{n} {dtype} {into}")


def test_none_gives_the_bytes_of_any_dtype() -> None:
    for dtype in (torch.int64, torch.bool, torch.complex64, torch.float64, torch.float8_e4m3fn):
        x = (torch.arange(60) % 2).reshape(5, 12).to(dtype)
        wire = ops.compress(x, "none")
        assert torch.equal(wire, x.reshape(-1).view(torch.uint8))
        back = ops.decompress(wire, x.shape, dtype, "none")
        assert torch.equal(back.view(torch.uint8), x.view(torch.uint8))


@pytest.mark.parametrize("codec", PACKED)
def test_the_bytes_are_those_of_a_long_message(codec: str) -> None:
    n = 512 * 100
    assert ops.compress(values(n), codec).numel() == wire_bytes(codec, n) == n * bytes_per_value(codec)
    for n in range(1, 1100, 7):
        assert ops.compress(values(n), codec).numel() == wire_bytes(codec, n)


@pytest.mark.parametrize("codec", CODECS)
def test_any_strides_give_the_bytes_of_the_contiguous_tensor(codec: str) -> None:
    x = values(6 * 700).view(6, 700)
    for view in (x.t(), x[:, ::3], x[:1].expand(4, 700), x[2]):
        assert torch.equal(ops.compress(view, codec), ops.compress(view.contiguous(), codec))
        kept, again = torch.full(view.shape, 0.25), torch.full(view.shape, 0.25)
        wire = ops.compress_with_feedback(view, kept, codec, 0.5)
        assert torch.equal(wire, ops.compress_with_feedback(view.contiguous(), again, codec, 0.5))
        assert torch.equal(kept, again)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_residual_and_message_are_the_value_to_the_bit(dtype: torch.dtype, codec: str) -> None:
    for n, scale in product(LENGTHS, (1.0, 1.0 / 3.0)):
        x, residual = values(n, dtype), values(n, seed=1) * 1e-3
        want = torch.tensor(scale) * x.float() + residual
        wire = ops.compress_with_feedback(x, residual, codec, scale)
        # Codec none sends the dtype of x; the others are unpacked into fp32 without another rounding.
        sent = ops.decompress(wire, (n,), dtype if codec == "none" else torch.float32, codec).float()
        assert torch.equal(sent + residual, want), (n, scale)
        if codec != "none":
            assert torch.equal(wire, ops.compress(want, codec)), (n, scale)


@pytest.mark.parametrize("codec", PACKED)
def test_error_feedback_loses_nothing_over_a_hundred_steps(codec: str) -> None:
    n, steps = 3000, 100
    residual, sent, exact, plain = torch.zeros(n), *(torch.zeros(n, dtype=torch.float64) for _ in range(3))
    for step in range(steps):
        gradient = values(n, seed=step) * 1e-3
        exact += gradient.double()
        wire = ops.compress_with_feedback(gradient, residual, codec)
        sent += ops.decompress(wire, (n,), torch.float32, codec).double()
        plain += ops.decompress(ops.compress(gradient, codec), (n,), torch.float32, codec).double()
    # What is still owed is one message's rounding; each step adds a rounding of fp32.
    largest = 1.0 + float(residual.abs().max())
    off = (sent + residual.double() - exact).abs().max()
    assert float(off) <= steps * unit(torch.float32) * largest
    assert float((sent - exact).norm()) < 0.3 * float((plain - exact).norm()), "without feedback the errors add up"


def test_a_value_below_the_smallest_step_arrives_in_the_end() -> None:
    """A thousandth of the last place of what it is added to: rounding alone would never send it."""
    x, residual, total = torch.full((512,), 1.0 + 2.0**-12), torch.zeros(512), torch.zeros(512, dtype=torch.float64)
    for _ in range(64):
        wire = ops.compress_with_feedback(x, residual, "bf16")
        total += ops.decompress(wire, (512,), torch.float32, "bf16")
    assert abs(float(total[0]) - 64 * (1.0 + 2.0**-12)) <= 2.0**-8
    assert float(ops.decompress(ops.compress(x, "bf16"), (512,), torch.float32, "bf16")[0]) == 1.0


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_is_seen_and_forgotten(codec: str, bad: float) -> None:
    x, residual = values(2000), values(2000, seed=3) * 1e-3
    before = residual.clone()
    x[700] = bad
    wire = ops.compress_with_feedback(x, residual, codec)
    back = ops.decompress(wire, (2000,), torch.float32, codec)
    assert not back[700].isfinite(), "loss scaling must see it"
    assert residual.isfinite().all(), "but it must not stay in what is kept"
    untouched = ~back.isfinite()
    assert torch.equal(residual[untouched], before[untouched])
    again = ops.decompress(ops.compress_with_feedback(values(2000), residual, codec), (2000,), torch.float32, codec)
    assert again.isfinite().all()


@pytest.mark.parametrize("codec", PACKED)
@pytest.mark.parametrize("dtype", FLOATS)
def test_plain_tensors_are_packed_past_the_dispatcher_to_the_bytes_of_the_op(dtype: torch.dtype, codec: str) -> None:
    call = torch.ops.tpkernels
    for shape in ((), (1,), (0,), (3, 0, 2), (6, 700), (70_001,)):
        x, kept = values(math.prod(shape), dtype).view(shape), torch.full(shape, 0.25)
        again, wire = kept.clone(), call.compress(x, codec)
        for found in (ops.compress(x, codec), _C.fast_compress(x, codec), _C.fast_compress(x.requires_grad_(), codec)):
            assert torch.equal(found, wire) and (found.dtype, found.requires_grad) == (torch.uint8, False)
        x.requires_grad_(False)
        for into, sizes in product(FLOATS, (shape, list(shape), torch.Size(shape))):
            want, back = call.decompress(wire, list(shape), into, codec), _C.fast_decompress(wire, sizes, into, codec)
            assert torch.equal(back, want) and (back.dtype, back.shape) == (into, shape)
        fast = _C.fast_compress_with_feedback(x, kept, codec, 0.5)
        assert torch.equal(fast, call.compress_with_feedback(x, again, codec, 0.5)) and torch.equal(kept, again)


class Named(Tensor):
    """A subclass."""


def test_what_is_not_plain_is_left_to_the_op() -> None:
    x, kept = values(64), torch.zeros(64)
    wire = ops.compress(x, "int8")
    others = (
        x[::2], x.view(8, 8).t(), x.double(), x.int(), x.to("meta"), x.to_sparse(), x.as_subclass(Named),
        torch._neg_view(x), torch._efficientzerotensor(64), 3,
    )  # fmt: skip
    for other in others:
        assert _C.fast_compress(other, "int8") is None and _C.fast_decompress(other, (64,), x.dtype, "int8") is None
        assert _C.fast_compress_with_feedback(other, kept, "int8", 1.0) is None
        assert _C.fast_compress_with_feedback(x, other, "int8", 1.0) is None
    for codec in ("none", "zip", 3, None):
        assert _C.fast_compress(x, codec) is None and _C.fast_decompress(wire, (64,), x.dtype, codec) is None
    assert _C.fast_compress_with_feedback(x, kept.requires_grad_(), "int8", 1.0) is None
    for shape in ((65,), (-64,), (-8, -8), (64.0,), (True, 64), 64, (2**40, 2**40, 0)):
        assert _C.fast_decompress(wire, shape, x.dtype, "int8") is None, shape
    for dtype in (torch.float64, torch.int32, "float32"):
        assert _C.fast_decompress(wire, (64,), dtype, "int8") is None
    with torch.profiler.profile() as profile:
        ops.decompress(ops.compress(x, "int8"), (64,), x.dtype, "int8")
    assert {"tpkernels::compress", "tpkernels::decompress"} <= {event.key for event in profile.key_averages()}


def test_the_residual_counts_as_changed() -> None:
    residual = torch.zeros(4)
    before = residual._version
    ops.compress_with_feedback(torch.ones(4), residual, "bf16")
    assert residual._version > before
    leaf = torch.ones(4, requires_grad=True)
    assert not ops.compress(leaf, "fp16").requires_grad
    assert not ops.compress_with_feedback(leaf, residual, "fp16").requires_grad


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_packing_compiles_into_one_graph(backend: str) -> None:
    def step(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        wire = ops.compress_with_feedback(x * 2, residual, "fp16", 0.5)
        return ops.decompress(wire, x.shape, torch.float32, "fp16") + 1, ops.squared_norm([x, residual])

    torch._dynamo.reset()
    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=True)
    for n in (700, 701, 1300):
        x, kept, again = values(n), torch.ones(n), torch.ones(n)
        for got, want in zip(compiled(x, kept), step(x, again), strict=True):
            torch.testing.assert_close(got, want)
        assert torch.equal(kept, again)


def test_the_number_of_threads_does_not_change_a_byte() -> None:
    x, threads, found = values(300_001), torch.get_num_threads(), []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            residual = torch.zeros_like(x)
            wire = ops.compress_with_feedback(x, residual, "fp16")
            found.append((wire, residual, ops.compress(x, "fp16"), ops.decompress(wire, x.shape, x.dtype, "fp16")))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_wire_bytes_of_an_unknown_codec() -> None:
    with pytest.raises(ValueError, match=r"wire_bytes: codec must be one of .*, got 'zip'"):
        wire_bytes("zip", 3)
