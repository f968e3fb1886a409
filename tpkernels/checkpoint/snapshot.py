"""The snapshot of a rank: the tensors it saves by name, how each is cut, and what is not a tensor."""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tpkernels import layers
from tpkernels.checkpoint.files import bytes_of, check_tensors
from tpkernels.checkpoint.ranks import CheckpointRanks
from tpkernels.checkpoint.regions import Entry
from tpkernels.checkpoint.replicas import has_own_parameters, with_own_parameters
from tpkernels.data_parallel.flat import FlatShard, MeshRanks, flat_shard, local_of, stepped
from tpkernels.data_parallel.state import AggregatorState
from tpkernels.errors import CheckpointError
from tpkernels.layers.base import mark_shards
from tpkernels.shard import ShardInfo, shard_info

STYLE_OF: dict[type[nn.Module], str] = {
    layers.ColumnParallelLinear: "column",
    layers.RowParallelLinear: "row",
    layers.VocabParallelEmbedding: "vocab",
}


class Aggregator(Protocol):
    """The part of a GradAggregator that a checkpoint needs."""

    def state_dict(self) -> AggregatorState:
        """Its state: {"tensors": {name: tensor}, "numbers": what JSON holds}."""

    def check_state_dict(self, state: AggregatorState) -> None:
        """Raise ValueError unless `load_state_dict` can take the state; nothing changes."""

    def load_state_dict(self, state: AggregatorState) -> None:
        """Continue from a state."""


@dataclass
class Snapshot:
    """The data that one rank saves.

    Attributes:
        tensors: of its file. Replicas after the first have only tensors of their own.
        entries: how each tensor of model and optimizer is cut.
        own: names of tensors that belong to this rank alone.
        aliases: {second name: first name} of tied tensors.
        optimizer, aggregator: their state without tensors; None where there is none.
        step, extra: as given to `save`.
    """

    tensors: dict[str, Tensor]
    entries: dict[str, Entry]
    own: list[str]
    aliases: dict[str, str]
    optimizer: dict[str, Any] | None
    aggregator: Any
    step: int
    extra: dict[str, Any]

    def copied(self) -> Snapshot:
        """A copy in the memory of the CPU, for a thread that writes it while the training changes the model."""
        return replace(self, tensors={k: v.detach().to("cpu", copy=True).contiguous() for k, v in self.tensors.items()})

    def replica_digests(self) -> dict[str, str]:
        """A digest of each tensor that other ranks hold, too; a save compares them over the ranks."""
        return {
            name: _digest(self.tensors[name])
            for name, entry in self.entries.items()
            if name in self.tensors and (entry.dim is None or entry.runs is not None) and entry.flat is None
        }


def take(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    aggregator: Aggregator | None,
    ranks: CheckpointRanks,
    step: int,
    extra: Mapping[str, Any] | None,
    own_parameters: bool,
) -> Snapshot:
    """The snapshot of this rank, whose tensors are not copied. The arguments are those of `checkpoint.save`.

    Raises:
        CheckpointError: there is something that a checkpoint cannot hold (named).
    """
    mark_shards(model)
    aliases = aliases_of(model) | copies_of(model)
    state = {name: t for name, t in model.state_dict(keep_vars=True).items() if name not in aliases}
    check_tensors({f"model/{name}": local_of(tensor) for name, tensor in state.items()})
    entries: dict[str, Entry] = {}
    tensors: dict[str, Tensor] = {}
    styles = _styles(model)
    for name, tensor in state.items():
        entry = _entry(tensor, shard_info(tensor), styles.get(name))
        flat = flat_shard(tensor) if hasattr(tensor, "placements") else None
        entries[f"model/{name}"] = entry if flat is None else replace(entry, flat=_bounds(flat, ranks, name))
        tensors[f"model/{name}"] = tensor if flat is None else _values(flat, ranks, tensor)
    for name, field, value, parameter in _optimizer_tensors(model, optimizer):
        key = f"optimizer/{name}/{field}"
        check_tensors({key: local_of(value)})
        entries[key] = _optimizer_entry(value, parameter, styles.get(name), ranks)
        flat = flat_shard(parameter)
        tensors[key] = value if flat is None or entries[key].flat is None else _values(flat, ranks, value)
    if ranks.replica > 0:
        tensors = {key: value for key, value in tensors.items() if entries[key].flat is not None}
    own = {f"rng/{key}": value for key, value in layers.rng_state().items()}
    mine = aggregator.state_dict() if aggregator is not None else None
    if own_parameters:
        if mine is None:
            raise CheckpointError("own_parameters needs an aggregator, got None")
        mine = with_own_parameters(mine, model, optimizer)
    if mine is not None:
        _check_aggregator(mine["numbers"], ranks)
        own |= {f"aggregator/{key}": value for key, value in mine["tensors"].items()}
    check_tensors(own)
    renamed = {name: first for name, first in aliases.items() if name != first}
    return Snapshot(
        tensors | own, entries, list(own), renamed, optimizer_numbers(model, optimizer),
        None if mine is None else plain(mine["numbers"], "the aggregator's state"),
        _as_step(step), _as_extra(extra or {}),
    )  # fmt: skip


def _as_step(step: Any) -> int:
    """The step as an int; a step that `load` would not read is refused."""
    if isinstance(step, bool) or not hasattr(step, "__index__"):
        raise CheckpointError(f"step must be a whole number, got {step!r}")
    return operator.index(step)


def _as_extra(extra: Any) -> dict[str, Any]:
    """The mapping as JSON reads it back, in which all keys are text."""
    if not isinstance(extra, Mapping):
        raise CheckpointError(f"extra must be a mapping, got {type(extra).__name__}")
    pending: list[Any] = [extra]
    while pending:
        value = pending.pop()
        for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
            if isinstance(value, Mapping) and not isinstance(key, str):
                raise CheckpointError(f"extra must have text for keys, got {key!r}: JSON would make text of it")
            pending += [inner] if isinstance(inner, (Mapping, list, tuple)) else []
    return plain(dict(extra), "extra")  # type: ignore[no-any-return]


def aliases_of(model: nn.Module) -> dict[str, str]:
    """Second names of tied tensors, which are saved once: {second name: first name}."""
    first: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    return {name: first[id(t)] for name, t in state.items() if first.setdefault(id(t), name) != name}


def copies_of(model: nn.Module) -> dict[str, str]:
    """Parameters of a pipeline stage that an earlier stage saves, too: {name here: name there}."""
    stages = getattr(model, "tpk_stages", None)
    return {} if stages is None else stages.copies()


def plain(value: Any, what: str) -> Any:
    """The value as JSON reads it back.

    Raises:
        CheckpointError: JSON does not hold it.
    """
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{what} must be what JSON holds: {error}") from None


def optimizer_numbers(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any] | None:
    """The optimizer without its tensors: its options, the parameters of each group, the numbers of its state.

    Raises:
        CheckpointError: it has parameters that the model does not have, or a value that JSON does not hold.
    """
    if optimizer is None:
        return None
    names: dict[Tensor, str] = {stepped(parameter): name for name, parameter in model.named_parameters()}
    copies = copies_of(model)
    groups = []
    for group in optimizer.param_groups:
        if not all(p in names for p in group["params"]):
            raise CheckpointError("the optimizer has parameters that the model does not have")
        options = {k: v.item() if isinstance(v, Tensor) else v for k, v in group.items() if k != "params"}
        params = [names[p] for p in group["params"] if names[p] not in copies]
        groups.append(plain(options, "the optimizer's options") | {"params": params})
    state = {
        names[parameter]: {k: v for k, v in fields.items() if not isinstance(v, Tensor)}
        for parameter, fields in optimizer.state.items()
        if names[parameter] not in copies
    }
    state = plain({name: fields for name, fields in state.items() if fields}, "the optimizer's state")
    return {"class": type(optimizer).__name__, "groups": groups, "state": state}


def _check_aggregator(numbers: dict[str, Any], ranks: CheckpointRanks) -> None:
    """Check that it averages over the replicas that are saved, and that all that differs between them is saved."""
    if (numbers["rank"], numbers["world_size"]) != (ranks.replica, ranks.dp):
        raise CheckpointError(
            f"the aggregator is rank {numbers['rank']} of {numbers['world_size']} and this is replica {ranks.replica} "
            f"of {ranks.dp}: pass its group as dp_group"
        )
    if ranks.dp > 1 and numbers.get("local_step") and not has_own_parameters(numbers):
        raise CheckpointError(
            f"the replicas are {numbers['local_step']} local steps after their last average, so that each has "
            f"parameters of its own and only those of the first would be saved: call the aggregator's drain() first, "
            f"or pass own_parameters=True"
        )


def _optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> list[tuple[str, str, Tensor, nn.Parameter]]:
    """Name of the parameter, field, value and parameter of each tensor of the optimizer's state."""
    found, copies = [], copies_of(model)
    for name, parameter in model.named_parameters():
        if name in copies:
            continue
        fields = optimizer.state.get(stepped(parameter), {}) if optimizer is not None else {}
        own = stepped(parameter).shape
        is_cut = shard_info(parameter) is not None or flat_shard(parameter) is not None
        for field, value in fields.items():
            if not isinstance(value, Tensor):
                continue
            if is_cut and value.shape != own and value.numel() != 1:
                raise CheckpointError(
                    f"{field} of {name} in the optimizer has shape {list(value.shape)}: of a parameter that is cut, "
                    f"only numbers and tensors of its own shape {list(own)} can be saved"
                )
            found.append((name, field, value, parameter))
    return found


def _optimizer_entry(value: Tensor, parameter: nn.Parameter, style: str | None, ranks: CheckpointRanks) -> Entry:
    """The entry of a tensor of an optimizer's state: cut like its parameter where it has the shape of that."""
    flat, info = flat_shard(parameter), shard_info(parameter)
    if value.shape != stepped(parameter).shape:
        return _entry(value, None, None)
    if flat is None:
        return _entry(value, info, style if info else None)
    entry = _entry(parameter, info, style if info else None)
    return replace(entry, dtype=value.dtype, flat=_bounds(flat, ranks, "the optimizer's state"))


def _bounds(flat: FlatShard, ranks: CheckpointRanks, what: str) -> tuple[tuple[int, ...], ...]:
    """Where the replicas cut this rank's part; of several copies of the parts the first one has all values."""
    group, parts = flat.group, flat.group.world_size
    copies = group.copies if isinstance(group, MeshRanks) else 1
    if (group.rank, parts * copies) != (ranks.replica % parts, ranks.dp):
        of_copies = f", in {copies} copies," if copies > 1 else ""
        raise CheckpointError(
            f"{what} is cut over {parts} ranks of group {group.label!r}{of_copies} of which this is rank {group.rank}, "
            f"and this is replica {ranks.replica} of {ranks.dp}: pass these ranks as dp_group, copy by copy where "
            f"there are several"
        )
    return ((*flat.bounds, *[flat.bounds[-1]] * (ranks.dp - parts)),)


def _values(flat: FlatShard, ranks: CheckpointRanks, tensor: Tensor) -> Tensor:
    """The values that this replica saves, one dim; none of a further copy."""
    values = local_of(tensor).reshape(-1)
    return values if ranks.replica < flat.group.world_size else values[:0]


def _entry(tensor: Tensor, info: ShardInfo | None, style: str | None) -> Entry:
    return Entry.of(tensor, info, (style or "replicate") if info is not None else "replicate")


def _styles(model: nn.Module) -> dict[str, str]:
    """The style of each module's parameters, by parameter name; a cut without a style is called by its dim."""
    found = {}
    planned = getattr(getattr(model, "tpk_plan", None), "styles", {})
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            info = shard_info(parameter)
            known = next((style for kind, style in STYLE_OF.items() if isinstance(module, kind)), None)
            found[name] = planned.get(prefix) or known or (f"dim {info.dim}" if info is not None else "replicate")
    return found


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(bytes_of(tensor)).hexdigest()
