"""Save and load a model that is cut over ranks, so that a crash at any moment leaves the last good checkpoint.

A checkpoint is a folder:

    step-00000100/
        rank-0-of-2.safetensors     what rank 0 holds: parameters, buffers, optimizer state, random numbers
        rank-1-of-2.safetensors
        manifest.json               sha-256 of each file; how each tensor is cut; step; optimizer's options; extra

Written into a hidden folder beside it, synced to disk, then renamed: a folder with the final name is complete. There
is no pickle anywhere. A rank that fails makes the call fail on all ranks. Loading checks the digests first.

The manifest says for each tensor the unsharded shape and what each rank holds of it, so that any number of ranks, cut
in any way, is served by slices of these same files: `load` takes them directly, `reshard` writes them anew.

The parts: ckpt_files (bytes), ckpt_cuts (how a tensor is cut), ckpt_state (what is saved), ckpt_manifest, ckpt_load,
ckpt_async, ckpt_reshard; ckpt_export writes a plain Hugging Face folder, and hf.py reads one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tpkernels import ckpt_async, ckpt_manifest
from tpkernels.ckpt_export import export_hf
from tpkernels.ckpt_files import MANIFEST, SAVING, CheckpointError, make_room, publish, write_manifest, write_tensors
from tpkernels.ckpt_load import Loaded, restore
from tpkernels.ckpt_place import Place, file_name
from tpkernels.ckpt_reshard import reshard
from tpkernels.ckpt_state import Aggregator, Snapshot, take
from tpkernels.group import Group, resolve

__all__ = [
    "CheckpointError", "Loaded", "SaveHandle", "export_hf", "latest", "load", "peek", "prune", "reshard", "save",
    "save_async",
]  # fmt: skip

SaveHandle = ckpt_async.SaveHandle


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
        CheckpointError: any rank could not write (full disk, no permission); the text names it. Nothing is left behind
            but an unfinished folder, which the next save removes.
        PeerLostError: a rank died; the last complete checkpoint is still there.
    """
    place, final = Place(resolve(group), dp_group), Path(folder)
    ckpt_async.wait_for_pending(place)
    with place.together(f"save {final}"):
        snapshot = take(model, optimizer, aggregator, place, step, extra)
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
    ckpt_async.wait_for_pending(place)
    with place.together(f"save {final}"):
        snapshot = take(model, optimizer, aggregator, place, step, extra).copied()
    return ckpt_async.start(lambda talk: _write(snapshot, final, talk), place, final)


def load(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    group: Group | None = None,
    dp_group: Group | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    aggregator: Aggregator | None = None,
) -> Loaded:
    """Fill model, optimizer and random numbers from a checkpoint; collective over the group, and over dp_group.

    The ranks may be more or fewer than those that saved, and the model may be cut in another way: each rank reads the
    slices that it holds, bit for bit those of the unsharded model. Everything is checked on all ranks before anything
    is changed: an error leaves model and optimizer as they were. (An aggregator that was made otherwise refuses on its
    rank; those of others may then have taken their state.)

    Random numbers of ranks that were not there: those of rank t modulo tp of replica d modulo dp; see `Source.rng`.

    Raises:
        CheckpointError: no checkpoint there, a damaged, missing or foreign file (named), tensors of other names,
            shapes or dtypes than the model has (named).
    """
    ckpt_async.wait_for_pending(place := Place(resolve(group), dp_group))
    return restore(model, Path(folder), place, optimizer, aggregator)


def peek(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of a checkpoint, checked against its own digest.

    Raises:
        CheckpointError: there is none, it is damaged, or a newer tpkernels wrote it.
    """
    return ckpt_manifest.read(folder)


def latest(parent: str | os.PathLike[str]) -> Path | None:
    """The last complete checkpoint in a folder of checkpoints (by name, so steps need leading zeros), or None."""
    return max(_complete(parent), default=None)


def prune(parent: str | os.PathLike[str], keep: int) -> None:
    """Remove all but the last `keep` complete checkpoints. Call it on one rank."""
    for folder in sorted(_complete(parent))[:-keep]:
        # Without its manifest a half-removed folder is not taken for a checkpoint.
        (folder / MANIFEST).unlink()
        shutil.rmtree(folder)


def _complete(parent: str | os.PathLike[str]) -> list[Path]:
    return [path.parent for path in Path(parent).glob(f"*/{MANIFEST}") if not path.parent.name.startswith(".")]


def _write(snapshot: Snapshot, final: Path, place: Place) -> Path:
    temporary, name = final.with_name(f"{SAVING}{final.name}"), file_name(place.rank, place.tp, place.replica)
    with place.together(f"save {final}"):
        if place.is_first:
            make_room(final, temporary, f"{SAVING}*")
    said: dict[str, Any] = {}
    with place.together(f"save {final}"):
        digest = write_tensors(temporary / name, snapshot.tensors)
        replicas = snapshot.replica_digests() if place.tp > 1 else {}
        said = ckpt_manifest.describe(snapshot, name, digest, replicas)
    everyone = place.gather(said)
    with place.together(f"save {final}"):
        if place.is_first:
            write_manifest(temporary, ckpt_manifest.join(everyone, snapshot, place))
            publish(temporary, final)
    return final
