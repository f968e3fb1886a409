"""The base class of styles. A style computes how one module is sharded over the ranks, and shards it in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from tpkernels.comm.group import Group
from tpkernels.errors import PlanError
from tpkernels.layers.base import Cut
from tpkernels.layers.convert import Tied

Role = Literal["column", "row", "summed", "other"]


@dataclass(frozen=True)
class CutSettings:
    """The group over which a model is sharded, and the codecs of its sums, forward and backward."""

    group: Group
    codec: str = "none"
    grad_codec: str = "none"


@dataclass(frozen=True)
class Style:
    """How one module is sharded. A new style is a subclass, and a row in the table of style.py.

    Attributes:
        units: the number of units that the sharded dimension consists of; 0: single features, or the heads of the
            attention block around the module.
        name: in plans.
        role: between sharded features: a "column" module computes them, a "row" module takes them, the replicated
            parameters of a "summed" module meet them; "other": the module takes and gives full features.
        takes_units: whether ":units=N" may follow the name.
        covers_children: whether modules inside need no rule of their own.
        keeps_forward: whether the module's own forward goes on running unchanged.
    """

    units: int = 0

    name: ClassVar[str]
    role: ClassVar[Role] = "other"
    takes_units: ClassVar[bool] = False
    covers_children: ClassVar[bool] = False
    keeps_forward: ClassVar[bool] = False

    @classmethod
    def parse(cls, argument: str, units: int) -> Style:
        """Return the style of a text `name:argument:units=units`.

        Args:
            argument: the text between the colons, "" if there is none.
            units: 0 if the text has none.

        Raises:
            PlanError: the argument is none that the style takes.
        """
        if argument:
            raise PlanError(f"Plan: style {cls.name!r} takes nothing behind a colon, got '{cls.name}:{argument}'")
        return cls(units=units)

    def refine(self, name: str, modules: dict[str, nn.Module], styles: dict[str, Style]) -> None:
        """Check the module before sizes are computed, and remove the rules of children that this style covers.

        Args:
            name: of the module.
            modules: all of the model.
            styles: of all modules that have one; changed in place.

        Raises:
            PlanError: the style does not fit the module.
        """

    def check(self, name: str, module: nn.Module, R: int) -> None:
        """Raise PlanError unless the style fits the module over R ranks."""

    def cut(self, name: str, module: nn.Module, R: int) -> Cut | None:
        """Return how the module's features are sharded over R ranks; None: they are not.

        The dimension is that of a weight [N, K] (see `sizes_of`) where the style takes linears, else of the parameters.

        Raises:
            PlanError: they cannot be sharded so.
        """
        return None

    def parameter_cuts(self, module: nn.Module, cut: Cut | None, R: int) -> dict[str, Cut]:
        """Return how the module's own parameters are sharded as they are stored, {name: Cut}.

        Args:
            module: the full one.
            cut: as in `apply`.
            R: the number of ranks.
        """
        return {}

    def local_sizes(self, module: nn.Module, cut: Cut | None, R: int, rank: int) -> dict[str, int]:
        """Return the attributes of the module that count sharded features, with this rank's values.

        Args:
            module: the full one.
            cut: as in `apply`.
            R, rank: the number of ranks, and the one.
        """
        return {}

    def apply(self, module: nn.Module, cut: Cut | None, settings: CutSettings, tied: Tied) -> None:
        """Shard the module in place.

        Args:
            module: the full one, the same on all ranks.
            cut: as `cut` returned it, or as the attention block around the module demands.
            settings: the group and the codecs.
            tied: the tied parameters of the model.
        """
        raise NotImplementedError

    def _check_units(self, name: str, R: int) -> None:
        """Raise PlanError when some ranks would have none of the units."""
        if self.units < R:
            raise PlanError(f"Plan: {name} is cut into {self.units} units, which leaves some of {R} ranks with none")


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is the Conv1D of transformers: a linear whose weight is [K, N]."""
    return hasattr(module, "nf") and hasattr(module, "nx") and isinstance(getattr(module, "weight", None), Tensor)


def is_linear(module: nn.Module) -> bool:
    """Whether this is a linear, in either layout of its weight."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight is [K, N]: of a Conv1D, and of an embedding, which is a product with one-hot inputs."""
    return isinstance(module, nn.Embedding) or is_conv1d(module)


def size_names(module: nn.Module) -> tuple[str, str]:
    """Return the names of the attributes with the numbers of outputs and inputs of a linear, Conv1D or embedding."""
    if isinstance(module, nn.Embedding):
        return "embedding_dim", "num_embeddings"
    return ("nf", "nx") if hasattr(module, "nf") else ("out_features", "in_features")


def sizes_of(module: nn.Module) -> tuple[int, int]:
    """Return the numbers of outputs and inputs of a linear, Conv1D or embedding."""
    outputs, inputs = (int(getattr(module, name)) for name in size_names(module))
    return outputs, inputs


def can_be_cut(module: nn.Module) -> bool:
    """Whether the forward of a linear, Conv1D or embedding is that of its class, or calls it by super()."""
    forward: Any = type(module).forward
    if forward in (nn.Linear.forward, nn.Embedding.forward) or is_conv1d(module):
        return True
    code = getattr(getattr(forward, "__wrapped__", forward), "__code__", None)
    return code is not None and "__class__" in code.co_freevars  # it calls super()


def check_forward(name: str, module: nn.Module, style: Style) -> None:
    """Raise PlanError for a subclass whose forward does not call ours: it would take its shard for the full weight."""
    if not can_be_cut(module):
        raise PlanError(
            f"Plan: {name} is a {type(module).__name__} with a forward of its own, so it cannot be cut as "
            f"{style.name!r}; give it 'replicate'"
        )
