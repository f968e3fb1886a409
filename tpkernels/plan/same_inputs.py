"""Whether the ranks compute the same: compared once, in the first training forward of a sharded model.

With other inputs, weights or random numbers on some ranks training goes wrong without an error: sums and gathers give
all ranks one loss. Random numbers are not those of torch alone: some models mask (SpecAugment) or skip layers by
generators of numpy or Python, which differ unless they are seeded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from tpkernels import ops
from tpkernels.comm.group import Group
from tpkernels.errors import RankMismatchError
from tpkernels.layers.convert import group_of
from tpkernels.layers.embedding import VocabParallelEmbedding
from tpkernels.layers.linear import ColumnParallelLinear

NOTED = (ColumnParallelLinear, VocabParallelEmbedding)  # the layers whose inputs are replicated
NEAR, NEAR_HALF = 2e-5, 3e-2  # of the input's norm: the ranks' CPUs need not round alike


class SameInputs:
    """Hooks that compare the last inputs of sharded tables and of column layers. One small collective in all."""

    def __init__(self, model: nn.Module, group: Group) -> None:
        self._group, self._compared = group, group.world_size == 1
        self._last: dict[type, Tensor] = {}
        self._handles: list[Any] = []
        model.register_forward_pre_hook(self.begin)
        model.register_forward_hook(self.end, always_call=True)

    def begin(self, model: nn.Module, args: Any) -> None:
        """Pre-hook of the model: note the inputs of layers that get replicated ones."""
        if not self._compared and model.training and not is_compiling():
            layers = [module for module in model.modules() if isinstance(module, NOTED)]
            self._handles = [m.register_forward_pre_hook(self._note) for m in layers]

    def _note(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            self._last[next(kind for kind in NOTED if isinstance(module, kind))] = args[0].detach()

    def end(self, model: nn.Module, args: Any, output: Any) -> None:
        """Hook of the model: compare over the ranks.

        Raises:
            RankMismatchError: inputs differ; on every rank.
        """
        for handle in self._handles:
            handle.remove()
        found, self._handles, self._last = list(self._last.values()), [], {}
        if not found or output is None or (found[0].is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        self._compared, group = True, group_of(model, self._group)
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
