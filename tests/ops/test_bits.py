"""Bits: the same on all ranks, over every transport, for any pieces, in every run; and the exact order of sums."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.harness.ops import FLOATS, assert_same_on_all_ranks, digest
from tests.harness.ranks import nightly
from tpkernels import ops
from tpkernels.comm.group import Group
from tpkernels.shard import part
from tpkernels.testing import run_ranks
from tpkernels.testing.case import Case, Sizes
from tpkernels.testing.cases import CASES

SIZES = [
    Sizes(R=0, M=7, N=5, K=11),
    Sizes(R=0, M=3, N=9, K=40, batch=(2,), dim=1),
    Sizes(R=0, M=130, N=700, K=65, V=1201),
]


def settings(R: int) -> list[tuple[Case, Sizes]]:
    """Every op with every dtype, and with every codec where it takes one."""
    found = []
    for case in CASES:
        for s in SIZES:
            for dtype in FLOATS:
                for codec in ("none", "fp16", "bf16"):
                    if codec == "none" or (dtype != torch.float64 and "codec" in case.options(s)):
                        found.append((case, replace(s, R=R, dtype=dtype, codec=codec)))
    return found


def results(case: Case, s: Sizes, group: Group) -> list[Tensor]:
    """The op's result and gradients on this rank."""
    leaves = [
        x.requires_grad_() if x is not None and x.is_floating_point() else x for x in case.arguments(s, group.rank)
    ]
    y = case.call(s, leaves, group)
    y.backward(case.upstream(s, group.rank))
    return [y.detach(), *(x.grad for x in leaves if x is not None and x.grad is not None)]


def check_replicated_results_are_the_same_on_all_ranks() -> None:
    with Group.open() as group:
        for case, s in settings(group.world_size):
            found = results(case, s, group)
            if case.output_cut(s) is None:
                assert_same_on_all_ranks(group, f"{case.name} {s}", found[0])
            cuts = [c for name, c in case.cuts(s).items() if case.inputs(s)[name] is not None and name not in IDS]
            for gradient, cut in zip(found[1:], cuts, strict=True):
                if cut is None:
                    assert_same_on_all_ranks(group, f"gradient of {case.name} {s}", gradient)


IDS = ("ids", "target")


def digests(transport: str, arena_bytes: int | None) -> list[str]:
    """Of all results on this rank."""
    with Group.open(transport=transport, arena_bytes=arena_bytes) as group:
        return [f"{case.name} {s}: {digest(*results(case, s, group))}" for case, s in settings(group.world_size)]


def check_transports_and_pieces_agree() -> None:
    want = digests("shm", None)
    for transport, arena_bytes in (("shm", None), ("group", None), ("shm", 1 << 18), ("shm", 1 << 20)):
        got = digests(transport, arena_bytes)
        different = [f"{g} instead of {w}" for g, w in zip(got, want, strict=True) if g != w]
        assert not different, f"{transport} with arena_bytes={arena_bytes}: {different[:3]}"


def ordered_sum(parts: list[Tensor]) -> Tensor:
    """The contract in torch: fp32 (fp64 for fp64) in rank order, rounded once."""
    wide = torch.float64 if parts[0].dtype == torch.float64 else torch.float32
    total = parts[0].to(wide)
    for x in parts[1:]:
        total = total + x.to(wide)
    return total


def check_sums_are_taken_in_rank_order_and_rounded_once(transport: str) -> None:
    with Group.open(transport=transport) as group:
        R, rank = group.world_size, group.rank
        for n in (1, 1000, 40_000, 600_000):
            for dtype in FLOATS:
                parts = [torch.randn(n, dtype=torch.float64).mul(10.0**r).to(dtype) for r in range(R)]
                x, total = parts[rank], ordered_sum(parts)
                assert torch.equal(ops.all_reduce(x, group=group), total.to(dtype)), (n, dtype)
                assert torch.equal(ops.reduce_scatter(x, group=group), part(total.to(dtype), 0, R, rank)), (n, dtype)
                average = ops.all_reduce(x, group=group, op="avg")
                assert torch.equal(average, (total / R).to(dtype)) or torch.equal(average, (total * (1 / R)).to(dtype))
            parts = [torch.randn(n).mul(10.0**r) for r in range(R)]
            packed = ordered_sum([x.bfloat16().float() for x in parts]).bfloat16().float()
            assert torch.equal(ops.all_reduce(parts[rank], group=group, codec="bf16"), packed), n


def check_ways_to_the_same_sum() -> None:
    with Group.open() as group:
        for n in (3, 5000, 300_001):
            for dtype in (torch.float32, torch.bfloat16):
                x = torch.randn(n, generator=torch.Generator().manual_seed(group.rank)).to(dtype)
                y = ops.all_reduce(x, group=group)
                shards = ops.reduce_scatter(x, group=group)
                assert torch.equal(ops.all_gather(shards, group=group), y)
                in_place = x.clone()
                assert torch.equal(ops.all_reduce_(in_place, group=group), y)
                strided = torch.stack([x, x], -1)[:, 0]
                assert torch.equal(ops.all_reduce(strided, group=group), y)
                assert torch.equal(ops.all_reduce(x[1:], group=group), y[1:]), "a sum knows only its own element"
                leaf = x.clone().requires_grad_()
                assert torch.equal(ops.all_reduce(leaf, group=group), y), "with a gradient as without"
                called = torch.ops.tpkernels.all_reduce(x, group.name, group.world_size, "sum", "none")
                assert torch.equal(called, y), "the long way as the short one"
                if n * x.itemsize < 1 << 20:
                    inside = group.empty((n,), dtype=dtype).copy_(x)
                    assert torch.equal(ops.all_reduce(inside, group=group), y)
                    assert torch.equal(ops.all_reduce_(inside, group=group), y)


@pytest.mark.parametrize("R", [3, *nightly(2, 4)])
@pytest.mark.parametrize(
    "check",
    [
        check_replicated_results_are_the_same_on_all_ranks,
        check_transports_and_pieces_agree,
        check_ways_to_the_same_sum,
    ],
    ids=lambda check: check.__name__.removeprefix("check_"),
)
def test_bits(check: Callable[[], None], R: int) -> None:
    run_ranks(check, R)


@pytest.mark.parametrize("R", [2, 3, 4])
@pytest.mark.parametrize("transport", ["shm", "group"])
def test_sums_are_taken_in_rank_order_and_rounded_once(transport: str, R: int) -> None:
    run_ranks(check_sums_are_taken_in_rank_order_and_rounded_once, R, transport)


def first_digests() -> list[str]:
    with Group.open() as group:
        s = Sizes(R=dist.get_world_size(), M=33, N=129, K=70, V=500)
        return [digest(*results(case, s, group)) for case in CASES]


def test_another_run_in_other_processes_gives_the_same_bits() -> None:
    assert run_ranks(first_digests, 3, fresh=True) == run_ranks(first_digests, 3, fresh=True)
