"""The boundaries of sequence parallel: the modules of a layer at which tokens are gathered or sharded again.

gather     in front of column layers, which take all tokens; the rows behind them scatter
scatter    a row layer: its sums are scattered over the tokens
full       any other module with weights: it takes all tokens, and its result is sharded
summed     a norm: it takes this rank's tokens, so the gradients of its parameters are summed
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tpkernels.errors import PlanError
from tpkernels.plan.styles.base import Style

HIDDEN = ("hidden_states", "x", "hidden_state", "inputs", "input")
Change = Callable[[Tensor], Tensor]


class PreHook:
    """A forward pre-hook that changes the hidden states of a module's arguments."""

    def __init__(self, change: Change) -> None:
        self.change = change

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Change the first argument, or the keyword in its place, in every argument that is the same tensor.

        Raises:
            PlanError: there is no such tensor.
        """
        found = args[0] if args else next((kwargs[name] for name in HIDDEN if name in kwargs), None)
        if not isinstance(found, Tensor):
            raise PlanError(f"sequence_parallel: {type(module).__name__} was called without hidden states")
        changed = self.change(found)
        kwargs = {name: changed if value is found else value for name, value in kwargs.items()}
        return tuple(changed if value is found else value for value in args), kwargs


class PostHook:
    """A forward hook that changes the hidden states a module returns, alone or as the first of a tuple or list."""

    def __init__(self, change: Change) -> None:
        self.change = change

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Change the output.

        Raises:
            PlanError: it has no hidden states.
        """
        if isinstance(output, Tensor):
            return self.change(output)
        if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
            return type(output)((self.change(output[0]), *output[1:]))
        raise PlanError(f"sequence_parallel: {type(module).__name__} returned no hidden states")


@dataclass
class Boundary:
    """A module of a layer, and the kind of boundary that it is: "gather", "scatter", "full" or "summed"."""

    module: nn.Module
    kind: str

    def register_hooks(self, gather: Change, shard: Change) -> list[Any]:
        """Register hooks that gather tokens in front of the module and shard them behind it, as the kind demands.

        Args:
            gather: [B, S / R, D] -> [B, S, D].
            shard: its inverse.

        Returns:
            the handles of the hooks.
        """
        handles = []
        if self.kind in ("gather", "full"):
            handles.append(self.module.register_forward_pre_hook(PreHook(gather), with_kwargs=True))
        if self.kind in ("scatter", "full"):
            handles.append(self.module.register_forward_hook(PostHook(shard)))
        return handles


def find_boundaries(module: nn.Module, styles: dict[nn.Module, Style], *, deep: bool) -> Iterator[Boundary]:
    """Return the boundaries inside a layer.

    Args:
        module: the layer, or a module in it whose children are boundaries.
        styles: of the modules that have one.
        deep: whether to look for boundaries inside modules with norms beside sharded layers, too; else these are
            "full".
    """
    for child in module.children():
        holders = [m for m in child.modules() if any(True for _ in m.parameters(recurse=False))]
        kinds = {_kind(m, styles) for m in holders}
        if not holders:
            continue
        if holders == [child] and kinds <= {"column", "row", "summed", "norm"}:
            yield Boundary(child, {"column": "gather", "row": "scatter"}.get(kinds.pop(), "summed"))
        elif "column" in kinds and kinds <= {"column", "row", "summed"} and child not in holders:
            yield Boundary(child, "gather")
            yield from (Boundary(m, "scatter") for m in holders if _kind(m, styles) == "row")
        elif (kinds <= {"row", "norm"} or (deep and "other" not in kinds)) and child not in holders:
            yield from find_boundaries(child, styles, deep=deep)
        else:
            yield Boundary(child, "full")


def _kind(module: nn.Module, styles: dict[nn.Module, Style]) -> str:
    """The role of a module with parameters of its own: that of its style, else "norm" or "other"."""
    if module in styles:
        return styles[module].role
    leaf = next(module.children(), None) is None
    return "norm" if leaf and not isinstance(module, (nn.Linear, nn.Embedding)) else "other"
