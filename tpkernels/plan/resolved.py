"""Resolved: the sizes that follow from a model, the styles of its modules and the number of ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from torch import nn

from tpkernels.layers.base import Cut
from tpkernels.plan.styles.base import Style
from tpkernels.plan.styles.blocks import Block, find_blocks


@dataclass(frozen=True)
class Resolved:
    """How a full model is sharded over `world_size` ranks; the model is not changed.

    Attributes:
        modules: all of the model, by name.
        styles: of those that have one.
        blocks: the attention blocks whose heads are sharded.
        cuts: of the weight [N, K] of each sharded linear, of each table, and of the experts of each mixture.
        world_size: the number of ranks.
    """

    modules: dict[str, nn.Module]
    styles: dict[str, Style]
    blocks: list[Block]
    cuts: dict[str, Cut]
    world_size: int

    @classmethod
    def of(cls, model: nn.Module, styles: dict[str, Style], R: int) -> Self:
        """Compute the blocks and cuts of a model over R ranks.

        Args:
            model: the full one; parameters may be on the meta device.
            styles: {module name: style}, as `Plan.styles` returns them.
            R: the number of ranks.

        Raises:
            PlanError: a style does not fit its module, or there are not enough heads or units.
        """
        modules = dict(model.named_modules())
        blocks = list(find_blocks(modules, styles))
        cuts: dict[str, Cut] = {}
        for block in blocks:
            cuts |= block.cuts(R)
            if block.name not in styles:
                block.own_cuts(R)
        for name, style in styles.items():
            style.check(name, modules[name], R)
            cut = style.cut(name, modules[name], R) if name not in cuts else None
            if cut is not None:
                cuts[name] = cut
        return cls(modules, styles, blocks, cuts, R)

    def parameter_cuts(self) -> dict[str, dict[str, Cut]]:
        """Return how the parameters of modules are sharded, those of attention blocks too: {module: {name: Cut}}."""
        R, styles = self.world_size, self.styles
        own = {block.name: block.own_cuts(R) for block in self.blocks if block.name not in styles}
        rows = {name: {"weight": cut} for name, cut in self.cuts.items() if name not in styles}
        return own | rows | {n: s.parameter_cuts(self.modules[n], self.cuts.get(n), R) for n, s in styles.items()}

    def local_attributes(self, rank: int) -> dict[str, dict[str, Any]]:
        """Return the attributes that count sharded features, with the values of a rank: {module: {name: value}}."""
        found = {block.name: block.local_attributes(self.world_size, rank) for block in self.blocks}
        for name, style in self.styles.items():
            sizes = style.local_sizes(self.modules[name], self.cuts.get(name), self.world_size, rank)
            found[name] = found.get(name, {}) | sizes
        return found

    def heads(self) -> dict[str, int]:
        """Return the number of attention blocks by how their heads are sharded, for people."""
        found: dict[str, int] = {}
        for block in self.blocks:
            how = block.heads.text(self.world_size)
            found[how] = found.get(how, 0) + 1
        return found
