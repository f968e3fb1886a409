"""Ranks that make different calls: every rank gets an error that prints both sides, and the group stays usable."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

import tpkernels as tpk
from tests.harness.ops import raised, run_at
from tests.harness.ranks import DEVICES
from tpkernels import ops
from tpkernels.comm.group import Group
from tpkernels.testing import run_ranks

pytestmark = pytest.mark.usefixtures("nothing_is_left_in_shared_memory")

TRANSPORTS = pytest.mark.parametrize("transport", ["shm", "group"])


def disagreements(rank: int, group: Group) -> dict[str, Callable[[], object]]:
    """Pairs of calls: rank 1 makes another one than the other ranks."""
    odd = rank == 1
    x = torch.ones(6, 4)
    w = torch.ones(3, 4)
    return {
        "length": lambda: ops.all_reduce(torch.ones(5 if odd else 6), group=group),
        "length of large messages": lambda: ops.all_reduce(torch.ones(900_000 - odd), group=group),
        "shape": lambda: ops.all_reduce(x.t() if odd else x, group=group),
        "dtype": lambda: ops.all_reduce(x.bfloat16() if odd else x.half(), group=group),
        "reduction": lambda: ops.all_reduce(x, group=group, op="max" if odd else "sum"),
        "codec": lambda: ops.all_reduce(x, group=group, codec="fp16" if odd else "none"),
        "one in place": lambda: (ops.all_reduce_ if odd else ops.all_reduce)(x.clone(), group=group),
        "collective": lambda: (ops.all_gather if odd else ops.all_reduce)(x, group=group),
        "dim": lambda: ops.reduce_scatter(torch.ones(4, 4), int(odd), group=group),
        "columns of a gather": lambda: ops.all_gather(torch.ones(2, 3 + odd), group=group),
        "size of a gather": lambda: ops.all_gather(torch.ones(2, 3), group=group, dim_size=2 * group.world_size + odd),
        "outputs of a GEMM": lambda: ops.gemm_all_reduce(x, w[1:] if odd else w, group=group),
        "GEMM": lambda: (ops.gemm_reduce_scatter if odd else ops.gemm_all_reduce)(x, w, group=group),
        "gather and GEMM": lambda: ops.all_gather_gemm(torch.ones(2, 4 + odd), torch.ones(3, 4 + odd), group=group),
        "embedding": lambda: ops.vocab_embedding(
            torch.zeros(2, dtype=torch.int64), torch.ones(3, 4 + odd), group=group, vocab_size=3 * group.world_size
        ),
        "width of a norm": lambda: ops.all_reduce_add_rms_norm(
            torch.ones(6, 4 - odd), torch.ones(6, 4 - odd), torch.ones(4 - odd), group=group
        ),
        "sum and norm": lambda: (
            ops.all_reduce(x, group=group) if odd else ops.all_reduce_add_rms_norm(x, x, x[0], group=group)
        ),
        "tokens of a loss": lambda: ops.vocab_cross_entropy(
            torch.ones(2 + odd, 3),
            torch.zeros(2 + odd, dtype=torch.int64),
            group=group,
            vocab_size=3 * group.world_size,
        ),
    }


def check_disagreements(group: Group) -> dict[str, str]:
    R = group.world_size
    texts = {}
    for name, call in disagreements(group.rank, group).items():
        start = time.monotonic()
        texts[name] = raised(lambda call=call: (call(), group.check()), tpk.RankMismatchError)
        assert time.monotonic() - start < 3.0, f"{name}: seen at once, not by a deadline"
        y = ops.all_reduce(torch.ones(1000), group=group)
        assert torch.equal(y, torch.full((1000,), float(R))), f"after {name} the group still works"
    return texts


def assert_both_sides(every: list[dict[str, str]]) -> None:
    """Every rank's error shows what it called and what another one did."""
    R = len(every)
    for rank, texts in enumerate(every):
        for name, text in texts.items():
            if name == "size of a gather" and "brings" in text:
                assert "rank 1" in text or "rank 0" in text
                continue
            sides = re.findall(r"rank (\d) called (\w+\([^)]*\))", text)
            assert len(sides) == 2, f"{name}, rank {rank}: {text}"
            assert "1" in {r for r, _ in sides} or rank != 1, text
            assert f"(rank {rank} of {R}), call " in text, text
    assert "5 values" in every[0]["length"], every[0]["length"]
    assert "6 values" in every[0]["length"]
    assert "bfloat16" in every[0]["dtype"]
    assert "float16" in every[1]["dtype"]
    assert "op max" in every[0]["reduction"]
    assert "op sum" in every[1]["reduction"]
    assert "codec fp16" in every[0]["codec"]
    assert "codec none" in every[1]["codec"]


@TRANSPORTS
@pytest.mark.parametrize("R", [2, 3])
def test_ranks_that_disagree_all_get_an_error_with_both_sides_and_can_go_on(transport: str, R: int) -> None:
    assert_both_sides(run_at("cpu", check_disagreements, R, transport=transport, timeout_s=10.0))


@pytest.mark.parametrize("place", DEVICES)
@pytest.mark.parametrize("R", [2, 3])
def test_devices_that_disagree_all_get_an_error_with_both_sides_and_can_go_on(R: int, place: str) -> None:
    assert_both_sides(run_at(place, check_disagreements, R, timeout_s=10.0))


def check_other_arguments_of_open() -> list[str]:
    rank = dist.get_rank()
    texts = [
        raised(lambda: Group.open(timeout_s=10.0 + rank), ValueError),
        raised(lambda: Group.open(arena_bytes=(1 << 20) * (rank + 1)), ValueError),
        raised(lambda: Group.open(transport="group" if rank else "auto"), ValueError),
    ]
    with Group.open() as group:
        ops.all_reduce(torch.ones(2), group=group)
    return texts


def test_ranks_that_open_a_group_differently_all_get_an_error() -> None:
    for texts in run_ranks(check_other_arguments_of_open, 3):
        assert all("disagree" in text for text in texts), texts
