"""The styles of linears: sharded along their outputs (column) or their inputs (row)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import nn

from tpkernels.errors import PlanError
from tpkernels.layers.base import Cut, ParallelModule
from tpkernels.layers.convert import Tied, convert
from tpkernels.layers.linear import ColumnParallelLinear, RowParallelLinear
from tpkernels.plan.styles.base import (
    CutSettings,
    Role,
    Style,
    check_forward,
    is_linear,
    is_transposed,
    size_names,
    sizes_of,
)
from tpkernels.plan.styles.vocabulary import EmbeddingColumns
from tpkernels.shard import packed_runs


class _LinearStyle(Style):
    """What the styles of linears share.

    Attributes:
        dim: the sharded dimension of the weight [N, K].
        takes_embeddings: whether the module may be an nn.Embedding, which computes its columns.
    """

    dim: ClassVar[int]
    takes_embeddings: ClassVar[bool] = False

    def check(self, name: str, module: nn.Module, R: int) -> None:
        """Raise PlanError unless the module is a linear whose forward is that of its class, or around it."""
        if not is_linear(module) and not (self.takes_embeddings and isinstance(module, nn.Embedding)):
            raise PlanError(f"Plan: style {self.name!r} of {name} needs a linear, got {type(module).__name__}")
        check_forward(name, module, self)

    def cut(self, name: str, module: nn.Module, R: int) -> Cut | None:
        """Return the cut of the sharded dimension: by the rule, or into units.

        Raises:
            PlanError: there are fewer units than ranks, or the size is no multiple of them.
        """
        size = sizes_of(module)[self.dim]
        if not self.units:
            return Cut(self.dim, size)
        self._check_sizes(name, [size], R)
        return Cut(self.dim, size, size // self.units)

    def _check_sizes(self, name: str, sizes: list[int], R: int) -> None:
        """Raise PlanError when some ranks would have none of the units, or a size is no multiple of them."""
        self._check_units(name, R)
        if any(n % self.units for n in sizes):
            raise PlanError(f"Plan: {name} is to be cut into {self.units} units, of which {sizes} is no multiple")

    def parameter_cuts(self, module: nn.Module, cut: Cut | None, R: int) -> dict[str, Cut]:
        """Return the cuts of weight and bias, as they are stored."""
        assert cut is not None
        cuts = {"weight": replace(cut, dim=1 - cut.dim) if is_transposed(module) else cut}
        if self.dim == 0 and getattr(module, "bias", None) is not None:
            cuts["bias"] = cut
        return cuts

    def local_sizes(self, module: nn.Module, cut: Cut | None, R: int, rank: int) -> dict[str, int]:
        """Return this rank's number of outputs or inputs, where the layer gives or takes sharded features."""
        if self.role == "other":
            return {}
        assert cut is not None
        return {size_names(module)[self.dim]: cut.info(R, rank).size}

    def apply(self, module: nn.Module, cut: Cut | None, settings: CutSettings, tied: Tied) -> None:
        """Make it a parallel layer."""
        layer: type[ParallelModule] = EmbeddingColumns
        options: dict[str, Any] = {}
        if not isinstance(module, nn.Embedding):
            layer, options = self._layer()
            options |= {"codec": settings.codec, "grad_codec": settings.grad_codec}
            options |= {"transposed": is_transposed(module)}
        group = settings.group
        cuts = self.parameter_cuts(module, cut, group.world_size)
        options |= self.local_sizes(module, cut, group.world_size, group.rank)
        convert(module, layer, cuts, group, tied, **options)

    def _layer(self) -> tuple[type[ParallelModule], dict[str, Any]]:
        """The class of the parallel layer of a linear, and its options."""
        raise NotImplementedError


class ColumnStyle(_LinearStyle):
    """column: a linear sharded along its outputs, or an embedding along its columns."""

    name: ClassVar[str] = "column"
    role: ClassVar[Role] = "column"
    takes_units: ClassVar[bool] = True
    takes_embeddings: ClassVar[bool] = True
    dim: ClassVar[int] = 0

    def _layer(self) -> tuple[type[ParallelModule], dict[str, Any]]:
        return ColumnParallelLinear, {"gather_output": self.role == "other"}


class ColumnGatherStyle(ColumnStyle):
    """column_gather: a column linear that gathers its outputs."""

    name: ClassVar[str] = "column_gather"
    role: ClassVar[Role] = "other"
    takes_units: ClassVar[bool] = False
    takes_embeddings: ClassVar[bool] = False


class VocabHeadStyle(ColumnGatherStyle):
    """vocab_head: the linear that computes logits, sharded along the vocabulary; they are gathered."""

    name: ClassVar[str] = "vocab_head"


@dataclass(frozen=True)
class PackedColumnStyle(ColumnStyle):
    """packed_column: a linear of several projections one after the other, each sharded by itself.

    Attributes:
        packed: the number of projections (one number), their sizes, or (): as the heads of the block around demand.
    """

    packed: tuple[int, ...] = ()

    name: ClassVar[str] = "packed_column"
    takes_embeddings: ClassVar[bool] = False

    @classmethod
    def parse(cls, argument: str, units: int) -> Style:
        """Take the argument apart: a number of projections, their sizes, or "qkv".

        Raises:
            PlanError: it is none of these.
        """
        if argument == "qkv":
            return cls(units)
        numbers = argument.split(",")
        if not all(n.strip().isdigit() and int(n) > 0 for n in numbers):
            text = f"{cls.name}:{argument}" if argument else cls.name
            raise PlanError(
                f"Plan: style 'packed_column' needs the number of projections, their sizes or qkv behind a colon, "
                f"such as packed_column:3 or packed_column:64,16,16, got {text!r}"
            )
        return cls(units, tuple(int(n) for n in numbers))

    def sizes(self, full_size: int, name: str) -> list[int]:
        """Return the sizes of the projections.

        Args:
            full_size: the number of outputs of all together.
            name: of the module, for the error.

        Raises:
            PlanError: they do not add up.
        """
        sizes = list(self.packed)
        if len(sizes) == 1:
            count = sizes[0]
            sizes = [full_size // count] * count
        if sum(sizes) != full_size:
            raise PlanError(f"Plan: the projections of {name} must add up to its {full_size} outputs, got {sizes}")
        return sizes

    def cut(self, name: str, module: nn.Module, R: int) -> Cut | None:
        """Return the runs of outputs that each rank has.

        Raises:
            PlanError: the projections do not add up or are no multiples of the units; the sizes need a block.
        """
        size = sizes_of(module)[0]
        if not self.packed and not self.units:
            raise PlanError(f"Plan: packed_column:qkv of {name} needs an attention block around it")
        sizes = self.sizes(size, name)
        if not self.units:
            return Cut(0, size, 1, packed_runs(sizes, R))
        self._check_sizes(name, sizes, R)
        if len(sizes) == 1:
            return Cut(0, size, size // self.units)
        return Cut(0, size, 1, packed_runs(sizes, R, [n // self.units for n in sizes]))


class RowStyle(_LinearStyle):
    """row: a linear sharded along its inputs, which a column layer leaves sharded; the products are summed."""

    name: ClassVar[str] = "row"
    role: ClassVar[Role] = "row"
    takes_units: ClassVar[bool] = True
    dim: ClassVar[int] = 1

    def _layer(self) -> tuple[type[ParallelModule], dict[str, Any]]:
        return RowParallelLinear, {"input_is_parallel": self.role == "row"}


class RowSplitStyle(RowStyle):
    """row_split: a row linear that takes full inputs, and its own shard of them."""

    name: ClassVar[str] = "row_split"
    role: ClassVar[Role] = "other"
    takes_units: ClassVar[bool] = False
