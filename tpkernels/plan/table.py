"""A plan as a table of the modules that it shards over a number of ranks; it needs no ranks."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from torch import nn

from tpkernels.layers.base import Cut
from tpkernels.plan.resolved import Resolved
from tpkernels.plan.rules import Plan
from tpkernels.plan.styles.base import is_linear


@dataclass
class PlanRow:
    """Modules whose names differ by numbers only and that are sharded alike.

    Attributes:
        name: with * in the place of the numbers.
        style: its name; "whole" where the plan has no rule.
        shape: of the weight.
        parts: the number of outputs (or rows, experts) or inputs of each rank, "" if replicated.
        count: the number of modules.
    """

    name: str
    style: str
    shape: str
    parts: str
    count: int = 0


@dataclass
class PlanTable:
    """The result of `plan_table`.

    Attributes:
        source: of the plan.
        rows: one for modules that are sharded alike.
        heads: {how they are sharded: number of attention blocks}.
        totals: the number of parameters, and of those on the rank with the most.
    """

    source: str
    rows: list[PlanRow] = field(default_factory=list)
    heads: dict[str, int] = field(default_factory=dict)
    totals: tuple[int, int] = (0, 0)


def plan_table(model: nn.Module, plan: Plan, R: int) -> PlanTable:
    """Return how a plan shards a model over R ranks.

    Args:
        model: the full one; parameters may be on the meta device.
        plan: for it.
        R: the number of ranks.

    Raises:
        PlanError: the plan does not fit the model or R.
    """
    resolved = Resolved.of(model, plan.styles(model), R)
    table = PlanTable(plan.source, heads=resolved.heads())
    rows: dict[tuple[str, ...], PlanRow] = {}
    parameter_cuts = resolved.parameter_cuts()
    seen: set[int] = set()
    for name, module in resolved.modules.items():
        _count(table, module, seen, parameter_cuts.get(name, {}), R)
        own = list(module.parameters(recurse=False))
        if not own or (name not in resolved.styles and not is_linear(module) and not isinstance(module, nn.Embedding)):
            continue
        style, cut = resolved.styles.get(name), resolved.cuts.get(name)
        sizes = [0] if cut is None else cut.info(R).sizes
        parts = "" if cut is None else f"{('out', 'in')[cut.dim]} {'+'.join(map(str, sizes))}"
        shape = " x ".join(map(str, own[0].shape))
        key = (re.sub(r"\d+", "*", name), style.name if style else "row" if cut else "whole", shape, parts)
        row = rows.setdefault(key, PlanRow(*key))
        row.count += 1
    table.rows = list(rows.values())
    return table


def _count(table: PlanTable, module: nn.Module, seen: set[int], cuts: dict[str, Cut], R: int) -> None:
    """Add a module's parameters to the totals, tied ones once; those without a cut are replicated."""
    full, local = table.totals
    for name, parameter in module.named_parameters(recurse=False):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            cut, numel = cuts.get(name), parameter.numel()
            full += numel
            local += numel if cut is None else numel // cut.full_size * max(cut.info(R).sizes)
    table.totals = (full, local)
