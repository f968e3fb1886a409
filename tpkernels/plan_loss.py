"""The loss of a language model whose logits stay cut over the vocabulary, so that no rank ever holds them whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tpkernels import ops
from tpkernels.plan_layers import Column
from tpkernels.plan_styles import PlanError


class CutCausalLoss:
    """What transformers' ForCausalLMLoss computes, from this rank's part of the logits."""

    def __init__(self, head: Column, vocab_size: int) -> None:
        self._head, self.vocab_size = [head], vocab_size  # in a list: a reference, and no child of anything

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
            logits: [B, S, V / R].
            labels: [B, S]; those of the next tokens are taken. ignore_index counts nowhere.
            vocab_size: as transformers gives it; not used.
            num_items_in_batch: what to divide the sum by; None: the number of tokens that count.
            shift_labels: [B, S], the next tokens themselves.
            ignore_index, kwargs: as in transformers.
        """
        if shift_labels is None:
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        target = shift_labels.reshape(-1)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = ops.vocab_cross_entropy(
            wide.reshape(-1, wide.size(-1)),
            target,
            group=self._head[0].group,
            vocab_size=self.vocab_size,
            ignore_index=ignore_index,
        )
        return losses.sum() / ((target != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch)


def check_cut_logits(model: nn.Module, heads: list[str]) -> None:
    """Raise PlanError unless the model is a causal language model with one head of logits."""
    if len(heads) != 1 or not hasattr(model, "loss_function") or not type(model).__name__.endswith("ForCausalLM"):
        raise PlanError(
            f"parallelize: gather_logits=False needs a causal language model of transformers with one vocab_head, got "
            f"{type(model).__name__} with {heads}"
        )


def cut_logits(model: nn.Module, head: nn.Module) -> None:
    """Leave the logits of a cut head cut, and compute the loss from the parts."""
    assert isinstance(head, Column)
    head.gather_output = False
    whole = head._cuts["weight"].full_size
    head.out_features = head.weight.size(0)  # type: ignore[assignment]
    model.loss_function = CutCausalLoss(head, whole)  # type: ignore[assignment]
