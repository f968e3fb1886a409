"""The styles of modules whose parameters, if any, are replicated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from tpkernels.errors import PlanError
from tpkernels.layers.base import Cut
from tpkernels.layers.convert import Tied, convert
from tpkernels.plan.styles.base import CutSettings, Role, Style, check_forward, is_linear, sizes_of
from tpkernels.plan.styles.modules import CommonDropout, Summed, SumTail
from tpkernels.shard import part_size


class ReplicateStyle(Style):
    """replicate: the module stays as it is on every rank."""

    name: ClassVar[str] = "replicate"
    covers_children: ClassVar[bool] = True
    keeps_forward: ClassVar[bool] = True

    def apply(self, module: nn.Module, cut: Cut | None, settings: CutSettings, tied: Tied) -> None:
        """Leave the module as it is."""


class SumGradStyle(Style):
    """sum_grad: a module whose parameters meet sharded features; their gradients are summed over the ranks."""

    name: ClassVar[str] = "sum_grad"
    role: ClassVar[Role] = "summed"

    def apply(self, module: nn.Module, cut: Cut | None, settings: CutSettings, tied: Tied) -> None:
        """Sum the gradients of the module's own parameters."""
        names = tuple(name for name, _ in module.named_parameters(recurse=False))
        convert(module, Summed, {}, settings.group, tied, summed=names)


@dataclass(frozen=True)
class SumTailStyle(Style):
    """sum_tail: a linear whose last `outputs` outputs meet sharded heads; their gradient is summed over the ranks."""

    outputs: int = 0

    name: ClassVar[str] = "sum_tail"

    @classmethod
    def parse(cls, argument: str, units: int) -> Style:
        """Return the style with its number of outputs.

        Raises:
            PlanError: the argument is no number above zero.
        """
        if not (argument.isdigit() and int(argument) > 0):
            text = f"{cls.name}:{argument}" if argument else cls.name
            raise PlanError(f"Plan: style 'sum_tail' needs a number of outputs behind a colon, got {text!r}")
        return cls(outputs=int(argument))

    def check(self, name: str, module: nn.Module, R: int) -> None:
        """Raise PlanError unless the module is a linear of enough outputs whose forward can be wrapped."""
        if not is_linear(module) or sizes_of(module)[0] < self.outputs:
            raise PlanError(
                f"Plan: style 'sum_tail' of {name} needs a linear of {self.outputs} outputs or more, "
                f"got {type(module).__name__}"
            )
        check_forward(name, module, self)

    def apply(self, module: nn.Module, cut: Cut | None, settings: CutSettings, tied: Tied) -> None:
        """Sum the gradient of the last outputs."""
        convert(module, SumTail, {}, settings.group, tied, tail=self.outputs)


class CommonStyle(Style):
    """common: a dropout of replicated features inside a sharded block; all ranks draw one mask."""

    name: ClassVar[str] = "common"

    def check(self, name: str, module: nn.Module, R: int) -> None:
        """Raise PlanError unless the module is a dropout."""
        if not isinstance(module, _DropoutNd):
            raise PlanError(f"Plan: style 'common' of {name} needs a dropout, got {type(module).__name__}")

    def apply(self, module: nn.Module, cut: Cut | None, settings: CutSettings, tied: Tied) -> None:
        """Draw its masks from the common random numbers."""
        convert(module, CommonDropout, {}, settings.group)


@dataclass(frozen=True)
class CountsStyle(Style):
    """counts: a module with attributes that count sharded features; each rank's are those of its units.

    Attributes:
        counts: the names of the attributes.
    """

    counts: tuple[str, ...] = ()

    name: ClassVar[str] = "counts"
    takes_units: ClassVar[bool] = True
    keeps_forward: ClassVar[bool] = True

    @classmethod
    def parse(cls, argument: str, units: int) -> Style:
        """Return the style with its names.

        Raises:
            PlanError: names or units are missing.
        """
        if not argument or not units:
            text = f"{cls.name}:{argument}" if argument else cls.name
            raise PlanError(f"Plan: style 'counts' needs names and units, such as counts:n_heads:units=8, got {text!r}")
        return cls(units, tuple(n.strip() for n in argument.split(",")))

    def check(self, name: str, module: nn.Module, R: int) -> None:
        """Raise PlanError unless the attributes are there, and multiples of the units."""
        self._check_units(name, R)
        for count in self.counts:
            full = getattr(module, count, None)
            if not isinstance(full, int) or full % self.units:
                raise PlanError(
                    f"Plan: {count} of {name} ({type(module).__name__}) must be a multiple of {self.units}, got {full}"
                )

    def local_sizes(self, module: nn.Module, cut: Cut | None, R: int, rank: int) -> dict[str, int]:
        """Return this rank's counts."""
        full = {name: getattr(module, name) for name in self.counts}
        return {name: part_size(size, R, rank, size // self.units) for name, size in full.items()}

    def apply(self, module: nn.Module, cut: Cut | None, settings: CutSettings, tied: Tied) -> None:
        """Set the module's counts to this rank's."""
        group = settings.group
        for name, size in self.local_sizes(module, cut, group.world_size, group.rank).items():
            setattr(module, name, size)
