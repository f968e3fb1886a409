"""Whether the ranks compute the same thing: looked at once, in the first training forward of a cut model.

Ranks with other inputs, other weights or other random numbers train nonsense, and nothing else says so: sums and
gathers give all ranks one loss. Random numbers are not those of torch alone: some models mask (SpecAugment) or skip
layers by numpy's or Python's generators, which start anywhere where nobody seeds them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from tpkernels import ops
from tpkernels.comm.group import Group
from tpkernels.errors import RankMismatchError
from tpkernels.plan.styles.modules import Column, Vocab, group_of

NEAR, NEAR_HALF = 2e-5, 3e-2  # of the input's norm: the ranks' CPUs need not round alike


class SameInputs:
    """Hooks that compare what the cut tables and the column layers get last. One small collective in a model's life."""

    def __init__(self, model: nn.Module, group: Group) -> None:
        self._group, self._looked = group, group.world_size == 1
        self._last: dict[type, Tensor] = {}
        self._handles: list[Any] = []
        model.register_forward_pre_hook(self.begin)
        model.register_forward_hook(self.end, always_call=True)

    def begin(self, model: nn.Module, args: Any) -> None:
        """Let the layers that get what all ranks have alike note it."""
        if not self._looked and model.training and not is_compiling():
            layers = [module for module in model.modules() if isinstance(module, (Column, Vocab))]
            self._handles = [m.register_forward_pre_hook(self._note) for m in layers]

    def _note(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            self._last[Column if isinstance(module, Column) else Vocab] = args[0].detach()

    def end(self, model: nn.Module, args: Any, output: Any) -> None:
        """Compare.

        Raises:
            RankMismatchError: they differ; on every rank.
        """
        for handle in self._handles:
            handle.remove()
        found, self._handles, self._last = list(self._last.values()), [], {}
        if not found or output is None or (found[0].is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        self._looked, group = True, group_of(model, self._group)
        mine = torch.stack([_digest(x).to(group.device) for x in found])
        high, low = ops.all_reduce(torch.stack((mine, -mine)), group=group, op="max")
        half = any(x.is_floating_point() and x.dtype.itemsize < 4 for x in found)
        if bool((high + low > (NEAR_HALF if half else NEAR) * high[:, :1]).any()):
            raise RankMismatchError(
                f"{type(model).__name__} is cut over the ranks of group {group.label!r}, which must compute the same "
                f"between its cut layers; rank {group.rank} of {group.world_size} has other inputs or hidden states "
                f"than another rank: give all the same inputs and initial weights, and seed torch, numpy and random "
                f"alike (transformers.set_seed does)"
            )


def _digest(x: Tensor) -> Tensor:
    """The norm, and a sum, not much larger, that depends on every value and its place."""
    x = torch.nan_to_num(x.double().flatten())
    return torch.stack((x.norm(), x.dot(torch.arange(len(x), dtype=x.dtype, device=x.device).cos())))
