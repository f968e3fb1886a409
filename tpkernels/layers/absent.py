"""A module that another rank holds: its shapes without its parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tpkernels.errors import PlanError

from .reference import Ref


class Absent(nn.Module):
    """In the place of a module of another pipeline stage: without parameters, with all other attributes of it.

    `forward` returns zeros of the shapes that the module would return: what a forward computes before its first layer
    then has the right shapes on every stage. A layer is not called there: its forward raises.

    Args:
        module: the one that is held elsewhere; of it only a copy on the meta device is kept.
        name: of the module in its model.
        is_layer: whether it is one of the layers, which the stages' runs pass by.
    """

    def __init__(self, module: nn.Module, name: str, *, is_layer: bool) -> None:
        super().__init__()
        self._inner = Ref(on_meta(module))
        self.absent_name, self.is_layer = name, is_layer
        self.training = module.training

    def inner_names(self) -> list[str]:
        """The names in the model of the modules in it, itself included."""
        return [f"{self.absent_name}.{n}" if n else self.absent_name for n, _ in self._inner.target.named_modules()]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_inner":
                raise
            return getattr(self._inner.target, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Zeros in the shapes of the module's outputs, on the device of its first tensor.

        Raises:
            PlanError: it is a layer, or its shapes cannot be known without its values.
        """
        if self.is_layer:
            raise PlanError(
                f"{self.absent_name} belongs to another pipeline stage: call the model by tpkernels.pipeline.Pipeline"
            )
        given: list[Tensor] = []

        def to_meta(x: Any) -> Any:
            if isinstance(x, Tensor):
                given.append(x)
                return x.to("meta")
            return x

        with torch.no_grad():
            args, kwargs = tree_map(to_meta, (args, kwargs))
            try:
                output = self._inner.target(*args, **kwargs)
            except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
                raise PlanError(
                    f"{self.absent_name} belongs to another pipeline stage, and the shape of what it returns depends "
                    f"on values ({str(error).splitlines()[0]}): a model cannot be split by layer for such inputs"
                ) from error
        device = given[0].device if given else torch.device("cpu")
        return tree_map(
            lambda x: torch.zeros(x.shape, dtype=x.dtype, device=device) if isinstance(x, Tensor) else x, output
        )


def on_meta(module: nn.Module) -> nn.Module:
    """A copy of a module, without hooks, whose parameters and buffers are on the meta device."""
    new = module.__class__.__new__(module.__class__)
    new.__dict__.update(module.__dict__)
    for name, value in module.__dict__.items():
        if name.endswith("_hooks") or name.startswith(("_forward_hooks_", "_forward_pre_hooks_")):
            new.__dict__[name] = type(value)() if isinstance(value, dict) else value
    new.__dict__["_parameters"] = {
        name: None if p is None else nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
        for name, p in module._parameters.items()
    }
    new.__dict__["_buffers"] = {
        name: None if b is None else torch.empty_like(b, device="meta") for name, b in module._buffers.items()
    }
    new.__dict__["_modules"] = {
        name: None if child is None else on_meta(child) for name, child in module._modules.items()
    }
    return new
