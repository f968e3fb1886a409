"""Gradients that are not just the dual op: of a replicated tensor, and of a gather that all ranks use alike.

A replicated tensor is one variable of which every rank holds a copy, so its gradient is the sum of what the ranks did
with their copies, and the same on all of them. The first derivative of most ops needs no collective for that (what
arrives is replicated already); the second one does, because the gradient that arrived was used on each rank's shard.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tpkernels.shard import part_size, part_start

from .checks import check_codec

Call = torch.ops.tpkernels


def backward_codec(op: str, codec: str, grad_codec: Any, x: Any) -> str:
    """Return how the backward of an op packs what it sends: by `grad_codec`, or as the forward where that is None.

    Raises:
        ValueError: no such codec, or it cannot pack the dtype of x.
    """
    if grad_codec is None:
        return codec
    check_codec(op, grad_codec, x.dtype if isinstance(x, Tensor) else None, "grad_codec")  # x itself is checked later
    return grad_codec  # type: ignore[no-any-return]


class _Replicated(torch.autograd.Function):
    """Forward: x itself. Backward: the sum of the gradients of all ranks."""

    @staticmethod
    def forward(x: Tensor, group: str, world_size: int, codec: str) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.call = inputs[1:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        group, world_size, codec = ctx.call
        return Call.all_reduce(grads[0], group, world_size, "sum", codec), None, None, None


def replicated(x: Tensor, group: str, world_size: int, codec: str = "none") -> Tensor:
    """Return x, which all ranks hold alike, for use on each rank's shard: its gradient is summed over the ranks."""
    if not (x.requires_grad and torch.is_grad_enabled()):
        return x
    y: Tensor = _Replicated.apply(x, group, world_size, codec)  # type: ignore[no-untyped-call]
    return y


class _GatherAlike(torch.autograd.Function):
    """Forward: all_gather. Backward: this rank's part, because the gradient is the same on all ranks."""

    @staticmethod
    def forward(x_shard: Tensor, group: str, world_size: int, rank: int, dim: int, dim_size: int, codec: str) -> Tensor:
        y: Tensor = Call.all_gather(x_shard, group, world_size, rank, dim, dim_size, codec, codec)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, *ctx.call = inputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dx: Tensor = _TakePart.apply(grads[0], *ctx.call)  # type: ignore[no-untyped-call]
        return dx, *(None for _ in ctx.call)


class _TakePart(torch.autograd.Function):
    """Forward: this rank's part of a replicated tensor. Backward: the gradients of all parts, gathered."""

    @staticmethod
    def forward(x: Tensor, group: str, world_size: int, rank: int, dim: int, dim_size: int, codec: str) -> Tensor:
        part = x.narrow(dim, part_start(dim_size, world_size, rank), part_size(dim_size, world_size, rank))
        return part.clone(memory_format=torch.contiguous_format)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, *ctx.call = inputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dx: Tensor = _GatherAlike.apply(grads[0], *ctx.call)  # type: ignore[no-untyped-call]
        return dx, *(None for _ in ctx.call)


def gather_alike(
    x_shard: Tensor, group: str, world_size: int, rank: int, dim: int, dim_size: int, codec: str
) -> Tensor:
    """Return all_gather(x_shard) for use by all ranks in the same way: the gradient is this rank's part of theirs."""
    y: Tensor = _GatherAlike.apply(x_shard, group, world_size, rank, dim, dim_size, codec)  # type: ignore[no-untyped-call]
    return y
