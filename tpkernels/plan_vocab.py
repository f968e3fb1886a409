"""The linear that makes logits, with trainers that multiply by its weight themselves, and the table of ids.

Fused losses (those of TRL, of Liger) never call the head: they take hidden states and `lm_head.weight`. While a
trainer that `fit_trainer` made right computes a step, the weight of a cut head is therefore whole for whoever reads it:
gathered once a step, and its gradient is this rank's rows. The head's own forward goes on multiplying by its part.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from tpkernels.layers.base import gather
from tpkernels.plan_layers import Column, Vocab
from tpkernels.plan_styles import PlanError


class WholeHeads:
    """Whether heads are seen whole now, and what was gathered for that."""

    def __init__(self) -> None:
        self._gathered: dict[tuple[Any, ...], Tensor] | None = None

    @contextmanager
    def seen(self) -> Iterator[None]:
        """Let the weights of heads be whole; nothing is kept behind the outermost of these."""
        if self._gathered is not None:
            yield
            return
        self._gathered = {}
        try:
            yield
        finally:
            self._gathered = None

    def look(self, head: Head, name: str) -> Any:
        """The parameter, or the whole that it is a part of. Collective in the second case."""
        parameter, cut = head._parameters[name], head._cuts.get(name)
        if self._gathered is None or parameter is None or cut is None:
            return parameter
        key = (id(parameter), parameter._version, torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        if key not in self._gathered:
            self._gathered[key] = gather(parameter, cut.dim, cut.full_size, head.group, unit=cut.unit)
        return self._gathered[key]


class Head(Column):
    """A column layer that makes logits."""

    whole: WholeHeads | None = None

    @property
    def weight(self) -> Any:  # type: ignore[override]
        """This rank's rows, or all."""
        return self._parameters["weight"] if self.whole is None else self.whole.look(self, "weight")

    @property
    def bias(self) -> Any:  # type: ignore[override]
        """This rank's part, or all of it."""
        return self._parameters["bias"] if self.whole is None else self.whole.look(self, "bias")


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


def show_heads(trainer: Any) -> None:
    """Let a trainer see the heads of its models whole while it computes: its own model, a reference, rewards."""
    whole, steps = WholeHeads(), ("training_step", "prediction_step")
    for model in models_of(trainer):
        for module in model.modules():
            if isinstance(module, Head):
                module.whole = whole
    for name in steps:
        setattr(trainer, name, _inside(whole, getattr(trainer, name)))


def models_of(trainer: Any) -> Iterator[nn.Module]:
    """The models that a trainer holds, one by one or in lists."""
    for value in vars(trainer).values():
        for item in value if isinstance(value, list | tuple) else (value,):
            if isinstance(item, nn.Module):
                yield item


def _inside(whole: WholeHeads, step: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(step)
    def run(*args: Any, **kwargs: Any) -> Any:
        with whole.seen():
            return step(*args, **kwargs)

    return run
