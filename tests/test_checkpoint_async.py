"""Saving beside the training: what is saved is what was there when the save began."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from checkpoint_tools import adamw, assert_same, grid, learn, small_gpt, whole

from tpkernels import checkpoint, ops
from tpkernels.testing import run_ranks


def train_on(folder: str) -> None:
    root = Path(folder)
    with grid(2, 2) as (cut, replicas):
        both: dict[str, Any] = {"group": cut, "dp_group": replicas}
        model = small_gpt(cut)
        optimizer = adamw(model)
        learn(model, optimizer, range(2))
        checkpoint.save(model, root / "want", optimizer=optimizer, step=2, **both)
        hold, real = threading.Event(), checkpoint.write_tensors

        def held(*args: Any) -> str:
            assert threading.current_thread() is not threading.main_thread()
            hold.wait()
            return real(*args)

        with mock.patch.object(checkpoint, "write_tensors", held):
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
    real = checkpoint.write_tensors

    def noted(path: Path, *args: Any) -> str:
        name = path.parent.name.removeprefix(checkpoint.SAVING)
        events.append(f"begin {name}")
        digest = real(path, *args)
        events.append(f"end {name}")
        return digest

    with mock.patch.object(checkpoint, "write_tensors", noted):
        first = checkpoint.save_async(model, root / "1", **both)
        second = checkpoint.save_async(model, root / "2", **both)
        assert first.done()
        checkpoint.save(model, root / "3", **both)
        assert second.done()
        assert first.wait() == root / "1"
        assert second.wait() == root / "2"
    assert events == [f"{what} {name}" for name in "123" for what in ("begin", "end")]


def test_training_goes_on_and_changes_nothing_of_what_is_being_saved(tmp_path: Path) -> None:
    run_ranks(train_on, 4, str(tmp_path))
    assert_same(whole(tmp_path / "got"), whole(tmp_path / "want"))
    assert checkpoint.peek(tmp_path / "got")["tensors"] == checkpoint.peek(tmp_path / "want")["tensors"]
