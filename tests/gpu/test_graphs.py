"""CUDA graphs: every op is captured and replayed on new values, alone and between virtual ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.harness.ops import run_at, there
from tpkernels import ops
from tpkernels.comm.group import Group
from tpkernels.testing.case import Case, Sizes
from tpkernels.testing.cases import CASES

WARM_UPS = 3
_turn = threading.Barrier(2, timeout=60.0)  # of two ranks that are threads of one process


def captured(call: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of the call on the current stream, and its result."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
        y = call()
    return graph, y


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_op_of_one_rank_is_replayed_on_new_values(case: Case, alone: Group) -> None:
    s = Sizes(R=1, M=8, N=40, K=24, V=33)
    options = {"dim_size": s.M} if "gather" in case.name else {}
    with torch.cuda.stream(torch.cuda.Stream()):
        xs = there(alone, case.arguments(s, 0))

        def call() -> Tensor:
            return case.op(*xs, group=alone, **case.options(s), **options)

        for _ in range(WARM_UPS):
            call()
        graph, y = captured(call)
        for turn in range(3):
            for x in xs:
                if x is not None and x.is_floating_point():
                    x.mul_(-0.5 - turn)
            graph.replay()
            torch.testing.assert_close(y, call(), rtol=0, atol=0)
    alone.check()


def check_replays(group: Group) -> None:
    x = torch.full((5000,), group.rank + 1.0, device=group.device)
    for _ in range(WARM_UPS):
        ops.all_reduce(x, group=group)
    torch.cuda.current_stream().synchronize()
    made = []
    for rank in range(2):  # one after the other; nothing spins while a graph is made
        _turn.wait()
        if rank == group.rank:
            made.append(captured(lambda: ops.all_reduce(ops.all_reduce(x, group=group), group=group)))
    graph, y = made[0]
    torch.cuda.current_stream().synchronize()
    _turn.wait()
    for turn in range(20):
        x.fill_(turn + group.rank)
        graph.replay()
        assert y.tolist() == [2.0 * (2 * turn + 1)] * 5000, turn
    z = ops.all_reduce(x, group=group)  # between replays and after them ordinary calls go on
    assert z[0].item() == 2.0 * 19 + 1


def test_two_virtual_ranks_replay_their_graphs() -> None:
    run_at("virtual", check_replays, 2, timeout=60.0)
