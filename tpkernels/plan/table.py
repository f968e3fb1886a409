"""A plan as a table: what is cut how, for so many ranks, without any rank."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from torch import nn

from tpkernels.layers.base import Cut
from tpkernels.plan.cuts import all_cuts, is_linear
from tpkernels.plan.rules import Plan
from tpkernels.plan.styles.heads import find_blocks


@dataclass
class PlanRow:
    """Modules that differ by numbers in their names only and are cut alike.

    Attributes:
        name: with * in the place of the numbers. count: how many modules.
        style: as the plan says it; "whole" where it says nothing.
        shape: of the weight. parts: how many outputs (or rows, experts) or inputs each rank has, "" if whole.
    """

    name: str
    style: str
    shape: str
    parts: str
    count: int = 0


@dataclass
class PlanTable:
    """What `plan_table` found. heads: {how: number of blocks}; totals: parameters, and those on the fullest rank."""

    source: str
    rows: list[PlanRow] = field(default_factory=list)
    heads: dict[str, int] = field(default_factory=dict)
    totals: tuple[int, int] = (0, 0)


def plan_table(model: nn.Module, plan: Plan, R: int) -> PlanTable:
    """Describe how a plan cuts a model over R ranks.

    Args:
        model: whole; parameters may be on the meta device.
        plan: for it.
        R: the number of ranks.

    Raises:
        PlanError: the plan does not fit the model or R.
    """
    styles = plan.styles(model)
    modules = dict(model.named_modules())
    blocks = list(find_blocks(modules, styles))
    cuts = all_cuts(modules, styles, blocks, R)
    table = PlanTable(plan.source)
    for block in blocks:
        how = block.heads.text(R)
        table.heads[how] = table.heads.get(how, 0) + 1
    rows: dict[tuple[str, ...], PlanRow] = {}
    seen: set[int] = set()
    for name, module in modules.items():
        own = list(module.parameters(recurse=False))
        if not own or (name not in styles and not is_linear(module) and not isinstance(module, nn.Embedding)):
            _count(table, module, seen, None, 1.0)
            continue
        style, cut = styles.get(name), cuts.get(name)
        sizes = [0] if cut is None else cut.info(R).sizes
        share = 1.0 if cut is None else max(sizes) / cut.full_size
        parts = "" if cut is None else f"{('out', 'in')[cut.dim]} {'+'.join(map(str, sizes))}"
        shape = " x ".join(map(str, own[0].shape))
        key = (re.sub(r"\d+", "*", name), style.name if style else "row" if cut else "whole", shape, parts)
        row = rows.setdefault(key, PlanRow(*key))
        row.count += 1
        _count(table, module, seen, cut, share)
    table.rows = list(rows.values())
    return table


def _count(table: PlanTable, module: nn.Module, seen: set[int], cut: Cut | None, share: float) -> None:
    """Add a module's parameters to the totals, tied ones once; the bias of a layer that is cut by inputs is whole."""
    whole, mine = table.totals
    for name, parameter in module.named_parameters(recurse=False):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            is_whole = cut is None or (name == "bias" and cut.dim == 1)
            whole += parameter.numel()
            mine += parameter.numel() if is_whole else round(parameter.numel() * share)
    table.totals = (whole, mine)
