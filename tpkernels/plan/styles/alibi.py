"""ALiBi: a bias for each head, computed outside of the attention blocks for all heads and passed to each block."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from tpkernels.errors import PlanError

NAME = "alibi"
OF_MPT = "position_bias"  # of 3 dims; that of T5, made inside the blocks for the rank's heads, has 4


class LocalAlibiSlopes:
    """A pre-hook that replaces a bias [N * heads, ...] of an attention block by that of this rank's heads.

    Args:
        module: the block, whose forward has an argument `alibi`, or `position_bias` as that of MPT.
        heads: the number of heads of all ranks.
        start, count: the first head of this rank, and their number.
    """

    def __init__(self, module: nn.Module, heads: int, start: int, count: int) -> None:
        parameters = list(inspect.signature(type(module).forward).parameters)
        self.name = NAME if NAME in parameters else OF_MPT
        self.place = parameters.index(self.name) - 1
        self.heads, self.start, self.count = heads, start, count

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Replace the argument, positional or keyword.

        Raises:
            PlanError: it has not a bias for each head.
        """
        if self.place < len(args):
            return (*args[: self.place], self._own(args[self.place]), *args[self.place + 1 :]), kwargs
        return args, kwargs | ({self.name: self._own(kwargs[self.name])} if self.name in kwargs else {})

    def _own(self, bias: Tensor | None) -> Tensor | None:
        if bias is None or (self.name == OF_MPT and bias.dim() != 3):
            return bias
        if bias.size(0) % self.heads:
            raise PlanError(
                f"{self.name} must hold a bias for each of {self.heads} heads, got shape {list(bias.shape)}"
            )
        by_head = bias.unflatten(0, (-1, self.heads))  # type: ignore[no-untyped-call]
        own: Tensor = by_head.narrow(1, self.start, self.count).flatten(0, 1)
        return own


def takes_alibi(module: nn.Module) -> bool:
    """Whether an attention block takes such a bias."""
    return not {NAME, OF_MPT}.isdisjoint(inspect.signature(type(module).forward).parameters)
