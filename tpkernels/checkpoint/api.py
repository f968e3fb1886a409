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
from tpkernels.checkpoint.ranks import Place, file_name
from tpkernels.checkpoint.restore import Loaded, restore
from tpkernels.checkpoint.snapshot import Aggregator, Snapshot, take
from tpkernels.checkpoint.staging import Room, refuse_existing, remove
from tpkernels.comm.group import Group, resolve
from tpkernels.errors import CheckpointError

SaveHandle = background.SaveHandle


def save(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    group: Group | None = None,
    dp_group: Group | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    aggregator: Aggregator | None = None,
    step: int = 0,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint; collective over the group, and over dp_group when there is one.

    Args:
        folder: the checkpoint's own folder, on a file system that all ranks see; must not exist yet.
        group: over which the model is cut.
        dp_group: joins the ranks that hold the same part of other replicas. Model and optimizer are taken from the
            first replica; random numbers and the aggregator's state from every rank.
        optimizer: AdamW, SGD, or any whose state tensors are numbers or have their parameter's shape.
        aggregator: a GradAggregator, for its residuals.
        extra: anything that JSON holds, the same on all ranks; comes back from `load`.

    Returns:
        the folder. When this returns, the checkpoint is on the disk and complete.

    Raises:
        CheckpointError: any rank could not write (full disk, no permission, no memory), something cannot be saved
            (named), or the ranks pass different things; the text names the rank. Nothing is left behind.
        PeerLostError: a rank died; the last complete checkpoint is still there.
    """
    place, final = Place(resolve(group), dp_group), Path(folder)
    snapshot = _snapshot(final, place, lambda: take(model, optimizer, aggregator, place, step, extra))
    return _write(snapshot, final, place)


def save_async(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    group: Group | None = None,
    dp_group: Group | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    aggregator: Aggregator | None = None,
    step: int = 0,
    extra: Mapping[str, Any] | None = None,
) -> SaveHandle:
    """Begin a `save` that goes on beside the training; collective like it, with the same arguments.

    When this returns, all tensors are copied (into the memory of the CPU) and may change. Writing happens in a thread
    that talks to the other ranks over process groups of its own. A save that is still under way is waited for first.

    Returns:
        a handle: `wait()` returns the folder when the checkpoint is on the disk and complete.

    Raises:
        CheckpointError: something cannot be saved, or some ranks belong to more process groups than others, so that
            torch can make none for the threads (before the first `save_async`). What goes wrong in the thread is raised
            by `wait()` on all ranks, or by the next save when nobody waited.
    """
    place, final = Place(resolve(group), dp_group), Path(folder)
    snapshot = _snapshot(final, place, lambda: take(model, optimizer, aggregator, place, step, extra).copied())
    return background.start(lambda talk: _write(snapshot, final, talk), place, final)


def load(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    group: Group | None = None,
    dp_group: Group | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    aggregator: Aggregator | None = None,
    strict: bool = True,
    convert_dtype: bool = False,
) -> Loaded:
    """Fill model, optimizer and random numbers from a checkpoint; collective over the group, and over dp_group.

    The ranks may be more or fewer than those that saved, and the model may be cut in another way: each rank reads the
    slices that it holds, bit for bit those of the unsharded model. Everything is checked on all ranks before anything
    is changed: an error leaves model and optimizer as they were. (An aggregator that was made otherwise refuses on its
    rank; those of others may then have taken their state.)

    Random numbers of ranks that were not there: those of rank t modulo tp of replica d modulo dp; see `Source.rng`.

    Args:
        group, dp_group: as for `save`.
        optimizer, aggregator: to be filled, too; None leaves what was saved of them aside.
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
            shapes or dtypes than the model has (named).
    """
    background.wait_for_pending(place := Place(resolve(group), dp_group))
    return restore(model, Path(folder), place, optimizer, aggregator, strict=strict, convert_dtype=convert_dtype)


def peek(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of a checkpoint, checked against its own digest.

    Raises:
        CheckpointError: there is none, it is damaged, or a newer tpkernels wrote it.
    """
    return manifest.read(folder)


def latest(parent: str | os.PathLike[str]) -> Path | None:
    """The complete checkpoint of the highest step in a folder of checkpoints, or None. Of one step, the last by name.

    A damaged manifest is warned of and passed over.
    """
    return max(_complete(parent), default=(0, None))[1]


def prune(parent: str | os.PathLike[str], keep: int) -> None:
    """Remove all complete checkpoints but the `keep` that have the highest steps. Call it on one rank.

    A folder whose manifest cannot be read is neither removed nor counted.

    Raises:
        ValueError: keep is less than 1.
    """
    if keep < 1:
        raise ValueError(f"prune: keep must be 1 or more, got {keep}: to remove all checkpoints, remove the folder")
    for _, folder in sorted(_complete(parent))[:-keep]:
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


def _snapshot(final: Path, place: Place, taken: Callable[[], Snapshot]) -> Snapshot:
    """Return what is to be saved, once the save before has ended and all ranks are about to save the same.

    Raises:
        CheckpointError: on all ranks, before anything is written.
    """
    background.wait_for_pending(place)
    with place.together(f"save {final}"):
        if place.is_first:
            refuse_existing(final)
        snapshot = taken()
        said = {"folder": final.name, **manifest.common(snapshot)}
    everyone = place.gather(said)
    with place.together(f"save {final}"):
        manifest.check_agreement(everyone)
    return snapshot


def _write(snapshot: Snapshot, final: Path, place: Place) -> Path:
    doing, name = f"save {final}", file_name(place.rank, place.tp, place.replica)
    with ExitStack() as stack:
        room: Room | None = None
        with place.together(doing):
            room = stack.enter_context(Room(final)) if place.is_first else None
        folder = final.with_name(place.gather(room.path.name if room is not None else "")[0])
        said: dict[str, Any] = {}
        with place.together(doing):
            digest = write_tensors(folder / name, snapshot.tensors)
            replicas = snapshot.replica_digests() if place.tp > 1 else {}
            said = manifest.describe(snapshot, name, digest, replicas)
        everyone = place.gather(said)
        with place.together(doing):
            if room is not None:
                write_manifest(room.path, manifest.join(everyone, snapshot, place))
                room.publish()
    return final
