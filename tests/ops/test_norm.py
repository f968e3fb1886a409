"""The residual add and RMSNorm after an all-reduce against the unsharded program, on real ranks; the squared norm."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.harness.ops import FLOATS, Drawn, assert_same_on_all_ranks, check_forward, check_gradient, run_at
from tests.harness.ranks import BOTH_TRANSPORTS, Run, on_devices, on_processes, on_ranks
from tpkernels import ops
from tpkernels.comm.group import Group
from tpkernels.testing import run_ranks
from tpkernels.testing.case import Sizes, unit
from tpkernels.testing.cases import ALL_REDUCE_ADD_RMS_NORM

SHAPES = {  # M, N, batch
    "even": (6, 16, ()),
    "uneven": (7, 37, ()),
    "batch": (3, 20, (2, 2)),
    "one": (1, 1, ()),
    "no tokens": (0, 12, ()),
    "no columns": (4, 0, ()),
    "long rows": (3, 1201, ()),
    "many pieces": (301, 1027, ()),
}


def norm_of(total: Tensor, weight: Tensor, eps: float | None = None) -> Tensor:
    return F.rms_norm(total.double(), (total.shape[-1],), weight.double(), eps)


@on_ranks(1, 2, 3, 4, transports=BOTH_TRANSPORTS, devices=(3,))
def check_every_shape_dtype_and_codec(group: Group) -> None:
    for M, N, batch in SHAPES.values():
        for dtype in FLOATS if M < 300 else FLOATS[:2]:
            for codec in ("none", "fp16", "bf16") if dtype != torch.float64 else ("none",):
                s = Sizes(R=group.world_size, M=M, N=N, batch=batch, dtype=dtype, codec=codec)
                found = check_forward(ALL_REDUCE_ADD_RMS_NORM, s, group)
                assert_same_on_all_ranks(group, f"{s}", found)
                if N > 0:
                    check_gradient(ALL_REDUCE_ADD_RMS_NORM, s, group)


@on_ranks(1, 3, devices=(1, 2), exchanging=(3,))
def check_residual_out_is_the_all_reduce_and_the_add(group: Group) -> None:
    """To the bit: the sum is rounded, then the residual is added and rounded."""
    for dtype in FLOATS:
        for codec in ("none", "fp16") if dtype != torch.float64 else ("none",):
            x = Drawn(group, group.rank).randn(65, 300).to(dtype)
            residual, weight = torch.randn(65, 300).to(dtype), torch.randn(300).to(dtype)
            y, total = ops.all_reduce_add_rms_norm(x, residual, weight, group=group, eps=1e-6, codec=codec)
            assert torch.equal(total, ops.all_reduce(x, group=group, codec=codec) + residual), (dtype, codec)
            want = norm_of(total, weight, 1e-6)
            smallest = torch.finfo(dtype).smallest_normal * unit(dtype)  # what fp16's subnormals round
            bound = (2 * unit(dtype) + 40 * unit(torch.float32)) * want.abs() + smallest
            assert float(((y.double() - want).abs() - bound).max()) <= 0, (dtype, codec)


@on_ranks(1, 3, devices=(3,))
def check_any_strides(group: Group) -> None:
    R = group.world_size
    whole = torch.arange(60.0).reshape(6, 10)
    layouts: dict[str, Callable[[Tensor], Tensor]] = {
        "transposed": lambda x: x.t().contiguous().t(),
        "every second": lambda x: torch.stack([x, -x], -1).flatten(-2)[..., ::2],
        "expanded": lambda x: x[:1].expand(6, 10),
        "offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(6, 10),
    }
    for name, layout in layouts.items():
        x = layout(whole + group.rank).requires_grad_()
        residual = layout(whole / 4).requires_grad_()
        weight = torch.stack([whole[0], whole[0]], -1)[:, 0].requires_grad_()
        y, total = ops.all_reduce_add_rms_norm(x, residual, weight, group=group)
        want = layout(whole) * R + R * (R - 1) // 2 + layout(whole / 4)
        assert torch.equal(total, want), name
        torch.testing.assert_close(y.double(), norm_of(want, weight), rtol=1e-6, atol=1e-6)
        y.backward(y.detach().t().contiguous().t())
        assert torch.equal(x.grad, residual.grad), name


@on_ranks(1, 3, devices=(3,))
def check_one_output_alone_has_a_gradient(group: Group) -> None:
    weight = torch.randn(8, requires_grad=True)
    for use in ((1, 0), (0, 1), (1, 1)):
        x = torch.randn(5, 8, requires_grad=True)
        residual = torch.randn(5, 8, requires_grad=True)
        total = (ops.all_reduce(x.detach(), group=group) + residual.detach()).requires_grad_()
        outputs = ops.all_reduce_add_rms_norm(x, residual, weight, group=group, eps=1e-5)
        weight.grad = None
        sum(y.square().sum() for y, used in zip(outputs, use, strict=True) if used).backward()
        scale = weight.detach().clone().requires_grad_()
        plain = (F.rms_norm(total, (8,), scale, 1e-5), total)
        sum(y.square().sum() for y, used in zip(plain, use, strict=True) if used).backward()
        torch.testing.assert_close(x.grad, total.grad)
        torch.testing.assert_close(residual.grad, total.grad)
        assert (weight.grad is None) == (scale.grad is None)
        if scale.grad is not None:
            torch.testing.assert_close(weight.grad, scale.grad)
    frozen = torch.randn(5, 8)
    y, _ = ops.all_reduce_add_rms_norm(frozen, frozen, weight, group=group)
    weight.grad = None
    y.sum().backward()
    assert frozen.grad is None
    assert weight.grad.abs().sum() > 0


@on_ranks(1, 3, devices=(3,))
def check_nan_and_infinity_stay_in_their_row(group: Group) -> None:
    last = group.world_size - 1
    for bad in (math.nan, math.inf):
        for dtype in FLOATS:
            x, residual = torch.ones(4, 40, dtype=dtype), torch.ones(4, 40, dtype=dtype)
            if group.rank == last:
                x[2, 7] = bad
            y, total = ops.all_reduce_add_rms_norm(x, residual, torch.ones(40, dtype=dtype), group=group)
            assert not total[2, 7].isfinite()
            assert y[2, 7].isnan()
            assert y[[0, 1, 3]].isfinite().all()
    zeros = torch.zeros(3, 8)
    y, _ = ops.all_reduce_add_rms_norm(zeros, zeros, torch.ones(8), group=group, eps=1e-6)
    assert torch.equal(y, zeros)


@on_ranks(1, 3)
def check_the_step_of_the_dtype_is_the_default_eps(group: Group) -> None:
    for dtype in FLOATS:
        x = torch.full((2, 4), 1e-4 if group.rank == 0 else 0.0, dtype=dtype)
        y, total = ops.all_reduce_add_rms_norm(x, torch.zeros_like(x), torch.ones(4, dtype=dtype), group=group)
        torch.testing.assert_close(y, F.rms_norm(total, (4,)))


@on_ranks(1, 3, devices=(2,))
def check_autocast_takes_the_widest_dtype(group: Group) -> None:
    x = torch.randn(3, 8, dtype=torch.bfloat16, requires_grad=True)
    residual, weight = torch.randn(3, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    with torch.autocast(group.device.type, dtype=torch.bfloat16):
        y, total = ops.all_reduce_add_rms_norm(x, residual, weight, group=group, eps=1e-5)
    assert y.dtype == total.dtype == torch.float32
    assert torch.equal(total, ops.all_reduce(x.detach().float(), group=group) + residual)
    y.sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert residual.grad.dtype == weight.grad.dtype == torch.float32
    with pytest.raises(ValueError, match="must have the same dtype"):
        ops.all_reduce_add_rms_norm(x, residual, weight, group=group)


@on_ranks(1, 3, devices=(1, 3))
def check_what_lies_in_the_arena(group: Group) -> None:
    make = group.empty if group.transport in ("shm", "peer") else torch.empty
    x = make((30, 40), dtype=torch.float32)
    x.copy_(torch.arange(1200.0).view(30, 40) + group.rank)
    before, residual, weight = x.clone(), torch.ones(30, 40), torch.ones(40)
    inside = ops.all_reduce_add_rms_norm(x, residual, weight, group=group)
    outside = ops.all_reduce_add_rms_norm(before, residual, weight, group=group)
    assert torch.equal(x, before), "x is read only"
    for a, b in zip(inside, outside, strict=True):
        assert torch.equal(a, b)


@on_ranks(2)
def check_one_collective_and_its_bytes(group: Group) -> None:
    sent = {}
    for codec in ("none", "fp16"):
        s = Sizes(R=group.world_size, M=256, N=512, codec=codec)
        group.reset_stats()
        check_forward(ALL_REDUCE_ADD_RMS_NORM, s, group)
        stats = group.stats()
        assert list(stats["by_op"]) == ["all_reduce_add_rms_norm"]
        least = ALL_REDUCE_ADD_RMS_NORM.wire_bytes(s)
        sent[codec] = stats["wire_bytes"]
        assert 0.99 * least <= sent[codec] <= 1.05 * least + 4096
    assert sent["fp16"] < 0.52 * sent["none"]


def many_threads(threads: int) -> tuple[Tensor, ...]:
    torch.set_num_threads(threads)
    try:
        generator = torch.Generator().manual_seed(0)
        x, residual, dy = (torch.randn(700, 129, generator=generator) for _ in range(3))
        weight = torch.randn(129, generator=generator).requires_grad_()
        y, total = ops.all_reduce_add_rms_norm(x.requires_grad_(), residual, weight)
        y.backward(dy)
        return y.detach(), total.detach(), x.grad, weight.grad, ops.squared_norm([x.detach(), dy])
    finally:
        torch.set_num_threads(1)


def check_threads() -> None:
    for one, three in zip(many_threads(1), many_threads(3), strict=True):
        assert torch.equal(one, three)


def test_the_number_of_threads_does_not_change_a_bit() -> None:
    run_ranks(check_threads, 1)


def test_the_squared_norm_keeps_digits_and_range() -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype in FLOATS:
        for scale in (1.0,) if dtype == torch.float16 else (1.0, 1e30, 1e-30):
            tensors = [
                torch.randn(shape, generator=generator).mul(scale).to(dtype)
                for shape in ((), (0,), (7, 3), (70_001,), (1, 2, 5))
            ]
            want = sum(x.double().square().sum() for x in tensors)
            got = ops.squared_norm(tensors)
            assert (got.dtype, got.shape) == (torch.float64, ())
            assert abs(float(got) - float(want)) <= 1e-13 * float(want), (dtype, scale)
    mixed = [torch.full((3,), 2.0), torch.full((4, 5), 0.5, dtype=torch.float16).t()[::2]]
    assert float(ops.squared_norm(mixed)) == 12.0 + 0.25 * 12
    assert float(ops.squared_norm([torch.zeros(0)])) == 0.0
    leaf = torch.ones(3, requires_grad=True)
    assert not ops.squared_norm([leaf]).requires_grad


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_squared_norm_shows_what_is_not_finite(bad: float) -> None:
    for dtype in FLOATS:
        for place in (0, 37, 99_999):
            x = torch.zeros(100_000, dtype=dtype)
            x[place] = bad
            got = ops.squared_norm([torch.ones(5), x])
            assert got.isnan() if math.isnan(bad) else got.isposinf()


@on_ranks(2)
def check_gradients_in_low_precision_keep_their_sum(group: Group) -> None:
    """The gradient of weight is a sum over many tokens: fp32 until its one rounding."""
    s = Sizes(R=group.world_size, M=3000, N=9, dtype=torch.bfloat16)
    check_gradient(ALL_REDUCE_ADD_RMS_NORM, s, group)
    check_gradient(ALL_REDUCE_ADD_RMS_NORM, replace(s, dtype=torch.float32), group)


@on_processes(globals())
def test_sum_add_and_norm_equal_the_unsharded_program(run: Run) -> None:
    run()


@on_devices(globals())
def test_sum_add_and_norm_of_devices_equal_the_unsharded_program(run: Run) -> None:
    run()


def check_large_sums(group: Group) -> None:
    """One kernel moves what one_shot moves, twice the tensor between three ranks; two_shot moves 4 / 3 of it."""
    for M, times in ((16, 2.0), (300, 4 / 3)):
        s = Sizes(R=group.world_size, M=M, N=512)
        group.reset_stats()
        check_forward(ALL_REDUCE_ADD_RMS_NORM, s, group)
        sent = group.stats()["wire_bytes"] / (4 * M * 512)
        assert abs(sent / times - 1) < 0.01, (M, sent)


def test_a_large_sum_on_a_device_is_not_fused_with_the_norm() -> None:
    run_at("emu", check_large_sums, 3)
