"""Export: a plain Hugging Face folder of a model that is cut over ranks, which transformers loads as any other.

Rank 0 gathers and writes one tensor at a time, so that no rank ever holds the model. Where transformers keeps a
parameter in another form than its files (experts fused into one tensor, for example) its own rules convert it back.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tpkernels.checkpoint.files import INDEX, SINGLE, TensorWriter, check_tensors, sync, sync_folder
from tpkernels.checkpoint.ranks import CheckpointRanks
from tpkernels.checkpoint.staging import StagingFolder
from tpkernels.comm.group import Group, resolve
from tpkernels.errors import CheckpointError, PeerLostError
from tpkernels.layers.base import mark_shards
from tpkernels.shard import full_shape, shard_info


def export_hf(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    group: Group | None = None,
    max_shard_bytes: int = 5 << 30,
    tokenizer: Any = None,
    files: Iterable[str | os.PathLike[str]] = (),
) -> Path:
    """Write a plain Hugging Face folder: config, weights in safetensors with an index, tokenizer. Collective.

    Args:
        model: a transformers model, cut by `tpk.parallelize` or not.
        folder: must not exist yet.
        group: over which the model is cut.
        max_shard_bytes: a file holds no more, but for a tensor that is larger alone.
        tokenizer: a tokenizer or processor; its `save_pretrained` adds its files.
        files: more files to copy, such as tokenizer.json.

    Returns:
        the folder, on the disk and complete. `AutoModel.from_pretrained(folder)` gives the unsharded model bit for bit.

    Raises:
        CheckpointError: it is no transformers model, the folder exists, or the disk is full (on all ranks).
    """
    ranks, final = CheckpointRanks(resolve(group)), Path(folder)
    doing, shards = f"export {final}", list[list[Unit]]()
    with ExitStack() as stack:
        staging: StagingFolder | None = None
        with ranks.together(doing):
            if not hasattr(getattr(model, "config", None), "save_pretrained"):
                raise CheckpointError(f"expected a transformers model with a config, got {type(model).__name__}")
            if (stages := getattr(model, "tpk_stages", None)) is not None:
                raise CheckpointError(
                    f"the model has pipeline stages {list(stages.held)} only: save it by `save`, and load that "
                    f"into the whole model"
                )
            shards = _packed(units_of(model), max_shard_bytes)
            if ranks.is_first:
                staging = stack.enter_context(StagingFolder(final))
                _write_texts(model, staging.path, tokenizer, files)
        names = _file_names(len(shards))
        for name, units in zip(names, shards, strict=True):
            _write_shard(model, None if staging is None else staging.path / name, units, ranks, doing)
        with ranks.together(doing):
            if staging is not None:
                if len(names) > 1:
                    _write_index(staging.path, names, shards)
                for path in staging.path.rglob("*"):
                    sync_folder(path) if path.is_dir() else sync(path)
                staging.publish()
    return final


@dataclass(frozen=True)
class Unit:
    """Tensors of the model that become tensors of a file together: mostly one becomes one, of the same name."""

    names: tuple[str, ...]
    outputs: dict[str, tuple[torch.dtype, tuple[int, ...]]]

    @property
    def bytes(self) -> int:
        """Its size in a file."""
        return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in self.outputs.values())


def units_of(model: Any) -> list[Unit]:
    """The units of a model in the order in which they are written: wide dtypes first.

    Raises:
        CheckpointError: a tensor cannot be written, or a unit has several dtypes (named).
    """
    state = _saved_state(model)
    meta = {name: torch.empty(full_shape(t), dtype=t.dtype, device="meta") for name, t in state.items()}
    units = []
    for names in _grouped(model, list(state)):
        turned = _as_in_files(model, {name: meta[name] for name in names})
        outputs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in turned.items()}
        if len({dtype for dtype, _ in outputs.values()}) > 1:
            raise CheckpointError(f"{', '.join(names)} become tensors of several dtypes in a file")
        units.append(Unit(tuple(names), outputs))
    return sorted(units, key=lambda unit: -next(iter(unit.outputs.values()))[0].itemsize)


def _saved_state(model: Any) -> dict[str, Tensor]:
    """The tensors that a file holds: tied ones once, under the name that transformers reads."""
    mark_shards(model)
    state = model.state_dict(keep_vars=True)
    second = set(getattr(model, "all_tied_weights_keys", None) or {})
    kept: dict[int, str] = {}
    check_tensors(state)
    for name, tensor in state.items():
        if id(tensor) not in kept or (kept[id(tensor)] in second and name not in second):
            kept[id(tensor)] = name
    ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
    return {name: state[name] for name in kept.values() if name not in ignored}


def _conversions(model: Any) -> list[Any]:
    """How transformers turned the files' tensors into the model's; those that it would turn back in save_pretrained."""
    used = getattr(model, "_weight_conversions", None)
    if used is not None:
        return list(used)
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    return [c for c in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(c, PrefixChange)]


def _grouped(model: Any, names: list[str]) -> list[list[str]]:
    """The names, together where transformers makes one tensor of a file from several."""
    conversions = _conversions(model)
    if not conversions:
        return [[name] for name in names]
    from transformers.core_model_loading import WeightConverter, apply_converters

    backward = [c.reverse_transform() for c in reversed(conversions)]
    converters = [c for c in backward if isinstance(c, WeightConverter)]
    groups: dict[tuple[bool, str], list[str]] = {}
    for name in names:
        renamed, pattern = apply_converters(name, converters)
        groups.setdefault((pattern is None, name if pattern is None else renamed), []).append(name)
    return list(groups.values())


def _as_in_files(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as transformers keeps them in files."""
    if not _conversions(model):
        return tensors
    from transformers.core_model_loading import revert_weight_conversion

    with full_shapes(model):
        turned: dict[str, Tensor] = revert_weight_conversion(model, tensors)
    return turned


@contextmanager
def full_shapes(model: Any) -> Iterator[None]:
    """Let `get_parameter` of a sharded model give tensors of the full shapes: transformers' conversions go by them."""

    def get_parameter(name: str) -> Tensor:
        parameter: Tensor = type(model).get_parameter(model, name)
        if shard_info(parameter) is None:
            return parameter
        return torch.empty(full_shape(parameter), dtype=parameter.dtype, device="meta")

    model.get_parameter = get_parameter
    try:
        yield
    finally:
        del model.get_parameter


def _packed(units: list[Unit], max_bytes: int) -> list[list[Unit]]:
    """The units of each file, in order."""
    shards: list[list[Unit]] = [[]]
    size = 0
    for unit in units:
        if shards[-1] and size + unit.bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(unit)
        size += unit.bytes
    return shards


def _file_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def _write_texts(model: Any, folder: Path, tokenizer: Any, files: Iterable[str | os.PathLike[str]]) -> None:
    model.config.architectures = [type(model).__name__]
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None and model.can_generate():
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    for file in files:
        shutil.copy(file, folder)


def _write_index(folder: Path, names: Sequence[str], shards: Sequence[Sequence[Unit]]) -> None:
    index = {
        "metadata": {"total_size": sum(unit.bytes for units in shards for unit in units)},
        "weight_map": {
            output: name for name, units in zip(names, shards, strict=True) for unit in units for output in unit.outputs
        },
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _write_shard(model: Any, path: Path | None, units: Sequence[Unit], ranks: CheckpointRanks, doing: str) -> None:
    """Rank 0, which has a path, writes the tensors; errors are raised after the last one, so that no rank waits."""
    problem: Exception | None = None
    with ExitStack() as stack:
        writer: TensorWriter | None = None
        with ranks.together(doing):
            if path is not None:
                layout = {name: kind for unit in units for name, kind in unit.outputs.items()}
                writer = stack.enter_context(TensorWriter(path, layout, {"format": "pt"}))
        state = model.state_dict(keep_vars=True)
        for unit in units:
            try:
                _add(model, writer if problem is None else None, unit, state, ranks)
            except PeerLostError:
                raise
            except Exception as error:
                problem = error
        with ranks.together(doing):
            if problem is not None:
                raise problem
            if writer is not None:
                writer.finish()


def _add(model: Any, writer: TensorWriter | None, unit: Unit, state: dict[str, Tensor], ranks: CheckpointRanks) -> None:
    """Gather the tensors of a unit and write what they become; none of it outlives the call."""
    whole = {name: gathered(state[name], ranks) for name in unit.names}
    if writer is not None:
        for name, tensor in _as_in_files(model, {k: v for k, v in whole.items() if v is not None}).items():
            writer.add(name, tensor)


@torch.no_grad()
def gathered(tensor: Tensor, ranks: CheckpointRanks) -> Tensor | None:
    """The unsharded tensor on rank 0, None on the others. Collective; ranks that hold the same send once.

    Raises:
        CheckpointError: a rank has no memory for it (on all ranks).
        PeerLostError: a rank died.
    """
    info = shard_info(tensor)
    if info is None or ranks.tp == 1:
        return tensor.detach() if ranks.rank == 0 else None
    pg, dim = ranks.group.process_group, info.dim % tensor.dim()
    senders = [r for r in range(ranks.tp) if info.owned_by(r)]
    device = tensor.device if dist.get_backend(pg) != "gloo" else torch.device("cpu")
    parts: dict[int, Tensor] = {}
    with ranks.together("gather a tensor"):  # memory first: no rank sends to one that has none
        if ranks.rank == 0:
            full = torch.empty(info.full_shape(tensor), dtype=tensor.dtype, device=device)
            for rank in senders:
                shape = (*full.shape[:dim], info.sizes[rank], *full.shape[dim + 1 :])
                parts[rank] = tensor.detach() if rank == 0 else torch.empty(shape, dtype=tensor.dtype, device=device)
        elif ranks.rank in senders:
            parts[ranks.rank] = tensor.detach().contiguous().to(device)
    try:
        for rank, part in parts.items():
            if part.numel() and ranks.rank != 0:
                dist.send(part.reshape(-1).view(torch.uint8), group=pg, group_dst=0)
            elif part.numel() and rank != 0:
                dist.recv(part.reshape(-1).view(torch.uint8), group=pg, group_src=rank)
    except RuntimeError as error:
        raise PeerLostError(
            f"a rank of group '{ranks.group.label}' died or left while rank {ranks.rank} of {ranks.tp} gathered a "
            f"tensor ({str(error).splitlines()[0]})"
        ) from None
    if ranks.rank != 0:
        return None
    for rank, part in parts.items():
        info.put(part, rank, full)
    return full
