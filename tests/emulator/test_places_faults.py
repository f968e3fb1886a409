"""Devices that do not come, and what the places themselves promise."""

from __future__ import annotations

import pytest
import torch

from tests.harness import places
from tests.harness.ops import run_at
from tests.harness.places import PLACES
from tests.harness.ranks import nightly
from tpkernels import ops
from tpkernels.comm.group import Group

# --- ranks that do not come


def check_a_rank_that_does_not_come(group: Group, moment: str) -> str:
    """All ranks but the last call; it comes to the end without."""
    x = torch.ones(1000)
    assert ops.all_reduce(x, group=group)[0] == group.world_size
    group.check()
    if group.rank == group.world_size - 1:
        return "late"
    try:
        if moment == "in the call":
            ops.all_reduce(x, group=group)
            group.check()
        elif moment == "in a barrier":
            group.barrier()
        else:
            group.all_gather_ints(3)
    except TimeoutError as error:
        first = str(error)
    with pytest.raises(RuntimeError) as later:
        ops.all_reduce(x, group=group)
        group.check()
    assert "broken" in str(later.value)
    return first


@pytest.mark.parametrize("place", ["emu", "virtual"])
@pytest.mark.parametrize(
    ("R", "moment"),
    [
        (2, "in the call"),
        (3, "in a barrier"),
        (2, "in an exchange"),
        *nightly((3, "in the call"), (2, "in a barrier"), (3, "in an exchange")),
    ],
)
def test_a_device_that_does_not_come_is_named_within_the_deadline(R: int, moment: str, place: str) -> None:
    *texts, late = run_at(place, check_a_rank_that_does_not_come, R, moment, timeout_s=0.7, faulty=True)
    assert late == "late"
    for rank, text in enumerate(texts):
        assert f"ranks [{R - 1}] did not signal within 0.7 s" in text, text
        assert f"(rank {rank} of {R}), call 2" in text, text
        assert "raise Group.open(timeout_s=...)" in text, text


# --- the harness itself


def returns(group: Group, value: str) -> tuple[int, int, str]:
    return group.rank, group.world_size, value


def raises(group: Group) -> None:
    if group.rank == 1:
        raise ValueError("no such luck")


@pytest.mark.parametrize("place", PLACES)
def test_every_place_runs_a_body_once_for_each_rank(place: str) -> None:
    assert run_at(place, returns, 3, "x") == [(0, 3, "x"), (1, 3, "x"), (2, 3, "x")]


@pytest.mark.parametrize("place", PLACES)
def test_every_place_shows_what_each_rank_met(place: str) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)raises failed on .* of 2 ranks.*--- rank 1: .*ValueError: no such"):
        run_at(place, raises, 2)


def test_a_place_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "emulated_module", lambda: None)
    monkeypatch.setattr(places, "obstacle_to_cuda", lambda facts: "there is no driver")
    assert PLACES["cpu"].lacks(4) is None
    assert PLACES["emu"].lacks(4) == "emu needs the emulated module: make emu"
    assert PLACES["virtual"].lacks(4) == "virtual needs a CUDA GPU: there is no driver"
    monkeypatch.setattr(places, "obstacle_to_cuda", lambda facts: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert PLACES["virtual"].lacks(4) is None
    assert PLACES["real"].lacks(2) is None
    assert PLACES["real"].lacks(4) == "real needs 4 GPUs, this machine has 2"
