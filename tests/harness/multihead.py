"""Sizes and inputs of the tests of torch's own attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

N, L, S, E = 2, 5, 4, 12  # sequences, queries, keys, columns
CAUSAL = torch.ones(L, L, dtype=torch.bool).triu(1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(2)
    model = make().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model
