"""The doors of sequence parallel: where in a layer tokens are gathered, and where they are cut again.

gather     in front of column layers, which see all tokens; the rows behind them cut
scatter    a row layer: its sums are scattered over the tokens
whole      any other module with weights: it sees all tokens, and its result is cut
summed     a norm: it sees this rank's tokens, so the gradients of its parameters are summed
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tpkernels.errors import PlanError
from tpkernels.plan.styles.style import Style

HIDDEN = ("hidden_states", "x", "hidden_state", "inputs", "input")
INSIDE = {"column": "column", "packed_column": "column", "row": "row", "sum_grad": "summed"}
Change = Callable[[Tensor], Tensor]


class AtTheDoor:
    """A hook that changes the hidden states a module gets."""

    def __init__(self, change: Change) -> None:
        self.change = change

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Change the first argument, or the keyword that stands for it, wherever the same tensor is given."""
        found = args[0] if args else next((kwargs[name] for name in HIDDEN if name in kwargs), None)
        if not isinstance(found, Tensor):
            raise PlanError(f"sequence_parallel: {type(module).__name__} was called without hidden states")
        changed = self.change(found)
        kwargs = {name: changed if value is found else value for name, value in kwargs.items()}
        return tuple(changed if value is found else value for value in args), kwargs


class BehindIt:
    """A hook that changes the hidden states a module returns, alone or as the first of several things."""

    def __init__(self, change: Change) -> None:
        self.change = change

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Change the output."""
        if isinstance(output, Tensor):
            return self.change(output)
        if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
            return type(output)((self.change(output[0]), *output[1:]))
        raise PlanError(f"sequence_parallel: {type(module).__name__} returned no hidden states")


@dataclass
class Door:
    """A module of a layer, and what becomes of tokens there."""

    module: nn.Module
    kind: str

    def hang(self, gather: Change, cut: Change) -> list[Any]:
        """Put hooks on the module that gather in front of it and cut behind it, as the kind says."""
        handles = []
        if self.kind in ("gather", "whole"):
            handles.append(self.module.register_forward_pre_hook(AtTheDoor(gather), with_kwargs=True))
        if self.kind in ("scatter", "whole"):
            handles.append(self.module.register_forward_hook(BehindIt(cut)))
        return handles


def doors(module: nn.Module, styles: dict[nn.Module, Style], *, deep: bool) -> Iterator[Door]:
    """Return the doors of what lies inside of a layer.

    Args:
        module: the layer, or a module in it that is open.
        styles: of the modules that have one.
        deep: whether modules in which norms lie beside cut layers are opened, too; else they are whole.
    """
    for child in module.children():
        holders = [m for m in child.modules() if any(True for _ in m.parameters(recurse=False))]
        kinds = {_kind(m, styles) for m in holders}
        if not holders:
            continue
        if holders == [child] and kinds <= {"column", "row", "summed", "norm"}:
            yield Door(child, {"column": "gather", "row": "scatter"}.get(kinds.pop(), "summed"))
        elif "column" in kinds and kinds <= {"column", "row", "summed"} and child not in holders:
            yield Door(child, "gather")
            yield from (Door(m, "scatter") for m in holders if _kind(m, styles) == "row")
        elif (kinds <= {"row", "norm"} or (deep and kinds <= {*INSIDE.values(), "norm"})) and child not in holders:
            yield from doors(child, styles, deep=deep)
        else:
            yield Door(child, "whole")


def _kind(module: nn.Module, styles: dict[nn.Module, Style]) -> str:
    """What a module with parameters of its own is: a cut linear, a norm inside of heads, a norm, or something else."""
    if module in styles:
        return INSIDE.get(styles[module].name, "other")
    leaf = next(module.children(), None) is None
    return "norm" if leaf and not isinstance(module, (nn.Linear, nn.Embedding)) else "other"
