"""Flat shards: the values of a parameter that one of several replicas updates, and keeps optimizer state of.

Two make them: an aggregator with zero=1 or 2, and torch's fully_shard, whose parameters are DTensors.
"""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from tpkernels.comm.group import Group
from tpkernels.shard import begin_to_check, shard_info

_marked: weakref.WeakSet[FlatShard] = weakref.WeakSet()
_under_way: weakref.WeakSet[Finish] = weakref.WeakSet()


class Finish(Protocol):
    """Something that is under way to parameters of this process."""

    def finish(self) -> None:
        """Wait for it."""


def announce(what: Finish) -> None:
    """Let `finish_parameters` wait for it, too."""
    _under_way.add(what)


def finish_parameters() -> None:
    """Wait for the values of parameters that are under way, of every model of this process."""
    for what in list(_under_way):
        what.finish()


@dataclass(frozen=True)
class MeshRanks:
    """The ranks of one dimension of a DeviceMesh, as far as checkpoints and norms need them; copies: of their parts."""

    rank: int
    world_size: int
    process_group: dist.ProcessGroup
    copies: int

    @property
    def name(self) -> str:
        """That of the process group."""
        return self.process_group.group_name

    @property
    def label(self) -> str:
        """The name for messages."""
        return f"fully_shard {self.process_group.group_desc}"


@dataclass(frozen=True, eq=False)
class FlatShard:
    """This rank's part of a parameter: the attribute `tpk_flat` of the parameter, or what fully_shard has left of it.

        values = parameter.reshape(-1)[bounds[rank] : bounds[rank + 1]]

    Attributes:
        values: what the optimizer steps, and whose .grad is that part of the average: one dim, or the DTensor.
        bounds: the first index of each rank's part, and the end of the last one: world_size + 1 numbers.
        group: the replicas.
    """

    values: Tensor
    bounds: tuple[int, ...]
    group: Group | MeshRanks

    @property
    def range(self) -> tuple[int, int]:
        """The first index of the part, and that behind its last."""
        return self.bounds[self.group.rank], self.bounds[self.group.rank + 1]

    def part(self, whole: Tensor) -> Tensor:
        """This rank's part of a tensor of the parameter's shape: a view, or a copy where it is not contiguous."""
        start, stop = self.range
        return whole.reshape(-1)[start:stop]

    def __reduce__(self) -> Any:
        return type(None), ()  # a parameter that is copied or pickled is whole


def flat_shard(parameter: Tensor) -> FlatShard | None:
    """The flat shard of a parameter, or of a DTensor; None where every replica updates all of it.

    Raises:
        TypeError: a DTensor that is not cut along its first dim alone.
    """
    if hasattr(parameter, "placements"):
        return _of_dtensor(parameter)
    return getattr(parameter, "tpk_flat", None)


def local_of(tensor: Tensor) -> Tensor:
    """The plain tensor of a DTensor on this rank; a plain tensor itself."""
    local: Tensor = tensor.to_local() if hasattr(tensor, "placements") else tensor  # type: ignore[attr-defined]
    return local


def _of_dtensor(tensor: Any) -> FlatShard | None:
    cut = [i for i, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    if not cut:
        return None
    if len(cut) > 1 or not tensor.placements[cut[0]].is_shard(0):
        raise TypeError(
            f"a DTensor must be cut along its first dim over one dim of its mesh, as fully_shard does, got placements "
            f"{tensor.placements}"
        )
    mesh, rows = tensor.device_mesh, tensor.size(0)
    R, inner = mesh.size(cut[0]), prod(tensor.shape[1:])
    chunk = -(-rows // R)  # that of torch.chunk
    bounds = tuple(min(rank * chunk, rows) * inner for rank in range(R + 1))
    group = MeshRanks(mesh.get_local_rank(cut[0]), R, mesh.get_group(cut[0]), mesh.size() // R)
    return FlatShard(tensor, bounds, group)


def stepped(parameter: Tensor) -> Tensor:
    """The tensor that an optimizer steps for a parameter, and whose .grad is its gradient: its part, or itself."""
    flat = flat_shard(parameter)
    return parameter if flat is None else flat.values


def mark_flat(parameter: nn.Parameter, bounds: tuple[int, ...], group: Group, dtype: torch.dtype) -> None:
    """Make this rank's flat shard of a parameter.

    Args:
        parameter: trained, of a model that its layers have marked.
        bounds, group: of the shard.
        dtype: of its gradient.
    """
    begin_to_check()
    _watch_steps()
    start, stop = bounds[group.rank], bounds[group.rank + 1]
    values = nn.Parameter(parameter.detach().reshape(-1)[start:stop])
    if dtype != values.dtype:
        values.grad_dtype = dtype
    info = shard_info(parameter)
    values.tpk_groups = (group.name, *([] if info is None else [info.group_name]))  # type: ignore[attr-defined]
    parameter.tpk_flat = flat = FlatShard(values, bounds, group)  # type: ignore[attr-defined]
    _marked.add(flat)


@functools.cache
def _watch_steps() -> None:
    """Refuse from now on steps of optimizers that have parameters where they should have parts: they change nothing."""
    register_optimizer_step_pre_hook(_refuse_whole_parameters)


def _refuse_whole_parameters(optimizer: Optimizer, *_: object) -> None:
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        if getattr(parameter, "tpk_flat", None) is not None:
            name = type(optimizer).__name__
            raise ValueError(
                f"{name}.step: a parameter of shape {list(parameter.shape)} belongs to a GradAggregator with zero=1 or "
                f"2, which leaves its .grad None: make the optimizer by zero_optimizer({name}, aggregator, ...), with "
                f"all of its parameters"
            )


def parts_have_gradients() -> bool:
    """Whether a gradient is in the part of a parameter of this process, which then has none itself."""
    return any(flat.values.grad is not None for flat in _marked)


def unmark_flat(parameter: nn.Parameter) -> None:
    """Let every replica update all of a parameter again."""
    vars(parameter).pop("tpk_flat", None)
