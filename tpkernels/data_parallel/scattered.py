"""Averages of which each rank gets its part, and parameters of which each rank has updated its part."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.futures import Future
from torch.utils.hooks import RemovableHandle

from tpkernels import ops
from tpkernels.comm.group import Group

from .buckets import Bucket
from .dense import DenseAverage, State
from .flat import announce, stepped
from .lane import Lane

# Modules of torch whose forward reads parameters of modules in them.
READS_PARTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


class ScatteredAverage(DenseAverage):
    """This rank's part of mean = (x_0 + ... + x_{R-1}) / R, every contribution packed by a codec.

    The sum of a part stays with its owner and is not packed again. With codec "none" the bits are those of
    DenseAverage, and with error feedback the residual is that of this rank's contribution alone. Arguments are its.
    """

    def average(self, bucket: Bucket, flat: Tensor, state: State, step: int, group: Group) -> Tensor:
        """This rank's even part of the average; a collective. Arguments and errors are those of DenseAverage.

        Where a value of any rank is not finite, the part that has it is not, on its owner only.
        """
        if not self.kinds:
            return ops.reduce_scatter(flat, group=group, op="avg", codec=self.codec)
        scale = 1.0 / group.world_size
        wire = ops.compress_parts(flat, self.codec, group=group, residual=state["residual"], scale=scale)
        return ops.reduce_scatter_packed(wire, flat.numel(), flat.dtype, group=group, codec=self.codec)

    def part(self, bucket: Bucket, mean: Tensor, position: int, group: Group) -> Tensor:
        """The values of one member in this rank's part, one dim: a view."""
        return bucket.piece(mean, position, group.world_size, group.rank)


class ParameterGather:
    """Puts the parts of all ranks into the parameters, one message for each bucket, those of the first layers first.

    Args:
        model: whose modules wait for their parameters before they run, if `late`.
        lane: carries the messages.
        buckets: of the parameters.
        late: let messages arrive beside the next forward pass. Until then the first value of a parameter is NaN, so
            that what reads it past its module's forward shows.
    """

    def __init__(self, model: nn.Module, lane: Lane, buckets: Sequence[Bucket], *, late: bool) -> None:
        self._lane, self._buckets, self._late = lane, buckets, late
        self._under_way: dict[int, tuple[Tensor, Future[Tensor]]] = {}
        self._hooks: list[RemovableHandle] = []
        if late:
            announce(self)
            self._listen(model)

    @torch.no_grad()
    def start(self) -> None:
        """Send the parts that this rank has updated; a collective over the lane."""
        R, rank = self._lane.group.world_size, self._lane.group.rank
        for k, bucket in reversed(list(enumerate(self._buckets))):
            mine = torch.zeros(bucket.numel // R, dtype=bucket.members[0].parameter.dtype, device=bucket.device)
            for i, member in enumerate(bucket.members):
                bucket.piece(mine, i, R, rank).copy_(stepped(member.parameter).detach())
                if self._late and member.numel:
                    member.parameter[(0,) * member.parameter.dim()] = torch.nan
            job = partial(ops.all_gather, mine, group=self._lane.group, dim_size=bucket.numel)
            self._under_way[k] = (mine, self._lane.submit(job))  # on a GPU the lane's stream reads `mine` later
        if not self._late:
            self.finish()

    def finish(self) -> None:
        """Wait for all parameters."""
        self.finish_some(list(self._under_way))

    @torch.no_grad()
    def finish_some(self, buckets: Iterable[int]) -> None:
        """Wait for the parameters of some buckets.

        Raises:
            TimeoutError, PeerLostError: a rank was late, or died.
        """
        for k in buckets:
            if (found := self._under_way.pop(k, None)) is not None:
                try:
                    whole = found[1].wait()
                except BaseException:
                    self._under_way.clear()  # the lane has no later result
                    raise
                for i, member in enumerate(self._buckets[k].members):
                    member.parameter.copy_(self._buckets[k].part(whole, i))

    def close(self) -> None:
        """Wait for all parameters, and remove the hooks from the model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.finish()

    def _listen(self, model: nn.Module) -> None:
        place = {id(m.parameter): k for k, bucket in enumerate(self._buckets) for m in bucket.members}
        for module in model.modules():
            parameters = module.parameters(recurse=isinstance(module, READS_PARTS))
            if needed := sorted({place[id(p)] for p in parameters if id(p) in place}, reverse=True):
                wait = _Wait(self, needed)
                self._hooks += [
                    module.register_forward_pre_hook(wait, prepend=True),
                    module.register_state_dict_pre_hook(wait),  # type: ignore[no-untyped-call]
                    module.register_load_state_dict_pre_hook(wait),  # type: ignore[no-untyped-call]
                ]


class _Wait:
    """A hook that waits for the parameters of a module; in a copy of the model it does nothing."""

    def __init__(self, gather: ParameterGather, buckets: list[int]) -> None:
        self._gather, self._buckets = weakref.ref(gather), buckets

    def __call__(self, *_: Any) -> None:
        if (gather := self._gather()) is not None:
            gather.finish_some(self._buckets)

    def __reduce__(self) -> Any:
        return _without_gather, ()


def _without_gather() -> Callable[..., None]:
    return _nothing


def _nothing(*_: Any) -> None:
    """In the place of a hook."""
