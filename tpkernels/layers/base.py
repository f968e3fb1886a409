"""What all parallel layers share: a group that survives copying and pickling, marked shards, initialisation.

A layer holds its `Group`, which is a live object of this process. A deep copy shares it. A pickle holds its name and
label, and takes the open group of that name, else of that label, where it is loaded ("world", all ranks, is opened when
it is not). Rank and number of ranks must be those of the pickle, because the weights are this rank's. `set_group` puts
another group in place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self
from weakref import WeakSet

import torch
from torch import Tensor, nn

from tpkernels import ops
from tpkernels.comm.group import Group, resolve
from tpkernels.shard import Runs, ShardInfo, mark_shard, shard_info

from .parametrized import CutParametrizations, commutes, originals

BLOCK_ELEMENTS = 1 << 20

_with_shards: WeakSet[ParallelModule] = WeakSet()


@dataclass(frozen=True)
class Cut:
    """How one parameter of a layer is sharded: the part of ShardInfo that does not depend on the group.

    Attributes:
        dim, full_size, unit, runs: as in ShardInfo.
    """

    dim: int
    full_size: int
    unit: int = 1
    runs: tuple[Runs, ...] = ()

    def info(self, R: int, rank: int = 0, name: str = "", label: str = "") -> ShardInfo:
        """Return the ShardInfo of one of R ranks.

        Args:
            R, rank: the number of ranks, and the one.
            name, label: of the group.
        """
        return ShardInfo(self.dim, self.full_size, R, rank, name, label, self.unit, self.runs)


class ParallelModule(nn.Module):
    """A module of which each rank of a group holds its shards. Subclasses fill `_cuts`: {parameter name: Cut}."""

    group: Group
    _cuts: dict[str, Cut]
    _place: tuple[int, int]

    def __init__(self, group: Group | None) -> None:
        super().__init__()
        self.group = resolve(group)
        self._place = (self.group.rank, self.group.world_size)
        self._cuts = {}

    def set_group(self, group: Group) -> None:
        """Make the layer use another group, in which this process has the same rank: one opened anew, for example.

        Raises:
            ValueError: rank or number of ranks differ, so the shards would be another rank's.
        """
        rank, world_size = self._place
        if (group.rank, group.world_size) != self._place:
            raise ValueError(
                f"set_group: expected rank {rank} of {world_size}, whose shard the layer holds, "
                f"got rank {group.rank} of {group.world_size}"
            )
        self.group = group
        self._mark()

    def _add_parameter(self, name: str, shape: tuple[int, ...], cut: Cut | None, **kwargs: Any) -> None:
        """Register an uninitialised parameter that holds this rank's shard of a tensor of the given full shape."""
        sizes = list(shape)
        if cut is not None:
            self._cuts[name] = cut
            sizes[cut.dim] = self._info(cut).size
        self.register_parameter(name, nn.Parameter(torch.empty(sizes, **kwargs)))
        self._mark()

    def _copy_from(self, module: nn.Module) -> Self:
        """Take this rank's shards of the parameters of the unsharded module, with their dtype, device and flags."""
        for name in list(self._parameters):
            source = getattr(module, name)
            if source is not None:
                setattr(self, name, self._local(source, self._cuts.get(name)))
        self._mark()
        return self.train(module.training)

    def _local(self, full: Tensor, cut: Cut | None) -> nn.Parameter:
        """Return a new parameter with this rank's shard of a full one, or with all of it."""
        value = full.detach() if cut is None else self._info(cut).part(full.detach())
        value = value.clone(memory_format=torch.contiguous_format)
        return nn.Parameter(value, requires_grad=full.requires_grad)

    def _full(self, name: str) -> Tensor:
        """Return the unsharded parameter on every rank, detached. Collective over the group."""
        parameter: Tensor = getattr(self, name)
        value = parameter.detach()
        cut = self._cuts.get(name)
        if cut is None:
            return value.clone()
        if not cut.runs:
            return gather(value, cut.dim, cut.full_size, self.group, unit=cut.unit)
        info = self._info(cut)
        return info.assemble(torch.split(ops.all_gather(value, cut.dim, group=self.group), info.sizes, cut.dim))

    def _info(self, cut: Cut) -> ShardInfo:
        g = self.group
        return cut.info(g.world_size, g.rank, g.name, g.label)

    def _mark(self) -> None:
        """Set the ShardInfo of sharded parameters: torch drops attributes when it makes new Parameter objects."""
        for name, cut in self._cuts.items():
            for tensor in self._tensors_of(name):
                mark_shard(tensor, self._info(cut))
        if self._cuts and self.group.world_size > 1:
            _with_shards.add(self)

    def _tensors_of(self, name: str) -> list[Tensor]:
        """Return the parameter of that name, or those from which a parametrization computes it."""
        parameter = self._parameters.get(name)
        return originals(self, name) if parameter is None else [parameter]

    def _check(self, where: str) -> None:
        """Raise ValueError unless every sharded parameter exists and has the size of this rank's shard."""
        for name, cut in self._cuts.items():
            found = [self._parameters[name]] if name in self._parameters else originals(self, name)
            size = self._info(cut).size
            wrong = [list(t.shape) for t in found if t is not None and t.size(cut.dim) != size]
            if wrong or not found:
                got = f"shape {wrong[0]}" if found else "no such parameter (deleted, or computed by a hook?)"
                raise ValueError(
                    f"{where}.{name} ({type(self).__name__}): expected this rank's {size} of {cut.full_size} indices "
                    f"of dimension {cut.dim}, got {got}"
                )
            if name in self._parameters:
                continue
            chains: Any = self.parametrizations
            if len(chains[name]) != chains.checked[name] and not commutes(chains[name], cut.dim):
                raise ValueError(f"{where}.{name} ({type(self).__name__}) has a parametrization that needs the whole")

    # Below: where torch, or an assignment, replaces the parameter objects of a module.

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As nn.Module does; a sharded parameter can be replaced by this rank's shard only.

        Raises:
            ValueError: it has another size; a hook would compute a cut parameter from it (pruning, old weight norm).
        """
        cuts: dict[str, Cut] = self.__dict__.get("_cuts", {})
        cut, of = cuts.get(name), next((n for n in cuts if name in (f"{n}_orig", f"{n}_g", f"{n}_v")), None)
        if of is not None:
            self._put_back(of)
            raise ValueError(
                f"{type(self).__name__}: {of} is cut, and pruning, weight_norm and spectral_norm of torch.nn.utils "
                f"would compute with a part as if it were the whole: apply and make them permanent before the cut"
            )
        if cut is not None and param is not None and param.size(cut.dim) != self._info(cut).size:
            raise ValueError(
                f"{type(self).__name__}: {name} must be this rank's {self._info(cut).size} of {cut.full_size} indices "
                f"of dimension {cut.dim}, got shape {list(param.shape)}: take the part that its ShardInfo names"
            )
        super().register_parameter(name, param)
        if cut is not None and param is not None:
            mark_shard(param, self._info(cut))

    def __delattr__(self, name: str) -> None:
        if name in self._cuts and self._parameters.get(name) is not None:  # restored where a parametrization is refused
            self.__dict__["_taken"] = {name: dict(self._parameters)}
        super().__delattr__(name)

    def _put_back(self, name: str) -> None:
        """Undo that a parameter was deleted, its place in the order included."""
        before: dict[str, nn.Parameter | None] = self.__dict__.pop("_taken", {}).get(name, {})
        self._parameters.update({n: before[n] for n in before.keys() - self._parameters.keys()})
        for n in [*before]:
            self._parameters[n] = self._parameters.pop(n)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "parametrizations" and isinstance(value, nn.ModuleDict):
            value = CutParametrizations(self, self._dim_of)
        super().__setattr__(name, value)

    def _dim_of(self, name: str) -> int | None:
        return self._cuts[name].dim if name in self._cuts else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._mark()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._cuts and hasattr(destination, "_metadata"):  # torch.save keeps it
            destination._metadata.setdefault(prefix[:-1], {})["tpk_place"] = self._place

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        saved = local_metadata.get("tpk_place", self._place)
        shards = [prefix + name for name in self._cuts if prefix + name in state_dict]
        if saved != self._place and any(shard_info(state_dict[key]) is None for key in shards):
            lists[2].append(
                f"{', '.join(shards)}: the shards of rank {saved[0]} of {saved[1]}, expected those of rank "
                f"{self._place[0]} of {self._place[1]} or full tensors: save each rank's under a name of its own, or "
                f"take tpkernels.checkpoint.save and load"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)
        self._mark()

    __repr__ = nn.Module.__repr__  # also of a converted module whose class has one

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        g = self.group
        if (g.rank, g.world_size) != self._place:
            rank, world_size = self._place
            raise ValueError(
                f"{type(self).__name__}: pickled by rank {rank} of {world_size}, whose shard it holds, got group "
                f"{g.label!r} with rank {g.rank} of {g.world_size}: load each rank's own pickle, or a checkpoint"
            )
        self._mark()  # a deep copy of a Parameter has no attributes


def marked_shards() -> list[Tensor]:
    """Return the parameters of all layers of this process that hold a shard of a tensor cut over two ranks or more."""
    # Of modules, not of parameters: torch.utils.swap_tensors refuses a tensor that a weak reference knows.
    return [tensor for module in list(_with_shards) for name in module._cuts for tensor in module._tensors_of(name)]


def mark_shards(model: nn.Module) -> None:
    """Set the ShardInfo of all sharded parameters of a model again.

    Raises:
        ValueError: a layer has lost a parameter, or holds one that is not its shard; names it.
    """
    for name, module in model.named_modules():
        if isinstance(module, ParallelModule):
            module._check(name)
            module._mark()


def gather(shard: Tensor, dim: int, full_size: int, group: Group, *, unit: int = 1) -> Tensor:
    """Return the full tensor of a sharded one on every rank; its gradient is this rank's shard (replicated use).

    Args:
        shard: this rank's.
        dim: the sharded dimension.
        full_size: its size in the full tensor.
        group: over which it is sharded.
        unit: as many neighbouring indices are one item of the rule.
    """
    if unit == 1:
        return ops.all_gather(shard, dim, group=group, dim_size=full_size, grad="split")
    # As a dimension of their own the units follow the plain rule.
    first, shape = dim % shard.dim(), shard.shape
    units = shard.reshape(*shape[:first], shape[first] // unit, unit, *shape[first + 1 :])
    full = ops.all_gather(units, first, group=group, dim_size=full_size // unit, grad="split")
    return full.flatten(first, first + 1)


@torch.no_grad()
def init_shard_(parameter: Tensor, fill: Callable[[Tensor], Any], *, by_rows: bool = False) -> Tensor:
    """Fill a parameter with its shard of the tensor that `fill` draws.

    With the same seed on all ranks the ranks together hold exactly the tensor that one process would have drawn,
    whatever their number, and their generators end in the state in which that one process's would be.

    Args:
        parameter: a shard (marked with ShardInfo) or a replicated tensor, in place.
        fill: an in-place initialiser such as `lambda w: nn.init.normal_(w, std=0.02)`.
        by_rows: promises that fill may be called on blocks of rows one after the other, as is true for uniform_ and
            normal_ with bounds that do not depend on the number of rows (not for trunc_normal_, which draws until
            all fit). Then, on the CPU, no more than a few MiB besides the parameter are in use; otherwise, and on
            other devices, whose generators give other numbers in pieces, the full tensor is drawn and sharded.

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
    if info.runs or not (by_rows and parameter.device.type == "cpu"):
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
    """Divide the rows of a shape into blocks whose draws one after the other equal one draw of all, bit for bit.

    torch fills 16 normal numbers at a time and treats the last 16 of a tensor apart, so blocks are multiples of
    16 elements, here of 16 rows, and the last one is no shorter than the others.
    """
    rows, columns = shape[0], max(shape[1:].numel(), 1)
    step = max(BLOCK_ELEMENTS // columns // 16 * 16, 16)
    starts = list(range(0, max(rows - step + 1, 1), step))
    return list(zip(starts, [*starts[1:], rows], strict=True))
