"""ALiBi: a bias for each head, made outside of the attention blocks for all heads and handed to each of them."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from tpkernels.errors import PlanError

NAME = "alibi"
OF_MPT = "position_bias"  # whose bias has 3 dims; T5's, which is made inside the blocks for the rank's heads, has 4


class OwnSlopes:
    """A hook that gives an attention block its own heads' of a bias [N * heads, ...].

    Args:
        module: the block, whose forward has an argument `alibi`, or `position_bias` as that of MPT.
        heads: how many of all ranks.
        start, count: this rank's.
    """

    def __init__(self, module: nn.Module, heads: int, start: int, count: int) -> None:
        parameters = list(inspect.signature(type(module).forward).parameters)
        self.name = NAME if NAME in parameters else OF_MPT
        self.place = parameters.index(self.name) - 1
        self.heads, self.start, self.count = heads, start, count

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Cut the argument, wherever it stands."""
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
    """Whether an attention block is handed such a bias."""
    return not {NAME, OF_MPT}.isdisjoint(inspect.signature(type(module).forward).parameters)
