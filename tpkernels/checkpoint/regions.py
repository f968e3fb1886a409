"""The entry of a tensor in the manifest: how it is cut; and reading a part of one cut from the parts of another.

An entry of the manifest:

    "model/blocks.0.up.weight": {"dtype": "float32", "shape": [9, 7], "style": "column", "dim": 0, "unit": 3,
                                 "runs": null}

`shape` is that of the unsharded tensor and `dim` the cut dimension, null for a tensor that every rank holds whole.
`runs` is null where each rank holds what the rule of shard.py gives it; else the (start, size) of each run of indices,
rank by rank: for projections packed into one weight, and for heads that several ranks share. `replicas_differ` is true,
else absent, where ranks that hold the same indices had other bits. `stage` is the stage whose files have the tensor,
absent for stage 0. `flat`, absent where the files of replica 0 have all values, lists for each rank where the replicas
cut the values of its part, as one row: the number of replicas and one, from 0 to the number of values. The file of a
replica has those from its number to the next.

Any cut can be read as any other: along another dimension, with other units, over another number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tpkernels.checkpoint.schema import DTYPE_NAMES, is_shape, is_whole
from tpkernels.errors import CheckpointError
from tpkernels.shard import Runs, ShardInfo, lay_out, rule_runs, run_size

Read = Callable[..., Tensor]  # (rank, *(dim, start, stop)) -> that range of what the rank's file holds


class Stretch(NamedTuple):
    """Neighbouring indices of the cut dimension: `held` in the file of the rank, `start` in the unsharded tensor."""

    rank: int
    held: int
    start: int
    size: int


@dataclass(frozen=True)
class Entry:
    """The entry of one tensor; see the head of this file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    style: str = "replicate"
    dim: int | None = None
    unit: int = 1
    runs: tuple[Runs, ...] | None = None
    replicas_differ: bool = False
    stage: int = 0
    flat: tuple[tuple[int, ...], ...] | None = None

    @classmethod
    def of(cls, tensor: Tensor, info: ShardInfo | None, style: str) -> Entry:
        """The entry of a tensor that this rank holds: full, or the shard that `info` describes."""
        if info is None:
            return cls(tensor.dtype, tuple(tensor.shape), style)
        runs = info.runs or None
        return cls(tensor.dtype, tuple(info.full_shape(tensor)), style, info.dim % tensor.dim(), info.unit, runs)

    @classmethod
    def from_json(cls, name: str, fields: dict[str, Any]) -> Entry:
        """Parse an entry.

        Raises:
            CheckpointError: a field is missing, or has a value that no entry has.
        """
        try:
            return cls._parsed(fields)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"the manifest's entry of {name} makes no sense ({error!r})") from None

    @classmethod
    def _parsed(cls, fields: dict[str, Any]) -> Entry:
        dtype, shape, dim, unit, table = (fields[key] for key in ("dtype", "shape", "dim", "unit", "runs"))
        if dtype not in DTYPE_NAMES or not is_shape(shape):
            raise ValueError("dtype or shape")
        if dim is not None and not (is_whole(dim) and dim < len(shape)):
            raise ValueError("dim")
        if not is_whole(unit, 1) or (dim is not None and table is None and shape[dim] % unit):
            raise ValueError("unit")
        style, differ = fields["style"], fields.get("replicas_differ", False)
        if not isinstance(style, str) or not isinstance(differ, bool):
            raise ValueError("style or replicas_differ")
        runs = None if table is None else tuple(tuple((start, size) for start, size in rank) for rank in table)
        if not is_whole(stage := fields.get("stage", 0)):
            raise ValueError("stage")
        flat = None if fields.get("flat") is None else tuple(map(tuple, fields["flat"]))
        entry = cls(getattr(torch, dtype), tuple(shape), style, dim, unit, runs, differ, stage, flat)
        if runs is not None:
            numbers = [run for rank in runs for run in rank]
            if dim is None or not all(is_whole(a) and is_whole(n) and a + n <= shape[dim] for a, n in numbers):
                raise ValueError("runs")
            stretches(entry, len(runs))
        for rank, bounds in enumerate(flat or ()):
            values = prod(entry.part_shape(rank, len(flat or ())))
            if not all(map(is_whole, bounds)) or sorted(bounds) != list(bounds) or {*bounds[:1], *bounds[-1:]} != {
                0, values,
            }:  # fmt: skip
                raise ValueError("flat")
        return entry

    def to_json(self) -> dict[str, Any]:
        """The entry as the manifest holds it."""
        fields: dict[str, Any] = {
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
            "style": self.style,
            "dim": self.dim,
            "unit": self.unit,
            "runs": self.runs,
        }
        fields |= {"replicas_differ": True} if self.replicas_differ else {}
        fields |= {"flat": self.flat} if self.flat is not None else {}
        return fields | ({"stage": self.stage} if self.stage else {})

    def runs_of(self, rank: int, world_size: int) -> Runs:
        """The runs of indices along `dim` that a rank holds.

        Args:
            rank, world_size: of the ranks that saved.

        Raises:
            CheckpointError: the runs are listed for another number of ranks.
        """
        assert self.dim is not None, "a tensor that is not cut has no runs"
        if self.runs is not None:
            if len(self.runs) != world_size:
                raise CheckpointError(f"the manifest lists the runs of {len(self.runs)} ranks, not of {world_size}")
            return self.runs[rank]
        return rule_runs(self.shape[self.dim], world_size, rank, self.unit)

    def part_shape(self, rank: int, world_size: int) -> tuple[int, ...]:
        """The shape of the shard that a rank holds."""
        if self.dim is None:
            return self.shape
        size = run_size(self.runs_of(rank, world_size))
        return (*self.shape[: self.dim], size, *self.shape[self.dim + 1 :])

    def held_shape(self, rank: int, world_size: int, replica: int) -> tuple[int, ...] | None:
        """The shape of what the file of a rank of a replica has of it; None where it has nothing."""
        if self.flat is None:
            return self.part_shape(rank, world_size) if replica == 0 else None
        start, stop = self.flat[rank][replica : replica + 2]
        return (stop - start,)


def stretches(entry: Entry, world_size: int, first: int = 0) -> list[Stretch]:
    """Every index of the cut dimension once, in order, with the rank whose file it is read from.

    Args:
        first: the rank to read from where several hold the same indices.

    Raises:
        CheckpointError: no rank holds some of the indices.
    """
    assert entry.dim is not None, "a tensor that is not cut has no stretches"
    held = []
    for rank in (first, *(r for r in range(world_size) if r != first)):
        held += [Stretch(rank, *run) for run in lay_out(entry.runs_of(rank, world_size))]
    found, end = [], 0
    while end < entry.shape[entry.dim]:
        next_one = next((s for s in held if s.start <= end < s.start + s.size), None)
        if next_one is None:
            raise CheckpointError(f"no rank holds index {end} of dimension {entry.dim}")
        skip = end - next_one.start
        found.append(Stretch(next_one.rank, next_one.held + skip, end, next_one.size - skip))
        end = next_one.start + next_one.size
    return found


def ranks_read(entry: Entry, world_size: int, dim: int | None, runs: Runs, first: int) -> set[int]:
    """The ranks whose files `read_part` reads; the arguments are those of `read_part`."""
    if dim is not None and dim == entry.dim and entry.runs_of(first, world_size) == runs:
        return {first}
    return {box.rank for box in _boxes(entry, world_size, dim, runs, first)}


def read_part(entry: Entry, world_size: int, read: Read, dim: int | None, runs: Runs, out: Tensor, first: int) -> None:
    """Fill `out` with the given runs along `dim` of a tensor of which `world_size` ranks hold parts.

    Args:
        entry: how the tensor is cut in the files.
        read: reads a range of what a rank's file holds.
        dim, runs: the wanted part; dim None means the full tensor.
        out: of the wanted shape; no more than one slice is in memory besides it.
        first: the rank whose file is taken where several hold the same.
    """
    for box in _boxes(entry, world_size, dim, runs, first):
        part = out
        for at, start, size in box.into:
            part = part.narrow(at, start, size)
        part.copy_(read(box.rank, *box.ranges))


class _Box(NamedTuple):
    """A slice of one file, (dim, start, stop), and the range of the wanted part that it fills, (dim, start, size)."""

    rank: int
    ranges: list[tuple[int, int, int]]
    into: list[tuple[int, int, int]]


def _boxes(entry: Entry, world_size: int, dim: int | None, runs: Runs, first: int) -> Iterator[_Box]:
    wanted = lay_out(runs)
    if entry.dim is None:
        if dim is None:
            yield _Box(first, [], [])
        for at, start, size in wanted:
            assert dim is not None
            yield _Box(first, [(dim, start, start + size)], [(dim, at, size)])
        return
    for rank, held, start, size in stretches(entry, world_size, first):
        if dim is None:
            yield _Box(rank, [(entry.dim, held, held + size)], [(entry.dim, start, size)])
        elif dim == entry.dim:
            for at, low, count in wanted:
                begin, end = max(start, low), min(start + size, low + count)
                if begin < end:
                    inside = held + begin - start
                    yield _Box(rank, [(dim, inside, inside + end - begin)], [(dim, at + begin - low, end - begin)])
        else:
            for at, low, count in wanted:
                ranges = [(entry.dim, held, held + size), (dim, low, low + count)]
                yield _Box(rank, ranges, [(entry.dim, start, size), (dim, at, count)])
