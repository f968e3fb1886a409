"""What other modules than linears and embeddings become in a sharded model; see layers/convert.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tpkernels.layers import rank_rng, sum_gradient
from tpkernels.layers.base import ParallelModule
from tpkernels.layers.block_random import common_numbers


class HeadParameters(ParallelModule):
    """An attention block with parameters of its own, one for each head: each rank has those of its heads."""


class Summed(ParallelModule):
    """A module whose replicated parameters meet this rank's tokens or heads only: their gradients are summed."""


class SumTail(ParallelModule):
    """A replicated linear whose last `tail` outputs meet sharded heads without a column layer between."""

    tail: int

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the module's outputs; the gradient of the last ones is summed over the ranks."""
        y: Tensor = super().forward(*args, **kwargs)
        kept, tail = y[..., : -self.tail], y[..., -self.tail :]
        return torch.cat([kept, sum_gradient(tail, group=self.group)[0]], -1)


class CommonDropout(ParallelModule):
    """A dropout of replicated features inside a sharded block: one mask on all ranks, from the common numbers."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the module's output."""
        with common_numbers():
            y: Tensor = super().forward(x)
        return y


class RankDropout(ParallelModule):
    """A dropout of sharded activations: each rank draws its own mask, and the default generators stay in step."""

    p: float

    def forward(self, x: Tensor) -> Tensor:
        """Drop elements in training mode; otherwise return x."""
        if not self.training or self.p == 0.0:
            return x
        with rank_rng(self.group):
            return nn.functional.dropout(x, self.p, training=True)
