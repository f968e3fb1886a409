"""Autograd pairs beside the ops: a replicated tensor used on shards, an all-gather whose result all ranks use alike.

They are Megatron-LM's copy_to, gather_from and scatter_to tensor-model-parallel regions.

A replicated tensor is one variable of which every rank holds a copy, so its gradient is the sum of the gradients of all
copies, and the same on all ranks. The first derivative of most ops needs no collective for that (the gradient that
arrives is replicated already); the second one does, because that gradient was used on each rank's shard.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tpkernels.shard import part_size, part_start

from .checks import check_codec, is_recorded

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


class Function(torch.autograd.Function):
    """A torch.autograd.Function that torch.func.vmap can map. (With a jvp of its own Dynamo could not trace it.)"""

    generate_vmap_rule = True


class _CopyTo(Function):
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


def copy_to(x: Tensor, group: str, world_size: int, codec: str = "none") -> Tensor:
    """Return a replicated x for use on each rank's shard: its gradient is summed over the ranks, packed by `codec`."""
    if not is_recorded(x):
        return x
    y: Tensor = _CopyTo.apply(x, group, world_size, codec)  # type: ignore[no-untyped-call]
    return y


class _GatherFrom(Function):
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
        dx: Tensor = _ScatterTo.apply(grads[0], *ctx.call)  # type: ignore[no-untyped-call]
        return dx, *(None for _ in ctx.call)


class _ScatterTo(Function):
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
        dx: Tensor = _GatherFrom.apply(grads[0], *ctx.call)  # type: ignore[no-untyped-call]
        return dx, *(None for _ in ctx.call)


def gather_from(x_shard: Tensor, group: str, world_size: int, rank: int, dim: int, dim_size: int, codec: str) -> Tensor:
    """Return all_gather(x_shard), used alike on all ranks: the gradient is this rank's part of the replicated one.

    Args:
        x_shard: this rank's part.
        group: the name of the group.
        world_size: its ranks.
        rank: this one.
        dim: the dimension along which the parts are joined.
        dim_size: its size in the result, cut by the rule of shard.py.
        codec: how values are packed on the wire, in the forward and in the gradient of the gradient.
    """
    y: Tensor = _GatherFrom.apply(x_shard, group, world_size, rank, dim, dim_size, codec)  # type: ignore[no-untyped-call]
    return y
