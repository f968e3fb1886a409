"""Several jobs save into one folder, and what stays of those that died; which checkpoint is the last."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from tpkernels import checkpoint
from tpkernels.checkpoint import staging
from tpkernels.checkpoint.files import read_manifest, write_manifest
from tpkernels.errors import CheckpointError


@contextmanager
def held_back(folder: Path, target: str) -> Iterator[Callable[[], list[str]]]:
    """Another job that saves a model to `folder` and waits before `target`; the value lets it go on: its errors."""
    reached, go, errors = threading.Event(), threading.Event(), list[str]()
    real = getattr(checkpoint.api, target)

    def waits(*args: Any) -> Any:
        if threading.current_thread() is job:
            reached.set()
            go.wait()
        return real(*args)

    def work() -> None:
        try:
            checkpoint.save(linear(1), folder, step=1)
        except CheckpointError as error:
            errors.append(str(error))

    def go_on() -> list[str]:
        go.set()
        job.join()
        return errors

    job = threading.Thread(target=work)
    with mock.patch.object(checkpoint.api, target, waits):
        job.start()
        assert reached.wait(60)
        try:
            yield go_on
        finally:
            go_on()


def linear(seed: int) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(3, 2)


def assert_holds(folder: Path, seed: int) -> None:
    model = linear(99)
    checkpoint.load(model, folder)
    assert torch.equal(model.weight, linear(seed).weight)


@pytest.mark.parametrize("moment", ["write_tensors", "write_manifest"])
def test_a_save_leaves_alone_what_another_job_writes_beside_it(tmp_path: Path, moment: str) -> None:
    with held_back(tmp_path / "other-1", moment) as go_on:
        checkpoint.save(linear(2), tmp_path / "mine-1")
        checkpoint.reshard(tmp_path / "mine-1", tmp_path / "mine-2", tp=2)
        assert go_on() == []
    assert_holds(tmp_path / "other-1", 1)
    assert_holds(tmp_path / "mine-1", 2)
    assert_holds(tmp_path / "mine-2", 2)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("after", ["made", "opened"])
def test_a_save_makes_its_folder_anew_where_another_job_removes_it_before_it_is_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: str
) -> None:
    removed = list[str]()

    def then_removed(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = real(*args, **kwargs)
            if not removed and (left := [path.name for path in tmp_path.glob(f"{staging.SAVING}*")]):
                removed.extend(left)
                staging._remove_left_overs(tmp_path)
                assert not list(tmp_path.glob(".*"))
            return result

        return call

    place, name = (Path, "mkdir") if after == "made" else (os, "open")
    monkeypatch.setattr(place, name, then_removed(getattr(place, name)))
    checkpoint.save(linear(1), tmp_path / "1")
    assert len(removed) == 1
    assert_holds(tmp_path / "1", 1)


@pytest.mark.parametrize("moment", ["write_tensors", "write_manifest"])
def test_of_two_jobs_that_save_under_one_name_one_is_told_and_the_other_is_whole(tmp_path: Path, moment: str) -> None:
    with held_back(tmp_path / "step-1", moment) as go_on:
        checkpoint.save(linear(2), tmp_path / "step-1")
        (error,) = go_on()
    assert "step-1: it exists already" in error
    assert_holds(tmp_path / "step-1", 2)
    assert not list(tmp_path.glob(".*"))


def test_what_is_not_provably_dead_stays_until_its_name_is_saved(tmp_path: Path) -> None:
    elsewhere = tmp_path / ".saving-step-2.0123456789abcdef"  # of another machine
    unlocked = tmp_path / f".saving-step-3.{staging.NO_LOCK}12345678"
    dead = tmp_path / f".saving-step-4.{staging._boot()}12345678"
    old = tmp_path / ".saving-step-5"
    for folder in (elsewhere, unlocked, dead, old):
        folder.mkdir()
    checkpoint.save(linear(1), tmp_path / "step-1")
    assert sorted(tmp_path.glob(".*")) == [elsewhere, unlocked, old]
    for step in (2, 3, 5):
        checkpoint.save(linear(1), tmp_path / f"step-{step}")
    assert not list(tmp_path.glob(".*"))


def test_without_locks_a_save_works_and_removes_nobodys_folder(tmp_path: Path) -> None:
    with mock.patch.object(fcntl, "flock", side_effect=OSError(errno.ENOLCK, "no locks")):
        with held_back(tmp_path / "other-1", "write_manifest") as go_on:
            checkpoint.save(linear(2), tmp_path / "mine-1")
            assert go_on() == []
        assert_holds(tmp_path / "other-1", 1)
        with held_back(tmp_path / "other-2", "write_manifest") as go_on:
            checkpoint.save(linear(2), tmp_path / "other-2")
            (error,) = go_on()
    assert "save" in error and "No such file" in error
    assert_holds(tmp_path / "other-2", 2)


def test_a_kill_in_the_middle_of_prune_leaves_nothing_that_counts_or_stays(tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoint.save(linear(step), tmp_path / f"step-{step}", step=step)
    with mock.patch.object(shutil, "rmtree", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        checkpoint.prune(tmp_path, keep=1)
    assert len(list(tmp_path.glob(".removing-*"))) == 1
    assert checkpoint.latest(tmp_path) == tmp_path / "step-2"
    assert not (tmp_path / "step-1").exists()
    checkpoint.save(linear(3), tmp_path / "step-3")
    assert not list(tmp_path.glob(".*"))


def test_the_last_checkpoint_is_that_of_the_highest_step_whatever_its_name(tmp_path: Path) -> None:
    for step in (9, 10, 11):
        checkpoint.save(linear(step), tmp_path / f"step-{step}", step=step)
    checkpoint.save(linear(0), tmp_path / "zero")
    assert checkpoint.latest(tmp_path) == tmp_path / "step-11"
    checkpoint.prune(tmp_path, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-10", "step-11"]
    for keep in (0, -1):
        with pytest.raises(ValueError, match=rf"prune: keep must be 1 or more, got {keep}"):
            checkpoint.prune(tmp_path, keep=keep)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_step_or_extra_that_would_not_come_back_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    for step in (None, 1.5, "3", True):
        with pytest.raises(CheckpointError, match=rf"step must be a whole number, got {step!r}"):
            checkpoint.save(linear(1), tmp_path / "one", step=step)
    for extra, expected in (
        ({1: 2}, "text for keys, got 1"),
        ({"a": [{None: 1}]}, "keys, got None"),
        ([1], "a mapping"),
    ):
        with pytest.raises(CheckpointError, match=f"extra must .*{expected}"):
            checkpoint.save(linear(1), tmp_path / "one", extra=extra)
    assert not list(tmp_path.iterdir())
    checkpoint.save(linear(1), tmp_path / "one", step=torch.tensor(3), extra={"a": [{"b": 1.5}]})
    loaded = checkpoint.load(linear(1), tmp_path / "one")
    assert (loaded.step, loaded.extra) == (3, {"a": [{"b": 1.5}]})
    manifest = read_manifest(tmp_path / "one")
    (tmp_path / "one" / "manifest.json").unlink()
    write_manifest(tmp_path / "one", manifest | {"step": "three"})
    with pytest.warns(UserWarning, match="is passed over"):
        assert checkpoint.latest(tmp_path) is None


def test_a_folder_whose_manifest_is_damaged_or_not_ours_is_passed_over_and_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.save(linear(step), tmp_path / f"step-{step}", step=step)
    manifest = read_manifest(tmp_path / "step-3")
    (tmp_path / "step-3" / "manifest.json").unlink()
    write_manifest(tmp_path / "step-3", {k: v for k, v in manifest.items() if k != "step"})
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "manifest.json").write_text('{"name": "an app"}')
    with pytest.warns(UserWarning, match=r"step-3 is passed over") as caught:
        assert checkpoint.latest(tmp_path) == tmp_path / "step-2"
        checkpoint.prune(tmp_path, keep=1)
    assert not any("web" in str(w.message) for w in caught)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-2", "step-3", "web"]


@pytest.mark.parametrize(("code", "passes"), [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EIO, False)])
def test_a_folder_that_cannot_be_synced_does_not_fail_a_save_and_a_broken_disk_does(
    tmp_path: Path, code: int, passes: bool
) -> None:
    real = os.fsync

    def fsync(handle: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(code, os.strerror(code))
        real(handle)

    with mock.patch.object(os, "fsync", fsync):
        if passes:
            assert_holds(checkpoint.save(linear(1), tmp_path / "x"), 1)
        else:
            with pytest.raises(CheckpointError, match=os.strerror(code)):
                checkpoint.save(linear(1), tmp_path / "x")
    refused = pytest.raises(CheckpointError, match=os.strerror(code))  # a file that is not synced may be lost
    with mock.patch.object(os, "fsync", side_effect=OSError(code, os.strerror(code))), refused:
        checkpoint.save(linear(1), tmp_path / "y")
    assert not list(tmp_path.glob(".*"))
