"""One call of an op: its arguments and tensors, meta and real ones together, and dropouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

DROPOUTS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout}


@dataclass
class Step:
    """A call of the source `name`, or, with a rate, a dropout in the module `name` and the labels of what it drops."""

    name: str
    rate: float | None = None
    labels: Tensor | None = None


class Dropouts(TorchFunctionMode):
    """Notes the inputs and rates of dropouts, also in evaluation mode: of modules and of functions."""

    def __init__(self, note: Callable[[Tensor, float], None]) -> None:
        super().__init__()
        self.note = note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in DROPOUTS:
            given = dict(zip(("input", "p"), args, strict=False)) | kwargs
            self.note(given["input"], float(given.get("p", 0.5)))
        return func(*args, **kwargs)


def argument(func: Any, args: Any, kwargs: Any, name: str, default: Any) -> Any:
    """Return an argument of an op by its name in the schema.

    Args:
        func, args, kwargs: of the call.
        name: of the argument.
        default: returned where it is not given.
    """
    names = [argument.name for argument in func._schema.arguments]
    if name in names and names.index(name) < len(args):
        return args[names.index(name)]
    return kwargs.get(name, default)


def call(func: Any, args: Any, kwargs: Any) -> Any:
    """Call an op. torch's grouped products on meta tensors take bf16 only, those on the CPU every dtype."""
    if func is torch.ops.aten._grouped_mm.default:
        x, w = args[:2]
        if x.is_meta and x.dim() == 2 and w.dim() == 3:
            return x.new_empty(x.shape[0], w.shape[2])
    return func(*args, **kwargs)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists, dicts and dict-like outputs."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for v in value.values():
            yield from tensors_in(v)
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from tensors_in(v)


def side_by_side(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Let meta tensors (all that depends on parameters) and real ones (ids, positions, masks) meet in one op.

    Tensors that do not depend on parameters stay real, so that code can read their values.
    """
    device = kwargs.get("device")
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    on_meta = [t.is_meta for t in tensors]
    if device is not None and torch.device(device).type == "meta" and not any(on_meta):
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if any(on_meta) and not all(on_meta):
        args, kwargs = tree_map(
            lambda t: torch.empty_like(t, device="meta") if isinstance(t, Tensor) and not t.is_meta else t,
            (args, kwargs),
        )
    return args, kwargs
