"""The models of a tensor-parallel Trainer: full weights of sharded heads, and the sharding of a reference model.

Fused losses (those of TRL, of Liger) never call the head: they take hidden states and `lm_head.weight`. While a step is
computed, the weight of a sharded head is therefore full for every reader: gathered once a step, and its gradient is
this rank's rows. The head's own forward multiplies by its shard.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from tpkernels.layers.base import gather
from tpkernels.layers.convert import ConvertedModule, change_layer
from tpkernels.layers.linear import ColumnParallelLinear
from tpkernels.plan.api import parallelize
from tpkernels.shard import full_shape


class FullHeads:
    """Shows the sharded heads of a trainer's models with their full weights, while a step is computed.

    A full weight is gathered at its first use in a step and dropped at the end of it; its gradient is this rank's rows.

    Args:
        trainer: its own model, a reference and reward models are searched for heads.
    """

    def __init__(self, trainer: Any) -> None:
        self._gathered: dict[tuple[Any, ...], Tensor] | None = None
        for model in _models_of(trainer):
            for module in model.modules():
                if isinstance(module, ConvertedModule) and not is_parametrized(module) and _makes_logits(module):
                    change_layer(module, Head)
                    module.heads = self

    @contextmanager
    def full(self) -> Iterator[None]:
        """Within it, weights are full; the outermost of these drops what was gathered."""
        if self._gathered is not None:
            yield
            return
        self._gathered = {}
        try:
            yield
        finally:
            self._gathered = None

    @contextmanager
    def sharded(self) -> Iterator[None]:
        """Within it, weights are shards, for the forward of the head itself."""
        before, self._gathered = self._gathered, None
        try:
            yield
        finally:
            self._gathered = before

    def parameter(self, head: Head, name: str) -> Any:
        """The parameter of a head, full or the shard of this rank. Collective where it is full.

        Raises:
            AttributeError: the head has no such parameter.
        """
        if name not in head._parameters:
            raise AttributeError(f"{type(head).__name__} has no attribute {name!r}")
        parameter, cut = head._parameters[name], head._cuts.get(name)
        if self._gathered is None or parameter is None or cut is None:
            return parameter
        key = (id(parameter), parameter._version, torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        if key not in self._gathered:
            self._gathered[key] = gather(parameter, cut.dim, cut.full_size, head.group, unit=cut.unit)
        return self._gathered[key]


class Head(ColumnParallelLinear):
    """A column-parallel layer that computes logits, in a trainer."""

    heads: FullHeads

    @property
    def weight(self) -> Any:  # type: ignore[override]
        """This rank's rows, or the full weight."""
        return self.heads.parameter(self, "weight")

    @property
    def bias(self) -> Any:  # type: ignore[override]
        """This rank's values, or the full bias."""
        return self.heads.parameter(self, "bias")

    def local_parameter(self, name: str) -> Tensor | None:
        """Return this rank's parameter, also while the head shows the full one."""
        with self.heads.sharded():
            return super().local_parameter(name)


def _makes_logits(module: nn.Module) -> bool:
    return isinstance(module, ColumnParallelLinear) and module.gather_output


def shard_reference(trainer: Any) -> None:
    """Shard an unsharded reference model as the trained one is, so that equal weights give equal bits.

    One of other sizes stays unsharded, on every rank.
    """
    reference, report = getattr(trainer, "ref_model", None), trainer.model.tpk_plan
    if not isinstance(reference, nn.Module) or getattr(reference, "tpk_plan", None) is not None:
        return
    shapes = [{n: tuple(full_shape(p)) for n, p in m.named_parameters()} for m in (reference, report.model.target)]
    if shapes[0] == shapes[1]:
        parallelize(reference, group=report.group, **report.options)


def _models_of(trainer: Any) -> Iterator[nn.Module]:
    """The models that a trainer holds, in its attributes or in lists of them."""
    for value in vars(trainer).values():
        for item in value if isinstance(value, list | tuple) else (value,):
            if isinstance(item, nn.Module):
                yield item
