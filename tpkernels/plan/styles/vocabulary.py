"""The style "vocab", and the tables of embeddings that a plan shards: along their rows, or along their columns."""

from __future__ import annotations

import sys
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.compiler import is_compiling

from tpkernels.errors import PlanError
from tpkernels.layers.base import Cut, ParallelModule
from tpkernels.layers.convert import Tied, convert
from tpkernels.layers.embedding import VocabParallelEmbedding
from tpkernels.plan.styles.base import CutSettings, Style, check_forward


class EmbeddingColumns(ParallelModule):
    """An embedding sharded along its columns: each rank looks up its own (a bias for each of its heads)."""

    weight: nn.Parameter
    padding_idx: int | None

    def forward(self, ids: Tensor) -> Tensor:
        """[...] -> [..., D / R]."""
        return nn.functional.embedding(ids, self.weight, self.padding_idx)

    def extra_repr(self) -> str:
        """Return the full size and this rank's."""
        full = self._cuts["weight"].full_size
        return f"{self.weight.size(0)}, {full} (shard {self.weight.size(1)}), rank={self._place[0]} of {self._place[1]}"


class IdTable(VocabParallelEmbedding):
    """A table of ids that refuses to train single rows."""

    @property
    def padding_idx(self) -> int | None:
        """The row of the padding in the full table; for rules of transformers that zero it, in this rank's rows."""
        found: int | None = self.__dict__["padding_idx"]
        if found is None or is_compiling() or sys._getframe(1).f_code.co_name != "_init_weights":
            return found
        start, end = self._rows()
        return found - start if start <= found < end else None

    @padding_idx.setter
    def padding_idx(self, row: int | None) -> None:
        self.__dict__["padding_idx"] = row

    @property
    def qweight(self) -> Any:
        """Absent. Trainable tokens of peft read it just before they take rows, by their numbers in the full table."""
        if sys._getframe(2).f_globals.get("__name__") == "peft.tuners.trainable_tokens.layer":
            raise PlanError(
                "trainable tokens do not work on a table of ids that is cut: leave it whole with the rule "
                "{its name: 'replicate'} (a head that is tied to it, too), or train the full table by modules_to_save"
            )
        raise AttributeError(f"{type(self).__name__} has no attribute 'qweight'")


class VocabStyle(Style):
    """vocab: an embedding sharded along its rows."""

    name: ClassVar[str] = "vocab"

    def check(self, name: str, module: nn.Module, R: int) -> None:
        """Raise PlanError unless the module is an embedding without options that a sharded table lacks."""
        if not isinstance(module, nn.Embedding):
            raise PlanError(f"Plan: style 'vocab' of {name} needs an nn.Embedding, got {type(module).__name__}")
        if module.max_norm is not None or module.sparse or module.scale_grad_by_freq:
            raise PlanError(
                f"Plan: {name} uses max_norm, sparse or scale_grad_by_freq, which a cut table does not have"
            )
        check_forward(name, module, self)

    def cut(self, name: str, module: nn.Module, R: int) -> Cut | None:
        """Return the cut of the rows."""
        return Cut(0, int(module.num_embeddings))  # type: ignore[arg-type]

    def parameter_cuts(self, module: nn.Module, cut: Cut | None, R: int) -> dict[str, Cut]:
        """Return the cut of the table."""
        assert cut is not None
        return {"weight": cut}

    def apply(self, module: nn.Module, cut: Cut | None, settings: CutSettings, tied: Tied) -> None:
        """Make it a table of which this rank has its rows."""
        convert(module, IdTable, self.parameter_cuts(module, cut, settings.group.world_size), settings.group, tied)
