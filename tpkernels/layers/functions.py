"""What layers compute beside the ops: shards of replicated tensors, gradients that are summed over ranks, or not."""

from __future__ import annotations

from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn

from tpkernels.comm.group import Group, resolve
from tpkernels.ops.checks import is_recorded
from tpkernels.ops.gradients import Function, backward_codec, gather_from
from tpkernels.ops.linear import linear_gradients, saved_linear
from tpkernels.shard import ShardInfo, part

# Backwards call the torch ops and not the public functions, whose argument checks torch.compile cannot trace there.


class _TakeShard(Function):
    """Forward: this rank's shard. Backward: gather the shards of all ranks."""

    @staticmethod
    def forward(x: Tensor, group: str, world_size: int, rank: int, dim: int, grad_codec: str) -> Tensor:
        return part(x, dim, world_size, rank).clone(memory_format=torch.contiguous_format)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, *call = inputs
        ctx.call = (*call, x.size(inputs[4]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        group, world_size, rank, dim, grad_codec, dim_size = ctx.call
        dx = gather_from(grads[0], group, world_size, rank, dim, dim_size, grad_codec)
        return dx, None, None, None, None, None


class _SumGradient(Function):
    """Forward: the tensors. Backward: the sum over the ranks of their gradients, all in one collective."""

    @staticmethod
    def forward(group: str, world_size: int, grad_codec: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call = inputs[:3]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flat = torch.cat([g.reshape(-1) for g in grads])
        group, world_size, grad_codec = ctx.call
        total = torch.ops.tpkernels.all_reduce(flat, group, world_size, "sum", grad_codec)
        sums = torch.split(total, [g.numel() for g in grads])
        return None, None, None, *(s.view(g.shape) for s, g in zip(sums, grads, strict=True))


def take_shard(x: Tensor, dim: int, *, group: Group | None = None, unit: int = 1, grad_codec: str = "none") -> Tensor:
    """Return this rank's shard of a replicated tensor.

    Equal to `split(x, R, dim)[rank]`. The gradient is gathered over the ranks, so that x, which is replicated, gets
    the same full gradient on all of them; by a plain slice each rank would get zeros outside its own shard.

    Args:
        x: replicated: the same values on all ranks.
        dim: the dimension to shard; it need not divide by R (the first ranks take one unit more).
        group: over which to shard; None means all ranks.
        unit: the number of neighbouring indices that make one item.
        grad_codec: how the gradient is packed on the wire.

    Raises:
        ValueError: the dimension is not a multiple of unit; grad_codec does not exist or does not fit the dtype.
    """
    group = resolve(group)
    backward_codec("take_shard", "none", grad_codec, x)
    if group.world_size == 1:
        return x.clone(memory_format=torch.contiguous_format)  # never x itself, as on more ranks
    first = dim % x.dim()
    if unit == 1:
        return _take(x, first, group, grad_codec)
    if x.size(first) % unit:
        raise ValueError(f"take_shard: dim {dim} of shape {list(x.shape)} must be a multiple of unit, got unit={unit}")
    shape = x.shape
    units = x.reshape(*shape[:first], shape[first] // unit, unit, *shape[first + 1 :])
    return _take(units, first, group, grad_codec).flatten(first, first + 1)


def _take(x: Tensor, dim: int, group: Group, grad_codec: str) -> Tensor:
    place = (group.name, group.world_size, group.rank)
    shard: Tensor = _TakeShard.apply(x, *place, dim, grad_codec)  # type: ignore[no-untyped-call]
    return shard


def sum_gradient(*tensors: Tensor, group: Group | None = None, grad_codec: str = "none") -> tuple[Tensor, ...]:
    """Return the tensors unchanged; their gradients are summed over the ranks on the way back.

    For replicated parameters that meet shards of the activations, as in norms under sequence parallel: each rank sees
    its own tokens only, so its gradient is partial. With this the parameter's .grad is complete on every rank.
    One all_reduce for all tensors of a call; they must have one dtype. Tensors that need no gradient cost nothing.

    Args:
        tensors: replicated tensors.
        group: the ranks over which the activations are sharded; None means all ranks.
        grad_codec: how the gradients are packed on the wire.

    Raises:
        ValueError: tensors of several dtypes; grad_codec does not exist or does not fit the dtype.
    """
    group = resolve(group)
    recorded = [is_recorded(t) for t in tensors]
    wanted = list(compress(tensors, recorded))
    for t in wanted[:1]:
        backward_codec("sum_gradient", "none", grad_codec, t)
    if len({t.dtype for t in wanted}) > 1:
        raise ValueError(f"sum_gradient: tensors must have one dtype, got {[t.dtype for t in wanted]}")
    if group.world_size == 1 or not wanted:
        return tensors
    summed = iter(_SumGradient.apply(group.name, group.world_size, grad_codec, *wanted))  # type: ignore[no-untyped-call]
    return tuple(next(summed) if known else t for t, known in zip(tensors, recorded, strict=True))


class _SumShared(Function):
    """Forward: the shard. Backward: its gradient, summed over the ranks that hold the same indices."""

    @staticmethod
    def forward(x: Tensor, info: ShardInfo) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.info = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        info: ShardInfo = ctx.info
        # All ranks' shards in their places of the full tensor: one sum serves every set of sharing ranks.
        full = grads[0].new_zeros(info.full_shape(grads[0]))
        info.put(grads[0], info.rank, full)
        total = torch.ops.tpkernels.all_reduce(full, info.group_name, info.world_size, "sum", "none")
        return info.part(total), None


def sum_shared(shard: Tensor, info: ShardInfo) -> Tensor:
    """Return a shard unchanged; its gradient is summed over the ranks that hold the same indices.

    Args:
        shard: of a parameter of which several ranks hold the same indices (`info.shared`).
        info: of the shard.
    """
    y: Tensor = _SumShared.apply(shard, info)  # type: ignore[no-untyped-call]
    return y


class _LocalLinear(Function):
    """A linear whose input gradient stays this rank's, with the GEMMs that the fused ops would take."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, group: str, world_size: int) -> Tensor:
        y: Tensor = torch.ops.tpkernels.replicated_gemm(x, weight, bias, group, world_size, "none")
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        need_x, need_w, *_ = ctx.needs_input_grad
        ctx.group = inputs[3]
        ctx.save_for_backward(inputs[0] if need_w else None, inputs[1] if need_x else None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, needs = saved_linear(ctx, grads[0])
        if torch.is_grad_enabled():
            found = linear_gradients(grads[0], x, weight, needs)
        else:
            found = torch.ops.tpkernels.linear_backward(grads[0], x, weight, *needs, ctx.group)
        return *(g if need else None for g, need in zip(found, needs, strict=True)), None, None


def local_linear(x: Tensor, weight: Tensor, bias: Tensor | None, group: Group) -> Tensor:
    """Return x @ weight.T + bias; nothing is sent, also in the backward.

    Args:
        x: [..., K].
        weight: [N, K].
        bias: [N].
        group: whose engines multiply.
    """
    if torch.is_autocast_enabled(x.device.type):  # which casts what torch's own linear gets
        return nn.functional.linear(x, weight, bias)
    y: Tensor = _LocalLinear.apply(x, weight, bias, group.name, group.world_size)  # type: ignore[no-untyped-call]
    return y
