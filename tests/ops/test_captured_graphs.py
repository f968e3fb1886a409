"""CUDA graphs on emulated devices: every op and its gradient is captured and replayed on new values, on all ranks.

On GPUs: tests/gpu/test_graphs.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.harness.ops import FLOATS, describe, run_at, there
from tpkernels import ops
from tpkernels._native import _C
from tpkernels.comm.group import Group
from tpkernels.errors import RankMismatchError
from tpkernels.testing.case import Case, Sizes
from tpkernels.testing.cases import ALL_REDUCE_ADD_RMS_NORM, CASES, GEMMS

REPLAYS = 3

# The emulated module's own functions, which the stub of _C does not know.
_emulated: Any = _C
_all_are_here = {R: threading.Barrier(R, timeout=60.0) for R in (2, 3)}


def captured(call: Callable[[], list[Tensor]]) -> tuple[Any, list[Tensor]]:
    """A graph of the call, and its results."""
    _emulated.capture_begin()
    try:
        found = call()
    finally:
        graph = _emulated.capture_end()
    return graph, found


def results(case: Case, s: Sizes, leaves: list[Tensor | None], dys: list[Tensor], group: Group) -> list[Tensor]:
    """The op's results and its gradients. What torch itself computes is not captured here, so ops come without it."""
    known: dict[str, Any] = {"dim_size": s.M, "grad": "reduce"} if case.name == "all_gather" else {}
    known |= {"dim_size": s.M} if case.name == "all_gather_gemm" else {}
    known |= {"vocab_size": s.V} if case.name.startswith("vocab") else {}
    op = ops.all_reduce_add_rms_norm if case is ALL_REDUCE_ADD_RMS_NORM else case.op
    found = op(*leaves, group=group, **{**case.options(s), **known})
    ys = list(found) if isinstance(found, tuple) else [found]
    wanted = [x for x in leaves if x is not None and x.requires_grad]
    return [*(y.detach() for y in ys), *(torch.autograd.grad(ys, wanted, dys) if wanted else ())]


def check_case(case: Case, s: Sizes, group: Group) -> None:
    leaves, dy = there(group, case.arguments(s, group.rank)), case.upstream(s, group.rank)
    dys = [one.clone() for one in dy.unbind()] if case is ALL_REDUCE_ADD_RMS_NORM else [dy.clone()]
    for x in leaves:
        if x is not None and x.is_floating_point():
            x.requires_grad_()

    graph, replayed = captured(lambda: results(case, s, leaves, dys, group))
    assert graph.nodes > 0
    for turn in range(REPLAYS):
        with torch.no_grad():
            for x in leaves:
                if x is not None and x.is_floating_point():
                    x.mul_(-0.5 - turn)
            for dy in dys:
                dy.mul_(0.5)
            for y in replayed:
                y.fill_(7)
        graph.replay()
        called = results(case, s, leaves, dys, group)  # between replays ordinary calls go on
        for i, (a, b) in enumerate(zip(replayed, called, strict=True)):
            assert torch.equal(a, b), f"{describe(case, s)}: result {i}, replay {turn}: off by {(a - b).abs().max()}"


def check_replays(group: Group, name: str) -> None:
    case = next(one for one in CASES if one.name == name)
    R = group.world_size
    for s in (Sizes(R=R, M=13, N=11, K=14, V=19), Sizes(R=R, M=4, N=9, K=10, V=7, batch=(2,), dim=1)):
        for dtype, codec in [*((dtype, "none") for dtype in FLOATS[:2]), (torch.float32, "int8")]:
            if codec == "none" or "codec" in case.options(s):
                for parts in (0, 3) if case in GEMMS else (0,):
                    group._communicator.force(parts=parts)
                    check_case(case, replace(s, dtype=dtype, codec=codec), group)
    group.check()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_op_and_its_gradient_are_replayed_on_new_values(case: Case) -> None:
    run_at("emu", check_replays, 2, case.name)


def check_several_calls(group: Group) -> None:
    """Strides, in place, tensors of the arena, packed wires: in one graph."""
    R, rank = group.world_size, group.rank
    x, heap = torch.zeros(6, 10), group.empty((60,))
    wanted = sum(torch.arange(60.0).view(6, 10) + r for r in range(R))

    def calls() -> list[Tensor]:
        strided = ops.all_reduce(x.t(), group=group)
        ops.all_reduce_(x[:, ::2], group=group)
        ops.all_reduce_(heap, group=group)
        packed = ops.compress(x, "fp16")
        back = ops.decompress(packed, (6, 10), torch.float32, "fp16")
        norm = ops.squared_norm([x, heap])
        return [strided, back, norm]

    before = group.stats()["calls"]
    graph, (strided, back, norm) = captured(calls)
    assert group.stats()["calls"] == before + 3
    for turn in range(REPLAYS):
        _all_are_here[R].wait()  # peers read what is in the arena
        x.copy_(torch.arange(60.0).view(6, 10) + rank)
        heap.fill_(rank + turn)
        graph.replay()
        assert torch.equal(strided, wanted.t()), turn
        assert torch.equal(x[:, ::2], wanted[:, ::2]), turn
        assert torch.equal(x[:, 1::2], (torch.arange(60.0).view(6, 10) + rank)[:, 1::2]), turn
        assert torch.equal(heap, torch.full((60,), float(R * turn + R * (R - 1) // 2))), turn
        assert torch.allclose(back, x, rtol=1e-3), turn
        assert torch.allclose(norm, x.double().square().sum() + heap.double().square().sum()), turn
    assert group.stats()["calls"] == before + 3, "launches pass no counter"
    group.check()


@pytest.mark.parametrize("R", [2, 3])
def test_several_calls_in_one_graph(R: int) -> None:
    run_at("emu", check_several_calls, R)


def check_disagreement(group: Group) -> str:
    x, odd = torch.ones(100), torch.ones(10 + group.rank)
    graph, (y, _) = captured(lambda: [ops.all_reduce(x, group=group), ops.all_reduce(odd, group=group)])
    texts = []
    for _ in range(2):
        y.zero_()
        graph.replay()
        assert torch.equal(y, torch.full((100,), float(group.world_size)))
        with pytest.raises(RankMismatchError) as raised:
            group.check()
        texts.append(str(raised.value))
        group.check()  # told once
    assert "the ranks disagree" in texts[0]
    with pytest.raises(ValueError, match="while a CUDA graph is captured"):
        captured(lambda: [ops.all_reduce(x, group=group), ops.all_gather(odd, group=group)])
    assert torch.equal(ops.all_reduce(x, group=group), y)
    return texts[0]


def test_graphs_that_disagree_are_reported_by_check() -> None:
    run_at("emu", check_disagreement, 2)


def check_a_late_rank(group: Group) -> str:
    x = torch.ones(100)
    graph, (y,) = captured(lambda: [ops.all_reduce(x, group=group)])
    graph.replay()
    assert torch.equal(y, torch.full((100,), float(group.world_size)))
    if group.rank == 1:
        return "late"
    graph.replay()
    with pytest.raises(TimeoutError) as raised:
        group.check()
    with pytest.raises(RuntimeError, match="broken"):
        ops.all_reduce(x, group=group)
    return str(raised.value)


def test_a_rank_that_does_not_launch_its_graph_is_named() -> None:
    first, late, third = run_at("emu", check_a_late_rank, 3, timeout_s=0.7, faulty=True)
    assert late == "late"
    for rank, text in ((0, first), (2, third)):
        assert f"(rank {rank} of 3), call 2: ranks [1] did not signal within 0.7 s" in text, text
