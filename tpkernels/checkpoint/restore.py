"""Loading: all ranks check everything, then each rank reads the slices that it holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tpkernels import layers
from tpkernels.checkpoint.files import check_tensors
from tpkernels.checkpoint.manifest import Source, read
from tpkernels.checkpoint.ranks import CheckpointRanks
from tpkernels.checkpoint.regions import ranks_read, read_part
from tpkernels.checkpoint.replicas import check_own, fill_own, without_own_parameters
from tpkernels.checkpoint.residuals import Residuals
from tpkernels.checkpoint.snapshot import Aggregator, aliases_of, copies_of
from tpkernels.data_parallel.flat import flat_shard, local_of, stepped
from tpkernels.data_parallel.state import AggregatorState
from tpkernels.errors import CheckpointError, shorten
from tpkernels.layers.base import mark_shards
from tpkernels.optimizers import mark_part, needs_whole_tensors
from tpkernels.shard import Runs, full_shape, shard_info


@dataclass(frozen=True)
class Loaded:
    """The result of `checkpoint.load` besides tensors.

    Attributes:
        step, extra: as they were saved.
        missing: tensors of the model that the checkpoint lacks; they are unchanged. Only with strict=False.
        unexpected: tensors of the checkpoint that the model lacks. Only with strict=False.
    """

    step: int
    extra: dict[str, Any]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()


def restore(
    model: nn.Module,
    folder: Path,
    ranks: CheckpointRanks,
    optimizer: torch.optim.Optimizer | None,
    aggregator: Aggregator | None,
    *,
    strict: bool,
    convert_dtype: bool,
) -> Loaded:
    """See `checkpoint.load`."""
    with ranks.together(f"load {folder}"):
        source = Source(folder, read(folder))
        source.check_files(ranks.number, ranks.tp * ranks.dp * ranks.pp)
        mark_shards(model)
        here = set(_saved_names(model, source).values())
    every = here if ranks.pp == 1 else set().union(*ranks.gather(here))
    with ranks.together(f"load {folder}"):
        targets, missing, unexpected = _targets(model, source, every, strict, convert_dtype)
        wanted = {key: _cut(tensor) for key, tensor in targets}
        if optimizer is not None:
            wanted |= _check_optimizer(model, optimizer, source)
        if aggregator is not None:
            state, own = _check_aggregator(model, aggregator, source, ranks)
        _open_files(source, ranks, wanted)
        rng = source.rng(ranks.rank, ranks.replica, ranks.stage)
        _check_rng(rng)
    if ranks.is_first and ranks.tp != source.tp:
        source.warn_of_replicas()
    with ranks.together(f"load {folder} (all of it fits, but it could not be read to the end; model is half loaded)"):
        with torch.no_grad():
            for key, tensor in targets:
                _fill(source, ranks, key, tensor, wanted[key])
        if optimizer is not None:
            _fill_optimizer(model, optimizer, source, ranks)
        if aggregator is not None:
            aggregator.load_state_dict(state)
            fill_own(own, model, optimizer)
        layers.set_rng_state(rng)
    return Loaded(int(source.manifest["step"]), dict(source.manifest["extra"]), missing, unexpected)


def _saved_names(model: nn.Module, source: Source) -> dict[str, str]:
    """The name under which each tensor of the model was saved; of tied ones the first."""
    tied_there, tied_here, copies = source.manifest["aliases"], aliases_of(model), copies_of(model)
    names = (name for name in model.state_dict() if name not in tied_here)
    return {name: tied_there.get(name, copies.get(name, name)) for name in names}


def _targets(
    model: nn.Module, source: Source, every: set[str], strict: bool, convert_dtype: bool
) -> tuple[list[tuple[str, Tensor]], tuple[str, ...], tuple[str, ...]]:
    """Each tensor of the model to fill, with the name under which it was saved; the names missing, and unexpected.

    Args:
        every: the saved names of the tensors of all stages of the model.
        model, source, strict, convert_dtype: as in `restore`.
    """
    saved = {key.removeprefix("model/") for key in source.entries if key.startswith("model/")}
    tied_here = aliases_of(model)
    state = {name: t for name, t in model.state_dict(keep_vars=True).items() if name not in tied_here}
    check_tensors({name: local_of(tensor) for name, tensor in state.items()})
    for name, first in (tied_here | copies_of(model)).items():
        if name in saved and name != first:
            raise CheckpointError(f"it holds {name} apart from {first}, and the model ties the two")
    names = _saved_names(model, source)
    missing = sorted(name for name in state if names[name] not in saved)
    unexpected = sorted(saved - every)
    for text, some in (("lacks", missing), ("has, and the model lacks,", unexpected)):
        if some and strict:
            raise CheckpointError(f"it {text} {shorten(some)}: build the model that was saved, or pass strict=False")
    targets = []
    for name in [name for name in state if names[name] in saved]:
        entry, tensor = source.entries[f"model/{names[name]}"], state[name]
        shape = tuple(full_shape(tensor))
        if entry.shape != shape or (entry.dtype != tensor.dtype and not convert_dtype):
            hint = ", or pass convert_dtype=True" if entry.shape == shape else ""
            raise CheckpointError(
                f"{name} is {entry.dtype} {list(entry.shape)} in it and "
                f"{tensor.dtype} {list(shape)} in the model: build the model that was saved{hint}"
            )
        if (why := _not_writable(local_of(tensor))) is not None:
            raise CheckpointError(f"{name} of the model cannot be filled: {why}")
        targets.append((f"model/{names[name]}", tensor))
    return targets, tuple(missing), tuple(unexpected)


def _open_files(source: Source, ranks: CheckpointRanks, wanted: Mapping[str, tuple[int | None, Runs]]) -> None:
    """Open and check the files from which these tensors are read."""
    stages = {source.entries[key].stage for key in wanted}
    read_from = {(stage, ranks.rank) for stage in stages}
    if ranks.tp != source.tp:
        read_from = {(stage, rank) for stage in stages for rank in range(source.tp)}
    first = source.first_rank(ranks.rank, ranks.tp)
    for key, (dim, runs) in wanted.items():
        entry = source.entries[key]
        read_from |= {(entry.stage, rank) for rank in ranks_read(entry, source.tp, dim, runs, first)}
    cut = {source.entries[key].stage for key in wanted if source.entries[key].flat is not None}
    for stage, rank in sorted(read_from):
        for replica in range(source.dp if stage in cut else 1):
            source.file(rank, replica, stage)


def _check_rng(rng: dict[str, Tensor]) -> None:
    try:
        for device, state in rng.items():
            if device == "cpu" or torch.cuda.is_available():
                torch.Generator(device).set_state(state)
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(f"its random numbers are of another torch, or none: {error}") from None


def _check_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, source: Source
) -> dict[str, tuple[int | None, Runs]]:
    """Check that its state fits; the part of each of its tensors that this rank reads."""
    saved = source.manifest["optimizer"]
    if saved is None:
        raise CheckpointError("it holds no optimizer state: load it without an optimizer")
    if saved["class"] != type(optimizer).__name__:
        raise CheckpointError(
            f"it holds the state of {saved['class']}: load it into that, not into {type(optimizer).__name__}"
        )
    names = {stepped(parameter): name for name, parameter in model.named_parameters()}
    groups = [[names.get(p, "a parameter that the model lacks") for p in g["params"]] for g in optimizer.param_groups]
    there = [g["params"] for g in saved["groups"]]
    if getattr(model, "tpk_stages", None) is not None:  # of the saved parameters those of this stage, and its copies
        copies = copies_of(model)
        groups = [[copies.get(name, name) for name in names] for names in groups]
        there = [[name for name in names if name in set(chain(*groups))] for names in there]
    if list(map(set, groups)) != list(map(set, there)):
        pairs = zip(chain(*groups), chain(*there), strict=False)
        first = next((f", {here} in place of {name}" for here, name in pairs if here != name), "")
        raise CheckpointError(
            f"its optimizer has other parameter groups (of {list(map(len, there))} parameters, here "
            f"{list(map(len, groups))}{first}): group the parameters as they were"
        )
    for group, numbers in zip(optimizer.param_groups, saved["groups"], strict=True):
        for option, value in numbers.items():
            if option in group and option != "params" and not _fits(group[option], value):
                raise CheckpointError(f"its optimizer has {option}={value!r}, and here it is {group[option]!r}")
    known = set(chain(*(g["params"] for g in saved["groups"])))
    keys = [key for key in source.entries if key.startswith("optimizer/")]
    if strange := (set(saved.get("state", {})) | {_parameter_of(key) for key in keys}) - known:
        raise CheckpointError(f"it holds optimizer state of {shorten(sorted(strange))}, which its optimizer has not")
    parameters, cuts = _by_saved_name(model), {}
    for key in keys:
        if _parameter_of(key) not in parameters:
            continue  # of another stage
        parameter = parameters[_parameter_of(key)]
        cuts[key] = _cut(parameter) if source.entries[key].shape == tuple(full_shape(parameter)) else (None, ())
    return cuts


def _by_saved_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the model, by the names under which an optimizer's state is saved."""
    copies = copies_of(model)
    return {copies.get(name, name): parameter for name, parameter in model.named_parameters()}


def _parameter_of(key: str) -> str:
    """The parameter of a tensor optimizer/<parameter>/<field>."""
    return key.partition("/")[2].rpartition("/")[0]


def _fits(old: Any, value: Any) -> bool:
    """Whether a saved option of an optimizer has a type that can replace the present one."""
    if isinstance(old, tuple | list):
        return isinstance(value, list) and len(value) == len(old) and all(map(_fits, old, value))
    if isinstance(old, Tensor) or (isinstance(old, int | float) and not isinstance(old, bool)):
        return isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(old, bool) or old is None:
        return value is None or isinstance(value, bool | int | float)
    return isinstance(value, type(old))


def _check_aggregator(
    model: nn.Module, aggregator: Aggregator, source: Source, ranks: CheckpointRanks
) -> tuple[AggregatorState, dict[str, Tensor]]:
    """Read the state of the aggregator and the tensors of this replica alone, and check that they fit."""
    cuts = {name: _cut(parameter) for name, parameter in model.named_parameters()}
    in_stages = getattr(model, "tpk_stages", None) is not None
    saved = Residuals(source, ranks.rank, ranks.tp, ranks.replica, ranks.dp, cuts, some=in_stages).state()
    state, own = without_own_parameters(saved)
    check_own(own, source.entries)
    try:
        aggregator.check_state_dict(state)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    return state, own


def _not_writable(tensor: Tensor) -> str | None:
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        return "it was made in inference mode, and is written to there alone"
    if torch._debug_has_internal_overlap(tensor) == 1:
        return f"values of it share memory (shape {list(tensor.shape)}, strides {tensor.stride()})"
    return None


def _cut(tensor: Tensor) -> tuple[int | None, Runs]:
    """The part of a tensor that this rank holds: (dim, runs), or (None, ()) for all of it."""
    info = shard_info(tensor)
    return (None, ()) if info is None else (info.dim % tensor.dim(), info.runs_of(info.rank))


def _fill(source: Source, ranks: CheckpointRanks, key: str, tensor: Tensor, cut: tuple[int | None, Runs]) -> None:
    """Read this rank's part; from its own file where several hold the same indices."""
    flat = flat_shard(tensor) if hasattr(tensor, "placements") else None
    if flat is not None:
        part = torch.empty(tensor.shape, dtype=tensor.dtype)
        _fill(source, ranks, key, part, cut)
        local_of(tensor).view(-1).copy_(flat.part(part))
        return
    first = source.first_rank(ranks.rank, ranks.tp)
    read_part(source.entries[key], source.tp, source.reader(key), *cut, tensor, first)


def _fill_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, source: Source, ranks: CheckpointRanks) -> None:
    saved, parameters = source.manifest["optimizer"], _by_saved_name(model)
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
        if name in parameters:
            optimizer.state[stepped(parameters[name])].update(fields)
    aliases = source.manifest["aliases"]
    for key, entry in source.entries.items():
        if key.startswith("optimizer/") and _parameter_of(key) in parameters:
            name, field = _parameter_of(key), key.rpartition("/")[2]
            parameter, was = parameters[name], source.entries.get(f"model/{aliases.get(name, name)}")
            like = entry.shape == tuple(full_shape(parameter))
            flat, stepped_one = flat_shard(parameter), stepped(parameter)
            device = parameter.device if like or on_device.get(stepped_one) or entry.shape else torch.device("cpu")
            shape = parameter.shape if like else torch.Size(entry.shape)
            converted = like and was is not None and was.dtype == entry.dtype  # as optimizer.load_state_dict does
            value = torch.empty(shape, dtype=parameter.dtype if converted else entry.dtype, device=device)
            _fill(source, ranks, key, value, _cut(parameter) if like else (None, ()))
            if like and flat is not None:
                part = torch.empty_like(stepped_one, dtype=value.dtype)
                local_of(part).view(-1).copy_(flat.part(value))
                value = part
            elif like and needs_whole_tensors(type(optimizer)) and shard_info(parameter) is not None:
                mark_part(value)
            optimizer.state[stepped_one][field] = value
