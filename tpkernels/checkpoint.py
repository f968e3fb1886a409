"""Save and load a model that is cut over ranks, so that a crash at any moment leaves the last good checkpoint.

A checkpoint is a folder:

    step-00000100/
        rank-0-of-2.safetensors     what rank 0 holds: parameters, buffers, optimizer state, random numbers
        rank-1-of-2.safetensors
        manifest.json               sha-256 of each file; how each tensor is cut; step; optimizer's options; extra

Written into a hidden folder beside it, synced to disk, then renamed: a folder with the final name is complete. There
is no pickle anywhere. A rank that fails makes the call fail on all ranks. Loading checks the digests first.

The manifest says for each tensor the unsharded shape, the cut dimension and the unit of the cut, so that another
number of ranks can be served by slices of these same files.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tpkernels import layers
from tpkernels.ckpt_files import (
    CheckpointError,
    digest_of,
    read_manifest,
    read_tensors,
    sync,
    write_manifest,
    write_tensors,
)
from tpkernels.group import Group, resolve
from tpkernels.ranks import gather, raise_together
from tpkernels.shard import shard_info

VERSION = 1
UNFINISHED = ".saving-"
STYLE_OF: dict[type[nn.Module], str] = {
    layers.ColumnParallelLinear: "column",
    layers.RowParallelLinear: "row",
    layers.VocabParallelEmbedding: "vocab",
}

__all__ = ["CheckpointError", "Loaded", "latest", "load", "peek", "prune", "save"]


@dataclass(frozen=True)
class Loaded:
    """What a checkpoint says besides tensors."""

    step: int
    extra: dict[str, Any]


def save(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    group: Group | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    step: int = 0,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint; collective over the group.

    Args:
        folder: the checkpoint's own folder, on a file system that all ranks see; must not exist yet.
        extra: anything that JSON holds, the same on all ranks; comes back from `load`.

    Returns:
        the folder. When this returns, the checkpoint is on the disk and complete.

    Raises:
        CheckpointError: any rank could not write (full disk, no permission); the text names it. Nothing is left behind
            but an unfinished folder, which the next save removes.
    """
    group = resolve(group)
    final = Path(folder)
    temporary = final.with_name(f"{UNFINISHED}{final.name}")
    name = f"rank-{group.rank}-of-{group.world_size}.safetensors"
    with raise_together(group, CheckpointError, f"save {final}"):
        if group.rank == 0:
            _make_room(final, temporary)
    entry: dict[str, Any] = {}
    with raise_together(group, CheckpointError, f"save {final}"):
        tensors = _tensors(model, optimizer)
        write_tensors(temporary / name, tensors)
        entry = {"file": name, "sha256": digest_of(temporary / name), "tensors": _describe(model, optimizer, tensors)}
    entries = gather(entry, group)
    with raise_together(group, CheckpointError, f"save {final}"):
        if group.rank == 0:
            manifest = {
                "version": VERSION,
                "world_size": group.world_size,
                "step": step,
                "files": {e["file"]: e["sha256"] for e in entries},
                "tensors": _join_descriptions([e["tensors"] for e in entries]),
                "aliases": _aliases(model),
                "optimizer": _numbers(model, optimizer),
                "extra": dict(extra or {}),
            }
            write_manifest(temporary, manifest)
            sync(temporary)
            temporary.rename(final)
            sync(final.parent)
    return final


def load(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    group: Group | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> Loaded:
    """Fill model, optimizer and random numbers from a checkpoint; collective over the group.

    Everything is checked on all ranks before anything is changed: an error leaves model and optimizer as they were.

    Raises:
        CheckpointError: no checkpoint there, another number of ranks, a damaged file (named), tensors of other names,
            shapes or dtypes than the model has (named).
    """
    group = resolve(group)
    folder = Path(folder)
    with raise_together(group, CheckpointError, f"load {folder}"):
        manifest = peek(folder)
        if manifest["world_size"] != group.world_size:
            raise CheckpointError(
                f"it was saved by {manifest['world_size']} ranks and this group has {group.world_size}: "
                f"load it with {manifest['world_size']} ranks"
            )
        tensors = read_tensors(folder, f"rank-{group.rank}-of-{group.world_size}.safetensors", manifest)
        _check_model(model, tensors, manifest)
        if optimizer is not None:
            _check_optimizer(optimizer, manifest)
    _fill(model, tensors)
    if optimizer is not None:
        _fill_optimizer(model, optimizer, tensors, manifest["optimizer"])
    layers.set_rng_state({k.removeprefix("rng/"): v for k, v in tensors.items() if k.startswith("rng/")})
    return Loaded(int(manifest["step"]), dict(manifest["extra"]))


def peek(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of a checkpoint, checked against its own digest.

    Raises:
        CheckpointError: there is none, it is damaged, or a newer tpkernels wrote it.
    """
    manifest = read_manifest(Path(folder))
    if manifest.get("version") != VERSION:
        raise CheckpointError(
            f"{folder} has layout version {manifest.get('version')} and this tpkernels reads {VERSION}: "
            f"use the tpkernels that wrote it"
        )
    return manifest


def latest(parent: str | os.PathLike[str]) -> Path | None:
    """The last complete checkpoint in a folder of checkpoints (by name, so steps need leading zeros), or None."""
    complete = [
        path.parent for path in Path(parent).glob("*/manifest.json") if not path.parent.name.startswith(UNFINISHED)
    ]
    return max(complete, default=None)


def prune(parent: str | os.PathLike[str], keep: int) -> None:
    """Remove all but the last `keep` complete checkpoints. Call it on one rank."""
    complete = sorted(
        p.parent for p in Path(parent).glob("*/manifest.json") if not p.parent.name.startswith(UNFINISHED)
    )
    for folder in complete[:-keep]:
        # Without its manifest a half-removed folder is not taken for a checkpoint.
        (folder / "manifest.json").unlink()
        shutil.rmtree(folder)


def _make_room(final: Path, temporary: Path) -> None:
    if final.exists():
        raise CheckpointError("it exists already: remove it or save under another name")
    final.parent.mkdir(parents=True, exist_ok=True)
    for left in final.parent.glob(f"{UNFINISHED}*"):  # of a save that did not come to its end
        shutil.rmtree(left)
    temporary.mkdir()


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """Everything this rank holds, by its name in the file."""
    aliases = _aliases(model)
    found = {f"model/{k}": v for k, v in model.state_dict().items() if k not in aliases}
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {}) if optimizer is not None else {}
        found |= {f"optimizer/{name}/{key}": value for key, value in state.items() if isinstance(value, Tensor)}
    return found | {f"rng/{key}": value for key, value in layers.rng_state().items()}


def _aliases(model: nn.Module) -> dict[str, str]:
    """Second names of tied tensors, which are saved once: {second name: first name}."""
    first: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    return {name: first[id(t)] for name, t in state.items() if first.setdefault(id(t), name) != name}


def _describe(model: nn.Module, optimizer: torch.optim.Optimizer | None, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """How each tensor is cut. Optimizer state of its parameter's shape is cut like the parameter."""
    state = model.state_dict(keep_vars=True)
    styles = _styles(model)
    described = {}
    for key, tensor in tensors.items():
        kind, _, rest = key.partition("/")
        owner = rest if kind == "model" else rest.rpartition("/")[0]
        like = state.get(owner) if kind != "rng" else None
        info = shard_info(like) if like is not None and like.shape == tensor.shape else None
        described[key] = {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(info.full_shape(tensor) if info else tensor.shape),
            "style": "rank" if kind == "rng" else styles.get(owner, "replicate") if info else "replicate",
            "dim": info.dim if info else None,
            "unit": info.unit if info else 1,
        }
    return described


def _styles(model: nn.Module) -> dict[str, str]:
    """The style of each module's parameters, by parameter name."""
    found = {}
    for prefix, module in model.named_modules():
        for name, _ in module.named_parameters(prefix, recurse=False):
            found[name] = next((style for kind, style in STYLE_OF.items() if isinstance(module, kind)), "replicate")
    return found


def _join_descriptions(described: list[dict[str, Any]]) -> dict[str, Any]:
    for rank, other in enumerate(described[1:], start=1):
        for key in sorted(described[0].keys() | other.keys()):
            if described[0].get(key) != other.get(key):
                raise CheckpointError(
                    f"ranks disagree about {key}: {described[0].get(key)} on rank 0, {other.get(key)} on rank {rank}"
                )
    return described[0]


def _numbers(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any] | None:
    """What the optimizer knows besides tensors: its options, and which parameters each group has."""
    if optimizer is None:
        return None
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [
        {k: v for k, v in g.items() if k != "params"} | {"params": [names[p] for p in g["params"]]}
        for g in optimizer.param_groups
    ]
    return {"class": type(optimizer).__name__, "groups": groups}


def _check_model(model: nn.Module, tensors: dict[str, Tensor], manifest: dict[str, Any]) -> None:
    aliases = manifest["aliases"]
    wanted = {f"model/{k}": v for k, v in model.state_dict().items() if k not in aliases}
    saved = {k for k in tensors if k.startswith("model/")}
    for text, names in (("lacks", wanted.keys() - saved), ("has, and the model lacks,", saved - wanted.keys())):
        if names:
            raise CheckpointError(f"it {text} {_some(names)}: build the model that was saved")
    for key, tensor in wanted.items():
        got = tensors[key]
        if got.shape != tensor.shape or got.dtype != tensor.dtype:
            raise CheckpointError(
                f"{key.removeprefix('model/')} is {got.dtype} {list(got.shape)} in it and "
                f"{tensor.dtype} {list(tensor.shape)} in the model: build the model that was saved"
            )


def _some(names: set[str]) -> str:
    shown = sorted(n.removeprefix("model/") for n in names)
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")


def _check_optimizer(optimizer: torch.optim.Optimizer, manifest: dict[str, Any]) -> None:
    saved = manifest["optimizer"]
    if saved is None:
        raise CheckpointError("it holds no optimizer state: load it without an optimizer")
    if saved["class"] != type(optimizer).__name__:
        raise CheckpointError(
            f"it holds the state of {saved['class']}: load it into that, not into {type(optimizer).__name__}"
        )
    sizes = [len(g["params"]) for g in optimizer.param_groups]
    if sizes != [len(g["params"]) for g in saved["groups"]]:
        raise CheckpointError("its optimizer has other parameter groups: group the parameters as they were")


@torch.no_grad()
def _fill(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    for name, tensor in model.state_dict(keep_vars=True).items():
        if f"model/{name}" in tensors:
            tensor.copy_(tensors[f"model/{name}"])


def _fill_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], saved: dict[str, Any]
) -> None:
    parameters = dict(model.named_parameters())
    for group, numbers in zip(optimizer.param_groups, saved["groups"], strict=True):
        group.update(
            {k: tuple(v) if isinstance(group.get(k), tuple) else v for k, v in numbers.items() if k != "params"}
        )
    optimizer.state.clear()
    for key, tensor in tensors.items():
        kind, _, rest = key.partition("/")
        if kind == "optimizer":
            name, _, field = rest.rpartition("/")
            optimizer.state[parameters[name]][field] = tensor
