"""The only definition of shards: which indices of a tensor belong to which rank.

Pure functions on sizes and tensors, no communication. Layers, checkpoints and plans use these, so that they cannot
disagree about a shard.

The rule: of n items over R ranks, rank r holds n // R + (r < n % R), in rank order. An item is one index of the sharded
dimension, or `unit` neighbouring ones that must stay together (the rows of an attention head: unit=head_dim).
A rank may hold nothing when there are fewer items than ranks.

Where the rule is not enough (projections packed into one weight, each sharded by itself; key and value heads that
several ranks share), a table of runs has the indices of each rank: `ShardInfo.runs`, made by `packed_runs` and others.

Arguments that most functions share:
    n: the number of indices of the sharded dimension, all ranks together. A multiple of unit.
    R: the number of ranks.
    rank: from 0 to R - 1.
    unit: the number of neighbouring indices that make one item.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# The (start, size) of each run of neighbouring indices that a rank holds, in the order in which they lie in its part.
Runs = tuple[tuple[int, int], ...]

_at_first_mark: list[Callable[[], None]] = []


def part_sizes(n: int, R: int, unit: int = 1) -> list[int]:
    """Return the sizes of the R shards of n, in rank order; they add up to n and differ by one unit at most.

    Args:
        n, R, unit: see the head of this file.

    Raises:
        ValueError: n is negative, R or unit is less than 1, or n is not a multiple of unit.
    """
    _check_cut(n, R, unit)
    return [part_size(n, R, rank, unit) for rank in range(R)]


def part_size(n: int, R: int, rank: int, unit: int = 1) -> int:
    """Return the number of indices of a rank: (items // R + (rank < items % R)) * unit, items = n / unit.

    Args:
        n, R, rank, unit: see the head of this file.

    Raises:
        ValueError: as `part_sizes`, or there is no such rank.
    """
    _check_cut(n, R, unit, rank)
    items = n // unit
    return (items // R + (rank < items % R)) * unit


def part_start(n: int, R: int, rank: int, unit: int = 1) -> int:
    """Return the first index of a rank: the sum of the sizes of the ranks before it.

    Args:
        n, R, rank, unit: see the head of this file.

    Raises:
        ValueError: as `part_size`.
    """
    _check_cut(n, R, unit, rank)
    items = n // unit
    return (rank * (items // R) + min(rank, items % R)) * unit


def part(tensor: Tensor, dim: int, R: int, rank: int, unit: int = 1) -> Tensor:
    """Return the rank's shard of a full tensor: a view, nothing is copied.

    Args:
        tensor: the full one.
        dim: the sharded dimension; its size is a multiple of unit.
        R, rank, unit: see the head of this file.

    Raises:
        ValueError: as `part_size`.
    """
    size = tensor.size(dim)
    return tensor.narrow(dim, part_start(size, R, rank, unit), part_size(size, R, rank, unit))


def split(tensor: Tensor, dim: int, R: int, unit: int = 1) -> list[Tensor]:
    """Return the shards of all ranks, in rank order: views, the inverse of `join`.

    Args:
        tensor: the full one.
        dim: the sharded dimension; its size is a multiple of unit.
        R, unit: see the head of this file.

    Raises:
        ValueError: as `part_sizes`.
    """
    return list(torch.split(tensor, part_sizes(tensor.size(dim), R, unit), dim))


def join(parts: Sequence[Tensor], dim: int, unit: int = 1) -> Tensor:
    """Return the full tensor of the shards of all ranks, a copy.

    Args:
        parts: the shards, in rank order.
        dim: the sharded dimension.
        unit: see the head of this file.

    Raises:
        ValueError: no shards, or their sizes are not those of the rule (of other units, or in another order).
    """
    if not parts:
        raise ValueError("join: expected one part or more, got none")
    sizes = [p.size(dim) for p in parts]
    expected = part_sizes(sum(sizes), len(parts), unit)
    if sizes != expected:
        raise ValueError(f"join: the parts of {sum(sizes)} over {len(parts)} ranks have sizes {expected}, got {sizes}")
    return torch.cat(list(parts), dim)


def reslice(parts: Sequence[Tensor], dim: int, R_to: int, rank: int, unit: int = 1) -> Tensor:
    """Return the shard of `rank` of R_to, from the shards of another number of ranks.

    Equal to `part(join(parts, dim), dim, R_to, rank)`, bit for bit, without the full tensor; always a copy.

    Args:
        parts: the shards of all ranks, in rank order.
        dim: the sharded dimension.
        R_to, rank: the new number of ranks, and the one.
        unit: see the head of this file; that of the old and of the new shards.

    Raises:
        ValueError: the sizes of the shards are not those of the rule; there is no such rank.
    """
    sizes = [p.size(dim) for p in parts]
    n = sum(sizes)
    if sizes != part_sizes(n, len(parts), unit):
        raise ValueError(f"reslice: the parts of {n} have sizes {part_sizes(n, len(parts), unit)}, got {sizes}")
    begin = part_start(n, R_to, rank, unit)
    end, at = begin + part_size(n, R_to, rank, unit), 0
    found = []
    for source, size in zip(parts, sizes, strict=True):
        low, high = max(begin, at), min(end, at + size)
        if low < high:
            found.append(source.narrow(dim, low - at, high - low))
        at += size
    return torch.cat(found, dim) if found else parts[0].narrow(dim, 0, 0).clone()


def rule_runs(n: int, R: int, rank: int, unit: int = 1) -> Runs:
    """Return the indices of a rank by the rule, as one run.

    Args:
        n, R, rank, unit: see the head of this file.
    """
    return ((part_start(n, R, rank, unit), part_size(n, R, rank, unit)),)


def run_size(runs: Runs) -> int:
    """Return the number of indices of the runs together."""
    return sum(size for _, size in runs)


def lay_out(runs: Runs) -> list[tuple[int, int, int]]:
    """Return each run that is not empty as (its start in the shard, its start in the full tensor, its size)."""
    found, at = [], 0
    for start, size in runs:
        if size:
            found.append((at, start, size))
        at += size
    return found


def merge_runs(runs: Sequence[tuple[int, int]]) -> Runs:
    """Return the same indices in the same order in as few runs as possible, without empty ones."""
    found: list[tuple[int, int]] = []
    for start, size in runs:
        if found and sum(found[-1]) == start:
            found[-1] = (found[-1][0], found[-1][1] + size)
        elif size:
            found.append((start, size))
    return tuple(found)


def packed_runs(sizes: Sequence[int], R: int, units: Sequence[int] | None = None) -> tuple[Runs, ...]:
    """Return the runs of each rank for projections packed one after the other, each sharded by the rule.

    Args:
        sizes: of the projections, in the order in which they are packed.
        R: the number of ranks.
        units: of each projection, the number of neighbouring indices that make one item; None means 1.
    """
    units = units or [1] * len(sizes)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(
        merge_runs(
            [
                (start + part_start(n, R, rank, unit), part_size(n, R, rank, unit))
                for start, n, unit in zip(starts, sizes, units, strict=True)
            ]
        )
        for rank in range(R)
    )


@dataclass(frozen=True)
class ShardInfo:
    """The place of a shard in the full tensor: the attribute `tpk_shard` of a sharded parameter.

    Attributes:
        dim: the sharded dimension.
        full_size: the size of that dimension in the full tensor.
        world_size, rank: the number of ranks, and the one that holds this shard.
        group_name: the group's registry key, valid inside this process only.
        group_label: the group's name for people, which survives pickling.
        unit: the number of neighbouring indices that make one item.
        runs: for each rank the runs of indices that it holds, where these are not those of the rule; else empty.
            Together the ranks hold every index; several ranks may hold the same ones (see `owned_by`).
    """

    dim: int
    full_size: int
    world_size: int
    rank: int
    group_name: str = ""
    group_label: str = ""
    unit: int = 1
    runs: tuple[Runs, ...] = ()

    def runs_of(self, rank: int) -> Runs:
        """Return the (start, size) of each run of indices of the full tensor in the rank's shard."""
        return self.runs[rank] if self.runs else rule_runs(self.full_size, self.world_size, rank, self.unit)

    @property
    def start(self) -> int:
        """The first index of this shard in the full tensor; of the first run, where there are several."""
        mine = self.runs_of(self.rank)
        return mine[0][0] if mine else 0

    @property
    def size(self) -> int:
        """The number of indices in this shard."""
        return run_size(self.runs_of(self.rank))

    @property
    def sizes(self) -> list[int]:
        """The number of indices in the shard of each rank."""
        return [run_size(self.runs_of(rank)) for rank in range(self.world_size)]

    def owned_by(self, rank: int) -> Runs:
        """Return the indices of the rank that no lower rank holds, so that sums over the ranks count every index once.

        Returns:
            (start, size) of each run, counted along `dim` from the beginning of the shard.
        """
        if not self.runs:
            return ((0, self.runs_of(rank)[0][1]),)
        lower = sorted(run for r in range(rank) for run in self.runs[r])
        owned = list[tuple[int, int]]()
        for at, start, size in lay_out(self.runs[rank]):
            free, end = start, start + size
            for other, count in [*lower, (end, 0)]:
                if other > free:
                    owned.append((at + free - start, min(other, end) - free))
                free = max(free, other + count)
                if free >= end:
                    break
        return tuple(owned)

    @property
    def shared(self) -> bool:
        """Whether several ranks hold the same indices (key and value heads, when there are more ranks)."""
        return sum(self.sizes) > self.full_size

    def full_shape(self, shard: Tensor) -> torch.Size:
        """Return the shape of the full tensor of a shard."""
        shape = list(shard.shape)
        shape[self.dim] = self.full_size
        return torch.Size(shape)

    def part(self, full: Tensor) -> Tensor:
        """Return this shard of the full tensor: a view, or a copy where it consists of several runs.

        Args:
            full: full_size indices in dimension `dim`.

        Raises:
            ValueError: the sharded dimension of `full` does not have full_size indices.
        """
        if full.size(self.dim) != self.full_size:
            raise ValueError(
                f"ShardInfo.part: dim {self.dim} must have {self.full_size} indices, got shape {list(full.shape)}"
            )
        mine = self.runs_of(self.rank)
        if len(mine) == 1:
            return full.narrow(self.dim, *mine[0])
        return (
            torch.cat([full.narrow(self.dim, start, size) for start, size in mine], self.dim)
            if mine
            else (full.narrow(self.dim, 0, 0))
        )

    def put(self, part: Tensor, rank: int, full: Tensor) -> None:
        """Copy the shard of a rank to its places in the full tensor.

        Args:
            part: the shard, of the shape that `full` has but for `dim`.
            rank: which rank's it is.
            full: is changed.
        """
        for at, start, size in lay_out(self.runs_of(rank)):
            full.narrow(self.dim, start, size).copy_(part.narrow(self.dim, at, size))

    def assemble(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the full tensor of the shards of all ranks, in rank order; always a copy.

        Args:
            parts: one shard for each rank, which differ in dimension `dim` only.

        Raises:
            ValueError: the shards do not have the sizes that `sizes` has.
        """
        sizes = [p.size(self.dim) for p in parts]
        if sizes != self.sizes:
            raise ValueError(f"ShardInfo.assemble: the parts must have sizes {self.sizes}, got {sizes}")
        full = parts[0].new_empty(self.full_shape(parts[0]))
        for rank, part in enumerate(parts):
            self.put(part, rank, full)
        return full


def shard_info(parameter: Tensor) -> ShardInfo | None:
    """Return the place of a parameter in the full tensor, or None for a replicated one."""
    return getattr(parameter, "tpk_shard", None)


def full_shape(tensor: Tensor) -> torch.Size:
    """Return the shape of the full tensor of a shard; of a replicated tensor its own."""
    info = shard_info(tensor)
    return tensor.shape if info is None else info.full_shape(tensor)


def mark_shard(parameter: Tensor, info: ShardInfo) -> None:
    """Set the place of a parameter in the full tensor."""
    parameter.tpk_shard = info  # type: ignore[attr-defined]
    if info.world_size > 1:
        begin_to_check()


def begin_to_check() -> None:
    """Call the actions of `at_first_mark` that have not been called."""
    while _at_first_mark:
        _at_first_mark.pop()()


def at_first_mark(action: Callable[[], None]) -> Callable[[], None]:
    """Call an action once, when the first parameter of this process is sharded over two ranks or more; returns it."""
    _at_first_mark.append(action)
    return action


def _check_cut(n: int, R: int, unit: int, rank: int = 0) -> None:
    if n < 0 or R < 1 or unit < 1 or n % unit:
        raise ValueError(f"a cut needs n >= 0, R >= 1 and n a multiple of unit >= 1, got n={n}, R={R}, unit={unit}")
    if not 0 <= rank < R:
        raise ValueError(f"a cut over {R} ranks has ranks 0 to {R - 1}, got rank {rank}")
