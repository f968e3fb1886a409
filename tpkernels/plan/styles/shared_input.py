"""Column layers that take the same tensor sum its gradient once: query, key and value; gate and up.

    x --(identity; backward: all_reduce)--> x' --> q(x'), k(x'), v(x')

Each column layer by itself would sum its own part of the gradient of x over the ranks. What is summed together is found
by the tensor and not by its name: only layers that were handed one and the same tensor, within one call of the module
around them, share. Everything else that uses x goes on seeing x. Under torch.compile every layer sums by itself.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.compiler import is_compiling

from tpkernels.comm.group import Group
from tpkernels.layers import sum_gradient


class SharedInput:
    """The inputs that the column layers of one module have in common while that module runs."""

    def __init__(self, grad_codec: str) -> None:
        self.grad_codec = grad_codec
        # (what a layer was handed, its version, what it uses); nothing is kept between calls
        self._seen: list[tuple[Tensor, int, Tensor]] | None = None

    def enter(self, x: Tensor, group: Group) -> Tensor | None:
        """Return x with a gradient that is summed over the ranks, the same tensor for the same x; None outside.

        The group is that of the layer that asks.
        """
        if self._seen is None:
            return None
        version = 0 if x.is_inference() else x._version  # of one modified in place since, the gradient is another
        for seen, at, entered in self._seen:
            if seen is x and at == version:
                return entered
        (entered,) = sum_gradient(x, group=group, grad_codec=self.grad_codec)
        self._seen.append((x, version, entered))
        return entered

    def begin(self, module: nn.Module, args: Any) -> None:
        """Hook in front of the module."""
        if not is_compiling():
            self._seen = []

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """Hook behind it, also when it raised."""
        self._seen = None
