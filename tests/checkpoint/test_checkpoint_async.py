"""Saving beside the training: what is saved is what was there when the save began."""

from __future__ import annotations

import inspect
import re
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tests.harness.checkpoints import adamw, assert_same, grid, learn, small_gpt, whole
from tests.harness.ops import raised
from tpkernels import checkpoint, ops
from tpkernels.checkpoint.staging import SAVING
from tpkernels.comm.group import Group
from tpkernels.comm.objects import global_ranks, private_process_group
from tpkernels.data_parallel.lane import open_lane
from tpkernels.testing import run_ranks


def train_on(folder: str) -> None:
    root = Path(folder)
    with grid(2, 2) as (cut, replicas):
        both: dict[str, Any] = {"group": cut, "dp_group": replicas}
        model = small_gpt(cut)
        optimizer = adamw(model)
        learn(model, optimizer, range(2))
        checkpoint.save(model, root / "want", optimizer=optimizer, step=2, **both)
        hold, real = threading.Event(), checkpoint.api.write_tensors

        def held(*args: Any) -> str:
            assert threading.current_thread() is not threading.main_thread()
            hold.wait()
            return real(*args)

        with mock.patch.object(checkpoint.api, "write_tensors", held):
            handle = checkpoint.save_async(model, root / "got", optimizer=optimizer, step=2, **both)
            # Nothing is written yet, and the training goes on, with collectives of its own.
            learn(model, optimizer, range(2, 5))
            assert ops.all_reduce(torch.ones(3), group=cut).tolist() == [2.0] * 3
            assert not handle.done()
            assert checkpoint.latest(root) == root / "want"
            hold.set()
            assert handle.wait() == root / "got"
        assert handle.done()
        check_order(model, root, both)
        other = small_gpt(cut, seed=7)
        checkpoint.load(other, root / "got", optimizer=adamw(other), **both)


def check_order(model: torch.nn.Module, root: Path, both: dict[str, Any]) -> None:
    """A save, in whichever way, waits for the one before."""
    events: list[str] = []
    real = checkpoint.api.write_tensors

    def noted(path: Path, *args: Any) -> str:
        name = path.parent.name.removeprefix(SAVING).partition(".")[0]
        events.append(f"begin {name}")
        digest = real(path, *args)
        events.append(f"end {name}")
        return digest

    with mock.patch.object(checkpoint.api, "write_tensors", noted):
        first = checkpoint.save_async(model, root / "1", **both)
        second = checkpoint.save_async(model, root / "2", **both)
        assert first.done()
        checkpoint.save(model, root / "3", **both)
        assert second.done()
        assert first.wait() == root / "1"
        assert second.wait() == root / "2"
    assert events == [f"{what} {name}" for name in "123" for what in ("begin", "end")]


def test_a_relative_folder_is_that_of_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, hold, real = torch.nn.Linear(2, 2), threading.Event(), checkpoint.api.write_tensors

    def held(*args: Any) -> str:
        hold.wait()
        return real(*args)

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with mock.patch.object(checkpoint.api, "write_tensors", held):
        handle = checkpoint.save_async(model, "runs/1")
        monkeypatch.chdir(tmp_path / "elsewhere")
        hold.set()
        assert handle.wait() == tmp_path / "runs" / "1"
    assert checkpoint.latest(tmp_path / "runs") == tmp_path / "runs" / "1"
    assert not list((tmp_path / "elsewhere").iterdir())


def test_training_goes_on_and_changes_nothing_of_what_is_being_saved(tmp_path: Path) -> None:
    run_ranks(train_on, 4, str(tmp_path))
    assert_same(whole(tmp_path / "got"), whole(tmp_path / "want"))
    assert checkpoint.peek(tmp_path / "got")["tensors"] == checkpoint.peek(tmp_path / "want")["tensors"]


def save_with_a_group_that_others_lack(folder: str) -> list[str]:
    """Rank 0 has a process group more, so that torch would give those made from here on other names on it."""
    root = Path(folder)
    with grid(2, 2) as (cut, replicas), Group.open(transport="group") as everyone:
        model = small_gpt(cut)
        if dist.get_rank() == 0:
            dist.new_group([0], use_local_synchronization=True)
        both: dict[str, Any] = {"group": cut, "dp_group": replicas}
        errors = [
            raised(lambda: checkpoint.save_async(model, root / "beside", **both), checkpoint.CheckpointError),
            raised(lambda: open_lane(everyone), RuntimeError),
        ]
        checkpoint.save(model, root / "plain", **both)
        if dist.get_rank() != 0:
            dist.new_group([dist.get_rank()], use_local_synchronization=True)
        assert checkpoint.save_async(model, root / "beside", **both).wait() == root / "beside"
        open_lane(everyone).close()
    check_order_of_ranks()
    return errors


def check_order_of_ranks() -> None:
    """A process group may count its ranks in another order than torch's default one does."""
    if "sort_ranks" in inspect.signature(dist.new_group).parameters:
        with Group.open(dist.new_group([1, 3, 0, 2], sort_ranks=False)) as turned:
            own = private_process_group(turned, "test", "a test", "gloo")
            assert global_ranks(turned) == dist.get_process_group_ranks(own) == [1, 3, 0, 2]
            assert dist.get_rank(own) == turned.rank


def test_ranks_of_unequally_many_process_groups_get_an_error_and_do_not_wait_for_ever(tmp_path: Path) -> None:
    for errors in run_ranks(save_with_a_group_that_others_lack, 4, str(tmp_path), timeout=60.0, fresh=True):
        beside, lane = errors
        assert "of replica 0: group 'tp': its saving thread needs a process group of its own" in beside
        assert re.search(r"got \[(\d), (?!\1)\d\] in rank order; create it \(save_async\) before", beside), beside
        assert "group 'world': its lane needs a process group of its own" in lane
        assert "create it (GradAggregator, comm_hook) before" in lane
    assert checkpoint.latest(tmp_path) == tmp_path / "plain"
