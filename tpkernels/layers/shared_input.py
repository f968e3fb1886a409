"""Column layers that take the same tensor sum its gradient once: query, key and value; gate and up.

    x --(identity; backward: all_reduce)--> x' --> q(x'), k(x'), v(x')

Each column layer by itself would sum its own part of the gradient of x over the ranks. Inputs are compared by tensor
and not by name: layers share the sum if they get one and the same tensor within one call of the module around them. All
other users of x get x. Under torch.compile every layer sums by itself.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.compiler import is_compiling

from tpkernels.comm.group import Group

from .functions import sum_gradient


class SharedInput:
    """The inputs that the column layers of one module have in common while that module runs."""

    def __init__(self, grad_codec: str) -> None:
        self.grad_codec = grad_codec
        # (the input of a layer, its version, the tensor that replaces it); empty between calls
        self._seen: list[tuple[Tensor, int, Tensor]] | None = None

    def enter(self, x: Tensor, group: Group) -> Tensor | None:
        """Return x with a gradient that is summed over the ranks, the same tensor for the same x.

        Args:
            x: the input of a column layer, replicated.
            group: of that layer.

        Returns:
            None outside a call of the module around.
        """
        if self._seen is None:
            return None
        version = 0 if x.is_inference() else x._version  # after a change in place its gradient is another
        for seen, at, entered in self._seen:
            if seen is x and at == version:
                return entered
        (entered,) = sum_gradient(x, group=group, grad_codec=self.grad_codec)
        self._seen.append((x, version, entered))
        return entered

    def begin(self, module: nn.Module, args: Any) -> None:
        """Pre-hook of the module around."""
        if not is_compiling():
            self._seen = []

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """Hook of the module around, also when it raised."""
        self._seen = None
