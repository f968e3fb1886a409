"""Ranks that are threads with streams of their own, all on one GPU: the kernels over peer memory as the hardware runs
them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.harness.ops import FLOATS, check_forward, check_gradient, place_for, run_at
from tpkernels import RankMismatchError, ops
from tpkernels.comm.group import Group
from tpkernels.testing.case import Sizes
from tpkernels.testing.cases import CASES, COLLECTIVES

PLACE = "virtual"


def inputs(R: int, n: int, dtype: torch.dtype) -> list[Tensor]:
    """Of every rank, the same wherever they are made."""
    found = (torch.randn(n, generator=torch.Generator().manual_seed(r), device="cpu") for r in range(R))
    return [x.to(dtype) for x in found]


def in_rank_order(xs: list[Tensor]) -> Tensor:
    """The sum as it is promised: ranks 0, 1, ... in fp32, rounded once."""
    total = xs[0].float()
    for x in xs[1:]:
        total = total + x.float()
    return total.to(xs[0].dtype)


def check_launch_shapes(group: Group) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for n in (0, 1, 1003, 70_001):
            xs = inputs(group.world_size, n, dtype)
            want, mine = in_rank_order(xs), xs[group.rank].to(group.device)
            for path in ("one_shot", "two_shot"):
                for blocks in (1, 3, 16):
                    group._communicator.force(path=path, blocks=blocks)
                    got = ops.all_reduce(mine, group=group)
                    assert torch.equal(got.cpu(), want), (dtype, n, path, blocks)


@pytest.mark.parametrize("R", [2, 4, 8])
def test_all_reduce_in_every_launch_shape(R: int) -> None:
    run_at(PLACE, check_launch_shapes, R, timeout=40.0)


def check_forwards(group: Group) -> None:
    s = Sizes(R=group.world_size, M=9, N=40, K=24, V=33)
    for dtype in FLOATS[:3]:
        for case in CASES:
            check_forward(case, replace(s, dtype=dtype), group)
    for case in COLLECTIVES:
        for codec in ("fp16", "bf16"):
            check_forward(case, replace(s, M=211, N=1027, codec=codec), group)


@pytest.mark.parametrize("R", [2, 3, 8])
def test_every_op_is_its_unsharded_program(R: int) -> None:
    run_at(PLACE, check_forwards, R, timeout=60.0)


def check_gradients(group: Group) -> None:
    for case in CASES:
        check_gradient(case, Sizes(R=group.world_size, M=9, N=40, K=24, V=33), group)


@pytest.mark.parametrize("R", [2, 3])
def test_every_gradient_is_that_of_the_unsharded_program(R: int) -> None:
    run_at(PLACE, check_gradients, R, timeout=60.0)


def check_in_the_heap(group: Group) -> None:
    xs = inputs(group.world_size, 10_000, torch.float32)
    x = group.empty(10_000)
    for turn in range(6):  # both slots, and what lies in the heap is overwritten between calls
        x.copy_(xs[group.rank] * (turn + 1))
        assert ops.all_reduce_(x, group=group) is x
        assert torch.equal(x.cpu(), in_rank_order([y * (turn + 1) for y in xs])), turn


@pytest.mark.parametrize("R", [2, 4])
def test_what_lies_in_the_heap_is_reduced_where_it_is(R: int) -> None:
    run_at(PLACE, check_in_the_heap, R, timeout=30.0)


def check_disagreement(group: Group) -> str:
    text = ""
    try:
        ops.all_reduce(torch.ones(4 + group.rank, device=group.device), group=group)
        group.check()
    except RankMismatchError as error:
        text = str(error)
    y = ops.all_reduce(torch.ones(5, device=group.device), group=group)
    assert y.tolist() == [float(group.world_size)] * 5
    return text


def test_ranks_that_disagree_are_told_and_go_on() -> None:
    for text in run_at(PLACE, check_disagreement, 2, timeout=30.0):
        assert "all_reduce" in text, text


def wait_in_vain(group: Group) -> str:
    if group.rank == 0:
        try:
            ops.all_reduce(torch.ones(4, device=group.device), group=group)
            group.check()
        except TimeoutError as error:
            return str(error)
    return ""


def test_a_rank_that_does_not_come_is_named_within_the_deadline() -> None:
    waiting, _ = place_for(PLACE, 2).outcomes(wait_in_vain, 2, timeout=30.0, faulty=True, timeout_s=1.0)
    assert "ranks [1] did not signal within 1 s" in str(waiting.value or waiting.error), waiting
