"""The update of the parameters in a run: its optimizer, and the learning rate of each step."""

from __future__ import annotations

import math

import torch

from tpkernels.data_parallel import GradAggregator, zero_optimizer
from tpkernels.train.gpt import GPT
from tpkernels.train.settings import Settings


def make_optimizer(model: GPT, settings: Settings, aggregator: GradAggregator | None) -> torch.optim.Optimizer:
    """AdamW; decay for matrices, none for norms and biases.

    Args:
        aggregator: of the replicas, over which the optimizer is cut with --zero; None where there is one replica.
    """
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if aggregator is not None and aggregator.zero:
        return zero_optimizer(torch.optim.AdamW, aggregator, groups, lr=settings.lr, betas=(0.9, 0.95), fused=True)
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95), fused=True)


def learning_rate(settings: Settings, step: int, total: int | None) -> float:
    """Linear warm-up, which does not depend on `total`, then half a cosine down to a tenth."""
    warmup = settings.effective_warmup
    if step < warmup or total is None or total <= warmup:
        return settings.lr * min(1.0, (step + 1) / max(1, warmup))
    share = (step - warmup) / (total - warmup)
    return settings.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, share))))
