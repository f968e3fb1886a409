"""Micro-batches: the rows of a batch in parts, and the share that each has in the loss of the whole."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tpkernels.errors import PlanError
from tpkernels.shard import part_sizes

Batch = dict[str, Any]
IGNORED = -100  # of labels, as in torch and transformers


def split_batch(batch: Mapping[str, Any], micro_batches: int) -> list[Batch]:
    """Split a batch along its rows; the first parts have one more where they do not divide.

    Args:
        batch: the arguments of the model. Tensors whose first dim is the number of rows (that of "input_ids", else of
            the first tensor) are split; those of one row, numbers and all else go into every part.
        micro_batches: at most so many; no more than there are rows.

    Raises:
        ValueError: a tensor has another number of rows, or there is none.
    """
    tensors = {name: x for name, x in batch.items() if isinstance(x, Tensor) and x.dim() > 0}
    if not tensors:
        raise ValueError(f"Pipeline: a batch must have a tensor with rows, got {list(batch)}")
    rows = tensors.get("input_ids", next(iter(tensors.values()))).size(0)
    bad = [f"{name} {list(x.shape)}" for name, x in tensors.items() if x.size(0) not in (1, rows)]
    if bad or rows == 0:
        raise ValueError(
            f"Pipeline: all tensors of a batch must have {rows} rows or one, and rows 1 or more, got {bad}"
        )
    sizes = part_sizes(rows, min(micro_batches, rows))
    parts = {name: torch.split(x, sizes) for name, x in tensors.items() if x.size(0) == rows}
    return [{name: parts[name][i] if name in parts else x for name, x in batch.items()} for i in range(len(sizes))]


def signature_of(batch: Batch) -> Hashable:
    """The same for batches whose hidden states have the same shapes."""
    parts = [(name, tuple(x.shape), x.dtype) if isinstance(x, Tensor) else (name, str(x)) for name, x in batch.items()]
    return torch.is_grad_enabled(), *parts


def labels_that_count(model: nn.Module, batch: Batch) -> float:
    """Over how much of a micro-batch the loss of a model of transformers is a mean.

    That is the number of labels that are not -100, of causal language models the next tokens; the number of rows where
    there are no labels of tokens; 1 where the caller gives the divisor (num_items_in_batch), or labels are none.
    """
    labels = batch.get("shift_labels", batch.get("labels"))
    if batch.get("num_items_in_batch") is not None or not isinstance(labels, Tensor):
        return 1.0
    if labels.dim() < 2 or labels.is_floating_point():
        return float(labels.size(0)) if labels.is_floating_point() else float((labels != IGNORED).sum())
    causal = getattr(model, "loss_type", None) in (None, "ForCausalLM") and "shift_labels" not in batch
    return float(((labels[..., 1:] if causal else labels) != IGNORED).sum())


def refuse_router_losses(model: nn.Module, batch: Batch) -> None:
    """Raise where a model adds a loss of the routers of all its layers, of which a stage has its own only.

    Raises:
        PlanError: output_router_logits is set, in the batch or in the config.
    """
    asked = batch.get("output_router_logits")
    if asked is None:
        config: Any = getattr(model, "config", None)
        configs = (config, getattr(config, "text_config", None))
        asked = any(getattr(c, "output_router_logits", False) for c in configs)
    if asked:
        raise PlanError(
            f"Pipeline: output_router_logits makes {type(model).__name__} add a loss of the routers of all layers, "
            f"and a stage has those of its own only: leave it out"
        )
