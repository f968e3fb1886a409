"""Cuts into units that the plan itself states, for modules that do not say how many heads they have; and tables."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from tpkernels.errors import PlanError
from tpkernels.layers.base import Cut
from tpkernels.plan.styles.modules import CutModule, Vocab
from tpkernels.plan.styles.style import Style
from tpkernels.shard import part_size


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
