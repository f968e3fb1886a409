"""The kernels of one rank on a GPU, against the CPU bit for bit where promised; small, for compute-sanitizer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.harness.ops import FLOATS, check_forward, check_gradient
from tpkernels import ops
from tpkernels.comm.group import Group
from tpkernels.compress import CODECS
from tpkernels.testing.case import Case, Sizes
from tpkernels.testing.cases import CASES, GEMMS

PACKED = tuple(codec for codec in CODECS if codec != "none")
LENGTHS = (1, 31, 512, 513, 5000)


def values(n: int, dtype: torch.dtype) -> Tensor:
    """On the CPU: a few decades, a NaN block and an infinite one where there is room."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, generator=generator) * 10 ** torch.randn(n, generator=generator)
    if n > 2000:
        x[600], x[1500] = float("nan"), float("inf")
    return x.to(dtype)


def same_bits(got: Tensor, want: Tensor) -> bool:
    """Whether they are, but for what a NaN carries: a GPU's arithmetic makes another NaN than a CPU's."""
    nan = want.isnan()
    got, want = got.cpu(), want.cpu()
    return torch.equal(got.isnan(), nan) and torch.equal(got[~nan].view(torch.uint8), want[~nan].view(torch.uint8))


@pytest.mark.parametrize("codec", PACKED)
@pytest.mark.parametrize("dtype", FLOATS[:3], ids=str)
def test_wires_are_those_of_the_cpu_bit_for_bit(dtype: torch.dtype, codec: str) -> None:
    for n in LENGTHS:
        x = values(n, dtype)
        wire = ops.compress(x, codec)
        assert torch.equal(ops.compress(x.cuda(), codec).cpu(), wire), n
        back = ops.decompress(wire.cuda(), (n,), dtype, codec)
        assert same_bits(back, ops.decompress(wire, (n,), dtype, codec)), n


@pytest.mark.parametrize("codec", PACKED)
def test_error_feedback_keeps_what_the_cpu_keeps(codec: str) -> None:
    for n in LENGTHS:
        x, kept = values(n, torch.float32), torch.linspace(-1, 1, n)
        there = kept.cuda()
        wire = ops.compress_with_feedback(x.cuda(), there, codec, 0.5)
        want = ops.compress_with_feedback(x, kept, codec, 0.5)
        if codec == "bf16":  # the one whose wire holds the NaNs themselves
            assert same_bits(wire.view(torch.bfloat16), want.view(torch.bfloat16)), n
        else:
            assert torch.equal(wire.cpu(), want), n
        assert torch.equal(there.cpu().view(torch.int32), kept.view(torch.int32)), n


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_op_of_one_rank_is_its_unsharded_program(case: Case, alone: Group) -> None:
    dtypes = FLOATS[:3] if case in GEMMS else FLOATS
    for dtype in dtypes:
        s = Sizes(R=1, M=7, N=40, K=24, V=33, dtype=dtype)
        check_forward(case, s, alone)
        check_gradient(case, s, alone)
    check_forward(case, replace(s, M=0, dtype=torch.float32), alone)
    alone.check()


def test_the_squared_norm_is_that_of_the_cpu(alone: Group) -> None:
    for dtype in FLOATS:
        xs = [torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (0, 1, 777, 20_001)]
        want = sum(x.double().square().sum() for x in xs)
        torch.testing.assert_close(ops.squared_norm([x.cuda() for x in xs]).cpu().double(), want, rtol=1e-12, atol=0)
