"""Loading: everything is checked on all ranks, then each rank reads the slices that it holds."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tpkernels import layers
from tpkernels.ckpt_cuts import read_part
from tpkernels.ckpt_files import CheckpointError
from tpkernels.ckpt_manifest import Source, few, read
from tpkernels.ckpt_place import Place
from tpkernels.ckpt_residuals import Residuals
from tpkernels.ckpt_state import Aggregator, aliases_of
from tpkernels.data_parallel.state import AggregatorState
from tpkernels.layers.base import mark_shards
from tpkernels.shard import Runs, full_shape, shard_info


@dataclass(frozen=True)
class Loaded:
    """What a checkpoint says besides tensors."""

    step: int
    extra: dict[str, Any]


def restore(
    model: nn.Module,
    folder: Path,
    place: Place,
    optimizer: torch.optim.Optimizer | None,
    aggregator: Aggregator | None,
) -> Loaded:
    """See `checkpoint.load`."""
    with place.together(f"load {folder}"):
        source = Source(folder, read(folder))
        source.check_files(place.number, place.tp * place.dp)
    with place.together(f"load {folder}"):
        mark_shards(model)
        targets = _targets(model, source)
        if optimizer is not None:
            _check_optimizer(model, optimizer, source)
        if aggregator is not None:
            cuts = {name: _cut(parameter) for name, parameter in model.named_parameters()}
            state = Residuals(source, place.rank, place.tp, place.replica, place.dp, cuts).state()
        for rank in range(source.tp) if place.tp != source.tp else [place.rank]:
            source.file(rank)
        rng = source.rng(place.rank, place.replica)
    if aggregator is not None:
        with place.together(f"load {folder}"):
            _load_aggregator(aggregator, state)
    if place.is_first and place.tp != source.tp:
        source.warn_of_replicas()
    with torch.no_grad():
        for key, tensor in targets:
            _fill(source, place, key, tensor, _cut(tensor))
    if optimizer is not None:
        _fill_optimizer(model, optimizer, source, place)
    layers.set_rng_state(rng)
    return Loaded(int(source.manifest["step"]), dict(source.manifest["extra"]))


def _targets(model: nn.Module, source: Source) -> list[tuple[str, Tensor]]:
    """Each tensor of the model, with the name under which it was saved; names, shapes and dtypes are checked."""
    saved = {key.removeprefix("model/") for key in source.entries if key.startswith("model/")}
    tied_there, tied_here = source.manifest["aliases"], aliases_of(model)
    state = {name: t for name, t in model.state_dict(keep_vars=True).items() if name not in tied_here}
    for name in tied_here:
        if name in saved:
            raise CheckpointError(f"it holds {name} apart from {tied_here[name]}, and the model ties the two")
    names = {name: tied_there.get(name, name) for name in state}
    for text, some in (
        ("lacks", set(names.values()) - saved),
        ("has, and the model lacks,", saved - set(names.values())),
    ):
        if some:
            raise CheckpointError(f"it {text} {few(some)}: build the model that was saved")
    targets = []
    for name, tensor in state.items():
        key = f"model/{names[name]}"
        entry, shape = source.entries[key], tuple(full_shape(tensor))
        if (entry.dtype, entry.shape) != (tensor.dtype, shape):
            raise CheckpointError(
                f"{name} is {entry.dtype} {list(entry.shape)} in it and "
                f"{tensor.dtype} {list(shape)} in the model: build the model that was saved"
            )
        targets.append((key, tensor))
    return targets


def _check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, source: Source) -> None:
    saved = source.manifest["optimizer"]
    if saved is None:
        raise CheckpointError("it holds no optimizer state: load it without an optimizer")
    if saved["class"] != type(optimizer).__name__:
        raise CheckpointError(
            f"it holds the state of {saved['class']}: load it into that, not into {type(optimizer).__name__}"
        )
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [[names.get(p, "a parameter that the model lacks") for p in g["params"]] for g in optimizer.param_groups]
    there = [g["params"] for g in saved["groups"]]
    if groups != there:
        pairs = zip(chain(*groups), chain(*there), strict=False)
        first = next((f", {here} in place of {name}" for here, name in pairs if here != name), "")
        raise CheckpointError(
            f"its optimizer has other parameter groups (of {list(map(len, there))} parameters, here "
            f"{list(map(len, groups))}{first}): group the parameters as they were"
        )


def _load_aggregator(aggregator: Aggregator, state: AggregatorState) -> None:
    """It checks everything before it changes anything; what does not fit is an error on all ranks."""
    try:
        aggregator.load_state_dict(state)
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def _cut(tensor: Tensor) -> tuple[int | None, Runs]:
    """What this rank holds of a tensor: (dim, runs), or (None, ()) for all of it."""
    info = shard_info(tensor)
    return (None, ()) if info is None else (info.dim % tensor.dim(), info.runs_of(info.rank))


def _fill(source: Source, place: Place, key: str, tensor: Tensor, cut: tuple[int | None, Runs]) -> None:
    """Read this rank's part; the rank's own file comes first where several hold the same."""
    first = place.rank if place.tp == source.tp else 0
    read_part(source.entries[key], source.tp, source.reader(key), *cut, tensor, first)


def _fill_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, source: Source, place: Place) -> None:
    saved, parameters = source.manifest["optimizer"], dict(model.named_parameters())
    on_device: dict[Tensor, bool] = {}
    for group, numbers in zip(optimizer.param_groups, saved["groups"], strict=True):
        for option, value in numbers.items():
            old = group.get(option)
            if option == "params":
                continue
            if isinstance(old, Tensor):
                old.fill_(value)
            else:
                group[option] = tuple(value) if isinstance(old, tuple) else value
        on_device |= {p: bool(group.get("fused") or group.get("capturable")) for p in group["params"]}
    optimizer.state.clear()
    for name, fields in saved.get("state", {}).items():
        optimizer.state[parameters[name]].update(fields)
    for key, entry in source.entries.items():
        kind, _, rest = key.partition("/")
        if kind == "optimizer":
            name, _, field = rest.rpartition("/")
            parameter = parameters[name]
            like = entry.shape == tuple(full_shape(parameter))
            device = parameter.device if like or on_device.get(parameter) or entry.shape else torch.device("cpu")
            shape = parameter.shape if like else torch.Size(entry.shape)
            value = torch.empty(shape, dtype=entry.dtype, device=device)
            _fill(source, place, key, value, _cut(parameter) if like else (None, ()))
            optimizer.state[parameter][field] = value
