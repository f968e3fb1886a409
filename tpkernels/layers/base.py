"""What all parallel layers share: a group that survives copying and pickling, marked shards, initialisation.

A layer holds its `Group`, which is a live object of this process. A deep copy shares it. A pickle stores a
`GroupReference` instead; the loading process puts its own group in place, in this order: an open group with the same
registry key, an open group with the same label, the default group. Rank and number of ranks must be those of the
pickle, because the weights are this rank's. `layer.set_group(group)` does it by hand.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from tpkernels import group as groups
from tpkernels import ops
from tpkernels.group import Group
from tpkernels.shard import ShardInfo, mark_shard, shard_info

BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class GroupReference:
    """Stands for a group inside a pickle."""

    name: str
    label: str
    rank: int
    world_size: int

    def find(self) -> Group:
        """Return this process's group for the reference.

        Raises:
            ValueError: no open group has the rank and the number of ranks with which the layer was pickled.
        """
        found = groups.find(name=self.name, label=self.label) or groups.resolve(None)
        if (found.rank, found.world_size) != (self.rank, self.world_size):
            raise ValueError(
                f"a layer pickled by rank {self.rank} of {self.world_size} (group {self.label!r}) holds that rank's "
                f"shard, got group {found.label!r} with rank {found.rank} of {found.world_size}: open a group with "
                f"that label first, or load a checkpoint and reshard"
            )
        return found


@dataclass(frozen=True)
class Cut:
    """How one parameter of a layer is cut: the part of ShardInfo that does not depend on the group."""

    dim: int
    full_size: int
    unit: int = 1


class ParallelModule(nn.Module):
    """A module of which each rank of a group holds a part. Subclasses fill `_cuts`: {parameter name: Cut}."""

    group: Group
    _cuts: dict[str, Cut]

    def __init__(self, group: Group | None) -> None:
        super().__init__()
        self.group = groups.resolve(group)
        self._cuts = {}

    def set_group(self, group: Group) -> None:
        """Let the layer work over another group in which it has the same place, for example one opened anew.

        Raises:
            ValueError: rank or number of ranks differ, so the weights would be another rank's.
        """
        if (group.rank, group.world_size) != (self.group.rank, self.group.world_size):
            raise ValueError(
                f"set_group: expected rank {self.group.rank} of {self.group.world_size}, whose shard the layer holds, "
                f"got rank {group.rank} of {group.world_size}"
            )
        self.group = group
        self._mark()

    def _add_parameter(self, name: str, shape: tuple[int, ...], cut: Cut | None, **kwargs: Any) -> None:
        """Register an uninitialised parameter that holds this rank's part of a tensor of the given full shape."""
        sizes = list(shape)
        if cut is not None:
            self._cuts[name] = cut
            sizes[cut.dim] = self._info(cut).size
        self.register_parameter(name, nn.Parameter(torch.empty(sizes, **kwargs)))
        self._mark()

    def _copy_from(self, module: nn.Module) -> Self:
        """Take this rank's part of the parameters of the unsharded module, with their dtype, device and flags."""
        for name in list(self._parameters):
            source = getattr(module, name)
            if source is not None:
                cut = self._cuts.get(name)
                value = source.detach() if cut is None else self._info(cut).part(source.detach())
                value = value.clone(memory_format=torch.contiguous_format)
                setattr(self, name, nn.Parameter(value, requires_grad=source.requires_grad))
        self._mark()
        return self.train(module.training)

    def _full(self, name: str) -> Tensor:
        """Return the unsharded parameter on every rank, detached. Collective over the group."""
        parameter: Tensor = getattr(self, name)
        value = parameter.detach()
        cut = self._cuts.get(name)
        return value.clone() if cut is None else gather(value, cut.dim, cut.full_size, self.group, unit=cut.unit)

    def _info(self, cut: Cut) -> ShardInfo:
        g = self.group
        return ShardInfo(cut.dim, cut.full_size, g.world_size, g.rank, g.name, g.label, cut.unit)

    def _mark(self) -> None:
        """Put ShardInfo on the parameters that are cut: torch drops attributes when it makes new Parameter objects."""
        for name, cut in self._cuts.items():
            parameter = self._parameters.get(name)
            if parameter is not None:
                mark_shard(parameter, self._info(cut))

    # The three places where torch replaces parameter objects behind a module's back.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._mark()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._mark()

    def __setstate__(self, state: dict[str, Any]) -> None:
        reference = state["group"]
        if isinstance(reference, GroupReference):
            state = {**state, "group": reference.find()}
        super().__setstate__(state)
        self._mark()

    def __getstate__(self) -> dict[str, Any]:
        g = self.group
        return {**self.__dict__, "group": GroupReference(g.name, g.label, g.rank, g.world_size)}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        memo[id(self.group)] = self.group
        new.__setstate__(copy.deepcopy(self.__dict__, memo))
        return new


def gather(shard: Tensor, dim: int, full_size: int, group: Group, *, unit: int = 1) -> Tensor:
    """Return the whole of a tensor cut along dim on every rank; the gradient is this rank's part (replicated use)."""
    if unit == 1:
        return ops.all_gather(shard, dim, group=group, dim_size=full_size, grad="split")
    # The ranks hold whole units: as a dimension of their own these follow the plain rule.
    units = shard.unflatten(dim, (shard.size(dim) // unit, unit))
    first = dim if dim >= 0 else dim - 1
    whole = ops.all_gather(units, first, group=group, dim_size=full_size // unit, grad="split")
    return whole.flatten(first, first + 1)


def autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast to the dtype of torch.autocast where it is on, as it does by itself for F.linear: fp64 stays."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return _cast(x, dtype), _cast(weight, dtype), None if bias is None else _cast(bias, dtype)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)


@torch.no_grad()
def init_shard_(parameter: Tensor, fill: Callable[[Tensor], Any], *, by_rows: bool = False) -> Tensor:
    """Fill a parameter with its part of what `fill` gives the unsharded tensor.

    With the same seed on all ranks the ranks together hold exactly the tensor that one process would have drawn,
    whatever their number, and their generators end in the state in which that one process's would be.

    Args:
        parameter: a shard (marked with ShardInfo) or a replicated tensor, in place.
        fill: an in-place initialiser such as `lambda w: nn.init.normal_(w, std=0.02)`.
        by_rows: promises that fill may be called on blocks of rows one after the other, as is true for uniform_ and
            normal_ with bounds that do not depend on the number of rows (not for trunc_normal_, which draws until
            all fit). Then, on the CPU, no more than a few MiB besides the parameter are in use; otherwise, and on
            other devices, whose generators give other numbers in pieces, the whole tensor is drawn and cut.

    Returns:
        the parameter.
    """
    info = shard_info(parameter)
    if parameter.is_meta:
        return parameter
    if info is None:
        fill(parameter)
        return parameter
    shape = info.full_shape(parameter)
    if not (by_rows and parameter.device.type == "cpu"):
        full = torch.empty(shape, dtype=parameter.dtype, device=parameter.device)
        fill(full)
        parameter.copy_(info.part(full))
        return parameter
    for start, stop in _row_blocks(shape):
        rows = torch.empty((stop - start, *shape[1:]), dtype=parameter.dtype, device=parameter.device)
        fill(rows)
        if info.dim != 0:
            parameter[start:stop].copy_(info.part(rows))
            continue
        low, high = max(start, info.start), min(stop, info.start + info.size)
        if low < high:
            parameter[low - info.start : high - info.start].copy_(rows[low - start : high - start])
    return parameter


def _row_blocks(shape: torch.Size) -> list[tuple[int, int]]:
    """Cut the rows of a shape into blocks whose draws one after the other equal one draw of the whole, bit for bit.

    torch fills 16 normal numbers at a time and treats the last 16 of a tensor apart, so blocks are multiples of
    16 elements, here of 16 rows, and the last one is no shorter than the others.
    """
    rows, columns = shape[0], max(shape[1:].numel(), 1)
    step = max(BLOCK_ELEMENTS // columns // 16 * 16, 16)
    starts = list(range(0, max(rows - step + 1, 1), step))
    return list(zip(starts, [*starts[1:], rows], strict=True))
