"""save, save_async, load, peek, latest, prune: the calls of a program on checkpoints."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tpkernels.checkpoint import background, manifest
from tpkernels.checkpoint.files import MANIFEST, read_manifest, write_manifest, write_tensors
from tpkernels.checkpoint.ranks import CheckpointRanks
from tpkernels.checkpoint.restore import Loaded, restore
from tpkernels.checkpoint.snapshot import Aggregator, Snapshot, take
from tpkernels.checkpoint.staging import StagingFolder, refuse_existing, remove
from tpkernels.comm.group import Group, resolve
from tpkernels.errors import CheckpointError

SaveHandle = background.SaveHandle


def save(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    group: Group | None = None,
    dp_group: Group | None = None,
    pp_group: Group | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    aggregator: Aggregator | None = None,
    own_parameters: bool = False,
    step: int = 0,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint; collective over the group, and over dp_group and pp_group where they are given.

    Args:
        model: cut over the group, or replicated on it.
        folder: the checkpoint's own folder, on a file system that all ranks see; must not exist yet.
        group: over which the model is cut; None means all ranks of the default process group.
        dp_group: the ranks that hold the same part of each replica. Model and optimizer are saved by the first
            replica; random numbers and the aggregator's state by every rank.
        pp_group: the ranks that hold the stages of this replica (`pipeline.take_stages`). Each saves its stages; a
            parameter that several of them have a copy of is saved once.
        optimizer: AdamW, SGD, or any whose state tensors are numbers or have their parameter's shape.
        aggregator: a GradAggregator, for its residuals.
        own_parameters: save parameters and optimizer state of every replica, where replicas differ (mode "local"
            between two averages). With an aggregator only. A `load` with an aggregator gives them back.
        step: returned by `load`; orders the checkpoints for `latest` and `prune`.
        extra: anything that JSON holds, the same on all ranks; returned by `load`.

    Returns:
        the folder; the checkpoint is on the disk and complete.

    Raises:
        CheckpointError: any rank could not write (full disk, no permission, no memory), something cannot be saved
            (named), or the ranks pass different things; the text names the rank. Nothing is left behind.
        PeerLostError: a rank died; the last complete checkpoint is still there.
    """
    ranks, final = CheckpointRanks(resolve(group), dp_group, pp_group), Path(folder)
    snapshot = _snapshot(final, ranks, lambda: take(model, optimizer, aggregator, ranks, step, extra, own_parameters))
    return _write(snapshot, final, ranks)


def save_async(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    group: Group | None = None,
    dp_group: Group | None = None,
    pp_group: Group | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    aggregator: Aggregator | None = None,
    own_parameters: bool = False,
    step: int = 0,
    extra: Mapping[str, Any] | None = None,
) -> SaveHandle:
    """Begin a `save` that goes on beside the training; collective like it.

    When this returns, all tensors are copied (into the memory of the CPU) and may change. A thread writes them, over
    process groups of its own. A save that is still running is waited for first.

    Args:
        model, folder, group, dp_group, pp_group, optimizer, aggregator, own_parameters, step, extra: as for `save`.

    Returns:
        a handle: `wait()` returns the folder when the checkpoint is on the disk and complete.

    Raises:
        CheckpointError: something cannot be saved, or some ranks belong to more process groups than others, so that
            torch can make none for the threads (before the first `save_async`). An error of the thread is raised by
            `wait()` on all ranks, or by the next save where `wait()` was not called.
    """
    ranks = CheckpointRanks(resolve(group), dp_group, pp_group)
    final = Path(folder).absolute()  # the working directory may be another one when the thread writes
    snapshot = _snapshot(
        final, ranks, lambda: take(model, optimizer, aggregator, ranks, step, extra, own_parameters).copied()
    )
    return background.saver.start(lambda apart: _write(snapshot, final, apart), ranks, final)


def load(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    group: Group | None = None,
    dp_group: Group | None = None,
    pp_group: Group | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    aggregator: Aggregator | None = None,
    strict: bool = True,
    convert_dtype: bool = False,
) -> Loaded:
    """Fill model, optimizer and random numbers from a checkpoint; collective like `save`.

    The ranks may be more or fewer than those that saved, and the model may be cut in another way: each rank reads the
    slices that it holds, bit for bit those of the unsharded model. Everything is checked on all ranks before anything
    is changed: an error leaves model, optimizer and aggregator as they were on every rank.

    Random numbers of added ranks: those of rank t modulo tp of replica d modulo dp; see `Source.rng`.

    Args:
        model: to be filled; of the parameters that were saved, cut or not.
        folder: a checkpoint, on a file system that all ranks see.
        group, dp_group, pp_group: as for `save`; each rank reads what its stages hold, however many saved.
        optimizer, aggregator: to be filled, too; with None their saved state is ignored. With an aggregator each
            replica gets its own parameters where they were saved (`own_parameters`), else those of the first.
        strict: whether the model must have the tensors of the checkpoint, no more and no fewer. With False the others
            are loaded, and the result names what is missing and unexpected; shapes must agree all the same, and an
            optimizer must have the parameters that it had.
        convert_dtype: copy tensors into a model of another dtype, rounding to the nearest, as `load_state_dict` does;
            of the optimizer, those that had the dtype of their parameter. Without it another dtype is an error,
            because a resumed run would not be the one that was saved.

    Returns:
        step and extra of the save, and with strict=False the names that only one side has.

    Raises:
        CheckpointError: no checkpoint there, a damaged, missing or foreign file (named), tensors of other names,
            shapes or dtypes than the model has (named), an optimizer or aggregator of other settings.
        PeerLostError: a rank died.
    """
    background.saver.wait(ranks := CheckpointRanks(resolve(group), dp_group, pp_group))
    return restore(model, Path(folder), ranks, optimizer, aggregator, strict=strict, convert_dtype=convert_dtype)


def peek(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of a checkpoint, checked against its own digest; its fields are in tpkernels/checkpoint/manifest.py.

    Args:
        folder: the checkpoint's own.

    Raises:
        CheckpointError: there is none, it is damaged, or it has another format version.
    """
    return manifest.read(folder)


def latest(parent: str | os.PathLike[str]) -> Path | None:
    """The complete checkpoint of the highest step in a folder of checkpoints, or None. Of one step, the last by name.

    A checkpoint with a damaged manifest is skipped with a warning.

    Args:
        parent: the folder in which the checkpoints' own folders are.
    """
    return max(_complete(parent), default=(0, None))[1]


def prune(parent: str | os.PathLike[str], keep: int, spare: str | os.PathLike[str] | None = None) -> None:
    """Remove all complete checkpoints but the `keep` that have the highest steps. Call it on one rank.

    A link, and a folder whose manifest cannot be read, is neither removed nor counted.

    Args:
        parent: the folder in which the checkpoints' own folders are.
        keep: how many stay.
        spare: one that stays in any case, such as the best. It counts among them, but the newest stays, too.

    Raises:
        ValueError: keep is less than 1.
    """
    if keep < 1:
        raise ValueError(f"prune: keep must be 1 or more, got {keep}: to remove all checkpoints, remove the folder")
    folders = [folder for _, folder in sorted(_complete(parent)) if not folder.is_symlink()]
    newest = folders[-keep:]
    spared = None if spare is None else Path(spare).resolve()  # its path may be written in another way
    if others := [folder for folder in folders[:-keep] if folder.resolve() == spared]:
        newest = [*others, *folders[-max(1, keep - 1) :]]
    for folder in folders:
        if folder not in newest:
            remove(folder)


def _complete(parent: str | os.PathLike[str]) -> list[tuple[int, Path]]:
    """Step and folder of each complete checkpoint."""
    found = []
    for folder in (path.parent for path in Path(parent).glob(f"*/{MANIFEST}")):
        if folder.name.startswith("."):
            continue
        try:
            found.append((int(read_manifest(folder)["step"]), folder))
        except (CheckpointError, LookupError, TypeError, ValueError, OverflowError) as error:
            if any(folder.glob("rank-0-of-*")):  # else it is something else that has a manifest
                warnings.warn(f"{folder} is passed over: {error}", stacklevel=3)
    return found


def _snapshot(final: Path, ranks: CheckpointRanks, taken: Callable[[], Snapshot]) -> Snapshot:
    """The snapshot of this rank, once the save before has ended and all ranks agree on what they save.

    Args:
        taken: makes it.

    Raises:
        CheckpointError: on all ranks, before anything is written.
    """
    background.saver.wait(ranks)
    with ranks.together(f"save {final}"):
        if ranks.is_first:
            refuse_existing(final)
        snapshot = taken()
        common = {"folder": final.name, **manifest.common(snapshot)}
    every = ranks.gather(common)
    with ranks.together(f"save {final}"):
        manifest.check_agreement(every, ranks.pp)
    return snapshot


def _write(snapshot: Snapshot, final: Path, ranks: CheckpointRanks) -> Path:
    doing, name = f"save {final}", ranks.file_name
    with ExitStack() as stack:
        staging: StagingFolder | None = None
        with ranks.together(doing):
            staging = stack.enter_context(StagingFolder(final)) if ranks.is_first else None
        folder = final.with_name(ranks.gather(staging.path.name if staging is not None else "")[0])
        part: dict[str, Any] = {}
        with ranks.together(doing):
            digest = write_tensors(folder / name, snapshot.tensors)
            replicas = snapshot.replica_digests() if ranks.tp > 1 else {}
            part = manifest.describe(snapshot, name, digest, replicas)
        every = ranks.gather(part)
        with ranks.together(doing):
            if staging is not None:
                write_manifest(staging.path, manifest.join(every, snapshot, ranks))
                staging.publish()
    return final
