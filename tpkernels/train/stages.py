"""The model of a run in pipeline stages: how it is split, and the loss of a micro-batch."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from tpkernels.pipeline import Split, split_by_layer
from tpkernels.train.gpt import GPT, GPTConfig, whole_parts
from tpkernels.train.settings import Settings


def config_of(settings: Settings) -> GPTConfig:
    """The sizes of the model."""
    return GPTConfig(settings.layers, settings.d_model, settings.heads, settings.context)


def stages_of(settings: Settings) -> Split:
    """The stages of the model, balanced by cost for micro-batches of these settings."""
    with torch.device("meta"):
        model = GPT(config_of(settings), whole_parts())
    rows = max(1, settings.batch // settings.dp // settings.micro_batches)
    ids = torch.zeros(rows, settings.context, dtype=torch.int64)
    return split_by_layer(model, settings.num_stages, inputs=((ids,), {}))


def stage_loss(settings: Settings, model: GPT, ids: Tensor, target: Tensor) -> Tensor:
    """The loss of a micro-batch, for the stages of a pipeline."""
    with precision(settings):
        return model.loss(ids, target)


def rows_in(model: nn.Module, batch: dict[str, Any]) -> float:
    """Sequences of a micro-batch, all of one length, over which its loss is a mean."""
    return float(len(batch["ids"]))


def precision(settings: Settings) -> contextlib.AbstractContextManager[None]:
    """bf16 means autocast: parameters and optimizer stay fp32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=settings.dtype == "bf16")
