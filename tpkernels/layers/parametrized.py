"""Parametrizations of torch (weight norm and the like) on a parameter of which each rank holds a part.

What computes every index of the cut dimension by itself commutes with the cut: the originals are cut as the parameter
was. Everything else (spectral norm, orthogonal matrices, norms over the cut dimension) is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .reference import Ref

PROBE = 4  # indices of the cut dimension that a parametrization is tried on


class CutParametrizations(nn.ModuleDict):
    """What torch puts on a layer as `parametrizations`; refuses those that need the full parameter."""

    def __init__(self, layer: nn.Module, dim_of: Callable[[str], int | None]) -> None:
        super().__init__()
        self._layer, self._dim_of = Ref(layer), dim_of
        self.checked: dict[str, int] = {}  # how many parametrizations of each parameter are known to commute

    def __setitem__(self, key: str, module: nn.Module) -> None:
        """Take in the parametrizations of a parameter.

        Raises:
            ValueError: they need the whole of a parameter that is cut. The layer is what it was before, but for values
                that torch has already replaced by what an inverse of the parametrization makes of them.
        """
        dim, layer = self._dim_of(key), self._layer.target
        if dim is not None and not commutes(module, dim):
            kind: Any = type(layer)
            delattr(kind, key)
            if not len(self):
                del layer._modules["parametrizations"]
                layer.__class__ = kind.__bases__[0]
            layer._put_back(key)  # type: ignore[operator]
            names = [type(child).__name__ for child in module.children()]
            raise ValueError(
                f"{type(layer).__name__}: {key} is cut along dimension {dim}, and {names} needs the full parameter, or "
                f"has parameters of its own: expected a parametrization that computes each index of that dimension by "
                f"itself"
            )
        layer.__dict__.pop("_taken", None)
        self.checked[key] = len(module)  # type: ignore[arg-type]
        super().__setitem__(key, module)
        layer._mark()  # type: ignore[operator]


def originals(layer: nn.Module, name: str) -> list[Tensor]:
    """Return the parameters from which a parametrized one is computed; none where it is not parametrized."""
    found = layer._modules.get("parametrizations")
    of = found[name] if isinstance(found, nn.ModuleDict) and name in found else None
    return [] if of is None else [t for t in (*of._parameters.values(), *of._buffers.values()) if t is not None]


@torch.no_grad()
def commutes(chain: Any, dim: int) -> bool:
    """Whether a list of parametrizations computes every index of a dimension from the same index of its originals."""
    if any(True for part in chain for _ in part.parameters()):
        return False  # their gradients would be those of this rank's part
    value: Tensor = chain()
    shape = [PROBE if d == dim % value.dim() else n for d, n in enumerate(value.shape)]
    parts = [copy.deepcopy(part).eval() for part in chain]
    with torch.random.fork_rng(devices=[]):
        try:
            first: Any = torch.randn(shape, dtype=value.dtype).to(value.device)
            for part in reversed(parts):
                first = part.right_inverse(first) if hasattr(part, "right_inverse") else first
            sources = [first] if isinstance(first, Tensor) else list(first)
            if any(s.dim() != len(shape) or s.size(dim) != PROBE for s in sources):
                return False
            want = _run(parts, sources)
            half = PROBE // 2
            for changed, kept in ((0, half), (half, 0)):
                others = [s.clone() for s in sources]
                for other in others:
                    other.narrow(dim, changed, half).mul_(-2).add_(1)
                got = _run(parts, others)
                if got.shape != want.shape or not got.narrow(dim, kept, half).equal(want.narrow(dim, kept, half)):
                    return False
        except Exception:  # it cannot be tried on another size, so it depends on that of this part
            return False
    return True


def _run(parts: list[Any], sources: list[Tensor]) -> Tensor:
    value: Tensor = parts[0](*sources)
    for part in parts[1:]:
        value = part(value)
    return value
