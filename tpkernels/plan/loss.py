"""The loss of a language model whose logits stay sharded over the vocabulary: no rank ever holds all of them.

Logits stay sharded in the calls that compute a loss from them, those with labels. In all others (generate, a label
smoother, a loss of the caller's own) they are gathered.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from tpkernels import ops
from tpkernels.errors import PlanError
from tpkernels.layers.linear import ColumnParallelLinear
from tpkernels.layers.reference import Ref


class CutCausalLoss:
    """The loss of transformers' ForCausalLMLoss from this rank's shard of the logits; the group is that of the head."""

    def __init__(self, head: ColumnParallelLinear, vocab_size: int) -> None:
        self._head, self.vocab_size = Ref(head), vocab_size
        self.calls = 0

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Mean cross entropy of the next tokens.

        Args:
            logits: [B, S, V / R], or [B, S, V].
            labels: [B, S], of which those of the next tokens count. ignore_index is left out.
            vocab_size: V, as transformers passes it.
            num_items_in_batch: the divisor of the sum; None: the number of tokens that count.
            shift_labels: [B, S], the next tokens themselves.
            ignore_index, kwargs: as in transformers.

        Raises:
            PlanError: the model computes its loss over another vocabulary than that of its head.
        """
        self.calls += 1
        if vocab_size not in (None, self.vocab_size):
            raise PlanError(
                f"gather_logits=False: the head of the model has {self.vocab_size} logits, and its loss is over "
                f"{vocab_size}: cut it with gather_logits=True"
            )
        if shift_labels is None:
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        target = shift_labels.reshape(-1)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        wide, group = wide.reshape(-1, wide.size(-1)), self._head.target.group
        if wide.size(-1) == self.vocab_size:
            losses = nn.functional.cross_entropy(wide, target, reduction="none", ignore_index=ignore_index)
        else:
            losses = ops.vocab_cross_entropy(
                wide, target, group=group, vocab_size=self.vocab_size, ignore_index=ignore_index
            )
        return losses.sum() / ((target != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch)


class ForwardForLoss:
    """The forward of a model of transformers whose logits stay sharded where it computes a loss from them.

    It is set on the instance: peft and accelerate call forward itself, past all hooks.
    """

    def __init__(self, model: nn.Module, head: str) -> None:
        self._model, self._head = Ref(model), head

    @property
    def __signature__(self) -> inspect.Signature:
        model = self._model.target
        return inspect.signature(type(model).forward.__get__(model))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the model's own forward.

        Raises:
            PlanError: labels were given, and the model did not compute a loss by its loss_function.
        """
        model: Any = self._model.target
        loss = model.loss_function
        if not isinstance(loss, CutCausalLoss) or not self._has_labels(args, kwargs):
            return type(model).forward(model, *args, **kwargs)
        inside = model.get_submodule(self._head).modules()
        columns = [m for m in inside if isinstance(m, ColumnParallelLinear) and m.gather_output]
        calls = loss.calls
        for column in columns:
            column.gather_output = False
        try:
            output = type(model).forward(model, *args, **kwargs)
        finally:
            for column in columns:
                column.gather_output = True
        if loss.calls == calls:
            raise PlanError(
                f"gather_logits=False: {type(model).__name__} was given labels and computed no loss of them"
            )
        return output

    def _has_labels(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if kwargs.get("labels") is not None:
            return True
        names = list(inspect.signature(type(self._model.target).forward).parameters)[1:] if args else []
        return dict(zip(names, args, strict=False)).get("labels") is not None


def check_cut_logits(model: nn.Module, heads: list[str]) -> None:
    """Raise PlanError unless the model is a causal language model with one head of logits and transformers' loss."""
    if len(heads) != 1 or not hasattr(model, "loss_function") or not type(model).__name__.endswith("ForCausalLM"):
        raise PlanError(
            f"parallelize: gather_logits=False needs a causal language model of transformers with one vocab_head, got "
            f"{type(model).__name__} with {heads}"
        )
    if not _computes_by_loss_function(type(model)):
        raise PlanError(
            f"parallelize: gather_logits=False needs a model that computes its loss by self.loss_function(logits, "
            f"labels, ...), got {type(model).__name__}, which computes one of its own: leave the logits gathered"
        )


def _computes_by_loss_function(kind: type[nn.Module]) -> bool:
    """Whether the forward of a class, or one that it calls by super(), uses its loss_function, and no other loss."""
    forwards = [inspect.unwrap(c.__dict__["forward"]) for c in kind.__mro__ if "forward" in vars(c)]
    for forward in forwards:
        names = _names(getattr(forward, "__code__", None))
        if {"CrossEntropyLoss", "cross_entropy", "nll_loss"} & names:
            return False
        if "loss_function" in names:
            return True
        if "__class__" not in names:  # it does not call super()
            return False
    return False


def _names(code: Any) -> set[str]:
    return set() if code is None else {*code.co_names, *code.co_freevars}


def cut_logits(model: nn.Module, name: str) -> None:
    """Leave logits sharded where a loss is computed from them, and compute it from the shards.

    Args:
        model: a sharded causal language model of transformers.
        name: of its head.
    """
    head = model.get_submodule(name)
    assert isinstance(head, ColumnParallelLinear)
    model.loss_function = CutCausalLoss(head, head._cuts["weight"].full_size)  # type: ignore[assignment]
    model.forward = ForwardForLoss(model, name)
