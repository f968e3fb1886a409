"""State of a GradAggregator in a checkpoint: of every rank of every replica, and what other ranks begin with.

Its tensors are called "<kind>.<parameter>" and have the parameter's shape, so they are cut like it. Over another number
of replicas goes the rule of `data_parallel.state.reshard_state`; here it is applied to one tensor at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tpkernels.ckpt_cuts import Entry, Read, read_part
from tpkernels.ckpt_files import CheckpointError
from tpkernels.ckpt_manifest import Source
from tpkernels.data_parallel.state import OWN, AggregatorState, reshard_state
from tpkernels.shard import Runs


def residuals_for(
    source: Source, rank: int, tp: int, replica: int, dp: int, cuts: dict[str, tuple[int | None, Runs]] | None = None
) -> AggregatorState:
    """What rank `rank` of `tp` of replica `replica` of `dp` begins with.

    Args:
        cuts: what this rank holds of each parameter, as (dim, runs), where it is not what the manifest says.

    Raises:
        CheckpointError: none was saved, or what was saved fits no other number of ranks.
    """
    numbers = [source.aggregator_numbers(rank % source.tp, q) for q in range(source.dp)]
    if any(n is None for n in numbers):
        raise CheckpointError("it holds no state of an aggregator: load it without one")
    try:
        state = reshard_state([{"tensors": {}, "numbers": n} for n in numbers], dp)[replica]
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    for key in source.own(rank % source.tp, 0):
        kind, _, name = key.partition("/")
        if kind == "aggregator":
            state["tensors"][name] = _tensor(source, name, rank, tp, replica, dp, cuts)
    return state


def _tensor(
    source: Source,
    name: str,
    rank: int,
    tp: int,
    replica: int,
    dp: int,
    cuts: dict[str, tuple[int | None, Runs]] | None,
) -> Tensor:
    kind, _, parameter = name.partition(".")
    entry = _entry_of(source, parameter)
    dim, runs = entry.dim, () if entry.dim is None else entry.runs_of(rank, tp)
    if cuts is not None:
        dim, runs = cuts[parameter]
    shape = list(entry.shape)
    if dim is not None:
        shape[dim] = sum(size for _, size in runs)
    dtype = getattr(torch, source.own(rank % source.tp, 0)[f"aggregator/{name}"]["dtype"])
    first = rank if tp == source.tp else 0
    total = torch.zeros(shape, dtype=dtype)
    same = dp == source.dp
    old = [replica] if same else list(range(replica, source.dp, dp)) if kind in OWN else [0]
    for q in old:
        part = torch.empty(shape, dtype=dtype) if len(old) > 1 else total
        read_part(entry, source.tp, _reader(source, q, f"aggregator/{name}"), dim, runs, part, first)
        if part is not total:
            total += part
    return total


def _entry_of(source: Source, parameter: str) -> Entry:
    key = f"model/{source.manifest['aliases'].get(parameter, parameter)}"
    if key not in source.entries:
        raise CheckpointError(f"it holds the aggregator's state of {parameter}, which is no parameter of the model")
    return source.entries[key]


def _reader(source: Source, replica: int, key: str) -> Read:
    return lambda rank, *ranges: source.file(rank, replica).read(key, *ranges)
