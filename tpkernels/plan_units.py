"""Cuts into units that the plan itself states, for modules that do not say how many heads they have; and tables."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from tpkernels.layers.base import Cut
from tpkernels.plan_layers import CutModule, Vocab
from tpkernels.plan_styles import PlanError, Style, packed_sizes
from tpkernels.shard import packed_runs, part_size


def cut_in_units(name: str, dim: int, size: int, style: Style, R: int) -> Cut:
    """Return the cut of a dimension into `style.units` units, or of each packed projection into as many.

    Raises:
        PlanError: there are fewer units than ranks, or the size is no multiple of them.
    """
    check_units(name, style, R)
    sizes = packed_sizes(style, size, name) if style.name == "packed_column" else [size]
    if any(n % style.units for n in sizes):
        raise PlanError(f"Plan: {name} is to be cut into {style.units} units, of which {sizes} is no multiple")
    if len(sizes) == 1:
        return Cut(dim, size, size // style.units)
    return Cut(dim, size, 1, packed_runs(sizes, R, [n // style.units for n in sizes]))


def check_units(name: str, style: Style, R: int) -> None:
    """Raise PlanError when some ranks would have none of the units."""
    if style.units < R:
        raise PlanError(f"Plan: {name} is cut into {style.units} units, which leaves some of {R} ranks with none")


def check_counts(name: str, module: nn.Module, style: Style, R: int) -> None:
    """Raise PlanError unless the numbers that a style names are there and can be cut."""
    check_units(name, style, R)
    for count in style.counts:
        whole = getattr(module, count, None)
        if not isinstance(whole, int) or whole % style.units:
            raise PlanError(
                f"Plan: {count} of {name} ({type(module).__name__}) must be a multiple of {style.units}, got {whole}"
            )


def tell_counts(module: nn.Module, style: Style, R: int, rank: int) -> None:
    """Set the numbers of a module that count what is cut to what they are on this rank."""
    for name in style.counts:
        whole = getattr(module, name)
        setattr(module, name, part_size(whole, R, rank, whole // style.units))


class Table(CutModule):
    """An embedding cut along its columns: each rank looks up its own (a bias for each of its heads)."""

    weight: nn.Parameter
    padding_idx: int | None

    def forward(self, ids: Tensor) -> Tensor:
        """[...] -> [..., D / R]."""
        return nn.functional.embedding(ids, self.weight, self.padding_idx)

    def extra_repr(self) -> str:
        """Say the whole size and this rank's part of it."""
        full = self._cuts["weight"].full_size
        return f"{self.weight.size(0)}, {full} (shard {self.weight.size(1)}), rank={self._place[0]} of {self._place[1]}"


def check_ties(modules: dict[str, nn.Module], cuts: dict[str, Cut]) -> None:
    """A linear or embedding cannot stay whole when its weight is tied to one that is cut.

    Raises:
        PlanError: one would; names both.
    """
    holders: dict[int, list[str]] = {}
    for name, module in modules.items():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            holders.setdefault(id(module.weight), []).append(name)
    for names in holders.values():
        cut, whole = [n for n in names if n in cuts], [n for n in names if n not in cuts]
        if cut and whole:
            raise PlanError(
                f"Plan: {cut[0]} is cut, and {whole[0]}, which has the same weight, has no rule that cuts it"
            )


class IdTable(Vocab):
    """A table of ids that says why it cannot train single rows."""

    @property
    def qweight(self) -> Any:
        """There is none. Trainable tokens of peft look for it just before they take rows, by their whole numbers."""
        if sys._getframe(2).f_globals.get("__name__") == "peft.tuners.trainable_tokens.layer":
            raise PlanError(
                "trainable tokens do not work on a table of ids that is cut: leave it whole with the rule "
                "{its name: 'replicate'} (a head that is tied to it, too), or train the whole table by modules_to_save"
            )
        raise AttributeError(f"{type(self).__name__} has no attribute 'qweight'")
