"""Collectives on full tensors: all_reduce, reduce_scatter, all_gather. The fused ops are made of their meanings.

Every function: the public name, the fake kernel (what torch.compile sees), the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import _increment_version
from torch.compiler import is_compiling, is_dynamo_compiling

from tpkernels._native import _C
from tpkernels.comm.group import Group, resolve

from ._op import Op
from .checks import (
    check_codec,
    check_dim,
    check_reduction,
    check_size,
    check_tensor,
    check_writable,
    is_recorded,
    is_transforming,
)
from .gradients import backward_codec, copy_to, gather_from
from .sizes import full_shape, full_size, shard_shape

ALL_REDUCE = Op("all_reduce", communicates=True)
ALL_REDUCE_INPLACE = Op("all_reduce_")
REDUCE_SCATTER = Op("reduce_scatter", communicates=True)
ALL_GATHER = Op("all_gather", communicates=True)
DEVICE_ARENA_EMPTY = Op("device_arena_empty")

# Bound once: an attribute takes 25 ns, a small collective in all 700.
# They run small collectives on plain dense tensors, and return None or False for other calls.
_fast_all_reduce, _fast_all_reduce_ = _C.fast_all_reduce, _C.fast_all_reduce_
_fast_reduce_scatter, _fast_all_gather = _C.fast_reduce_scatter, _C.fast_all_gather

# The gradients of an all_gather; see there.
GRADS = ("reduce", "split")


def all_reduce(x: Tensor, *, group: Group | None = None, op: str = "sum", codec: str = "none") -> Tensor:
    """Reduce over the ranks; every rank gets the full result.

    Equal to, elementwise:

        y = x_0 + x_1 + ... + x_{R-1}        # op "sum"; "avg" divides by R; "max" and "min" keep NaN

    Args:
        x: the same shape on every rank, any strides; fp32 | bf16 | fp16 | fp64 | int8 | uint8 | int16 | int32 | int64.
        group: the ranks; None means all ranks of the default process group.
        op: "sum" | "avg" | "max" | "min"; no "avg" of integers.
        codec: how values are packed on the wire, for "sum" and "avg" of fp32 | bf16 | fp16; "none" keeps every bit.

    Returns:
        y, contiguous, the shape and dtype of x. Sums in fp32 (fp64 for fp64, integers exactly), in rank order, rounded
        once: every run and every rank gives the same bits.

    Gradient: x is partial, y is replicated, so that the gradient of x is that of y ("avg": over R). For "max" and "min"
    it goes to the ranks that hold the extreme value, in equal parts.

    Raises:
        TypeError, ValueError: x, op or codec do not fit (says which, expected, got).
        RankMismatchError: the ranks called with different shapes, dtypes, ops or codecs.
        TimeoutError, PeerLostError: a rank did not come within `group.timeout_s`, or died; the text names it.
    """
    if type(group) is not Group:
        group = resolve(group)
    if not is_dynamo_compiling() and (y := _fast_all_reduce(x, group._address, op, codec)) is not None:
        return y
    call = ALL_REDUCE.way(group, x)
    check_reduction("all_reduce", x, op, codec, group, plain=call is not ALL_REDUCE.dispatch)
    return call(x, group.name, group.world_size, op, codec)  # type: ignore[no-any-return]


@ALL_REDUCE.fake
def _all_reduce_fake(x: Tensor, group: str, world_size: int, op: str, codec: str) -> Tensor:
    return x.new_empty(x.shape)


def _all_reduce_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *ctx.call = inputs
    if inputs[3] in ("max", "min"):
        ctx.save_for_backward(x, output)


def _all_reduce_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    group, world_size, op, codec = ctx.call
    dx = copy_to(dy, group, world_size, codec)
    if op == "avg":
        dx = dx / world_size
    elif op != "sum":
        x, y = ctx.saved_tensors
        dx = _to_the_extreme(dx, x, y, group, world_size)
    return dx, None, None, None, None


def _to_the_extreme(dy: Tensor, x: Tensor, y: Tensor, group: str, world_size: int) -> Tensor:
    """Divide dy equally among the ranks that hold the extreme value y (or the NaN that became it)."""
    holds = (x == y) | x.isnan()
    holders = ALL_REDUCE(holds.to(dy.dtype), group, world_size, "sum", "none")
    return torch.where(holds, dy / holders, torch.zeros_like(dy))


ALL_REDUCE.gradient(_all_reduce_gradient, _all_reduce_context)


def all_reduce_(x: Tensor, *, group: Group | None = None, op: str = "sum", codec: str = "none") -> Tensor:
    """Reduce over the ranks in place: `x.copy_(all_reduce(x))` without the copy.

    With x from `group.empty` nothing is copied at all: the ranks reduce where the values lie.

    Args:
        x: as in `all_reduce`; it must not require a gradient.
        group: the ranks; None means all ranks of the default process group.
        op: "sum" | "avg" | "max" | "min"; no "avg" of integers.
        codec: how values are packed on the wire.

    Returns:
        x, with the values that `all_reduce` gives.

    Raises:
        TypeError, ValueError: x, op or codec do not fit, or x requires a gradient.
        RankMismatchError, TimeoutError, PeerLostError: as in `all_reduce`; the values of x are then undefined.
    """
    if type(group) is not Group:
        group = resolve(group)
    if not is_dynamo_compiling() and _fast_all_reduce_(x, group._address, op, codec):
        return x
    check_reduction("all_reduce_", x, op, codec, group, plain=False)
    check_writable("all_reduce_", "x", x)
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("all_reduce_: x must not require a gradient (use all_reduce), got requires_grad=True")
    if is_compiling() or is_transforming():  # which keep calls that write to no argument in order, see _order.py
        return x.copy_(ALL_REDUCE.dispatch(x, group.name, group.world_size, op, codec))
    if torch._debug_has_internal_overlap(x) == 1:
        raise ValueError(f"all_reduce_: x must not overlap itself, got strides {x.stride()} for shape {list(x.shape)}")
    if x.is_neg():  # a negated view: in torch an op without a result cannot write to it
        y = x.resolve_neg()
        ALL_REDUCE_INPLACE.dispatch(y, group.name, group.world_size, op, codec)
        return x.copy_(y)
    ALL_REDUCE_INPLACE.dispatch(x, group.name, group.world_size, op, codec)
    if not x.is_inference():
        _increment_version((x,))  # so that a backward that saved x notices
    return x


@ALL_REDUCE_INPLACE.fake
def _all_reduce_inplace_fake(x: Tensor, group: str, world_size: int, op: str, codec: str) -> None:
    return None


def reduce_scatter(
    x: Tensor,
    dim: int = 0,
    *,
    group: Group | None = None,
    op: str = "sum",
    codec: str = "none",
    grad_codec: str | None = None,
) -> Tensor:
    """Reduce over the ranks; every rank gets its part of the result.

    Equal to:

        y = all_reduce(x)                          # [..., n, ...]
        return split(y, R, dim)[rank]              # [..., n / R, ...]

    Args:
        x: as in `all_reduce`. n need not divide by R: the first n % R ranks get one index more.
        dim: the dimension along which the result is cut.
        group: the ranks; None means all ranks of the default process group.
        op: "sum" | "avg" | "max" | "min"; no "avg" of integers.
        codec: how values are packed on the wire, for "sum" and "avg" of fp32 | bf16 | fp16; "none" keeps every bit.
        grad_codec: how the backward packs the gradient that it gathers; None: as `codec`.

    Returns:
        this rank's part of y, contiguous; the same bits as `all_reduce` gives.

    Gradient: x is partial, the result is a shard, so that the gradient of x is all_gather of the result's ("avg": over
    R; "max" and "min": to the ranks that hold the extreme value, in equal parts).

    Raises:
        TypeError, ValueError: x, dim, op, codec or grad_codec do not fit.
        RankMismatchError, TimeoutError, PeerLostError: as in `all_reduce`.
    """
    if type(group) is not Group:
        group = resolve(group)
    grad_codec = backward_codec("reduce_scatter", codec, grad_codec, x)
    if dim == 0 and not is_dynamo_compiling():
        y = _fast_reduce_scatter(x, group._address, op, codec)
        if y is not None:
            return y
    call = REDUCE_SCATTER.way(group, x)
    check_reduction("reduce_scatter", x, op, codec, group, plain=call is not REDUCE_SCATTER.dispatch)
    dim = check_dim("reduce_scatter", x, dim)
    place = (group.name, group.world_size, group.rank)
    return call(x, *place, dim, op, codec, grad_codec)  # type: ignore[no-any-return]


@REDUCE_SCATTER.fake
def _reduce_scatter_fake(x: Tensor, group: str, world_size: int, rank: int, dim: int, *call: Any) -> Tensor:
    return x.new_empty(shard_shape(x.shape, world_size, rank, dim))


def _reduce_scatter_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *ctx.call = inputs
    ctx.dim_size = x.size(inputs[4])
    if inputs[5] in ("max", "min"):
        ctx.save_for_backward(x, output)


def _reduce_scatter_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    group, world_size, rank, dim, op, codec, grad_codec = ctx.call
    dx = ALL_GATHER(dy, group, world_size, rank, dim, ctx.dim_size, grad_codec, codec)
    if op == "avg":
        dx = dx / world_size
    elif op != "sum":
        x, y_shard = ctx.saved_tensors
        y = ALL_GATHER(y_shard.detach(), group, world_size, rank, dim, ctx.dim_size, "none", "none")
        dx = _to_the_extreme(dx, x, y, group, world_size)
    return dx, *(None for _ in ctx.call)


REDUCE_SCATTER.gradient(_reduce_scatter_gradient, _reduce_scatter_context)


def all_gather(
    x_shard: Tensor,
    dim: int = 0,
    *,
    group: Group | None = None,
    dim_size: int | None = None,
    grad: str = "reduce",
    codec: str = "none",
    grad_codec: str | None = None,
) -> Tensor:
    """Put the parts of all ranks together; every rank gets the whole.

    Equal to:

        y = cat([x_0, x_1, ..., x_{R-1}], dim)

    Args:
        x_shard: this rank's part, any strides, any dtype (with a codec fp32 | bf16 | fp16); all dimensions but `dim`
            are the same on every rank.
        dim: the dimension along which the parts are joined.
        group: the ranks; None means all ranks of the default process group.
        dim_size: the size of `dim` in the result, cut so that the first ranks have one index more. None: the ranks
            exchange theirs (a short call more, and any sizes are right); under torch.compile it means R equal parts.
        grad: what follows on the ranks. "reduce": something different, which leaves partial gradients, so that the
            gradient is reduce_scatter of them; "split": the same on all ranks, so that it is this rank's part.
        codec: how values are packed on the wire; every rank takes the packed values, the owner too.
        grad_codec: how the backward packs the partial gradients that it scatters; None: as `codec`.

    Returns:
        y, contiguous, the dtype of x_shard, the same bits on every rank.

    Raises:
        TypeError, ValueError: x_shard, dim, dim_size, grad, codec or grad_codec do not fit; or a gradient is wanted for
            parts that are not the even cut (the first ranks one index more).
        RankMismatchError, TimeoutError, PeerLostError: as in `all_reduce`.
    """
    if type(group) is not Group:
        group = resolve(group)
    grad_codec = backward_codec("all_gather", codec, grad_codec, x_shard)
    if dim == 0 and grad in GRADS and not is_dynamo_compiling():
        y = _fast_all_gather(x_shard, group._address, dim_size, codec)
        if y is not None:
            return y
    call = ALL_GATHER.way(group, x_shard)
    plain = call is ALL_GATHER.kernel
    if call is ALL_GATHER.dispatch:
        check_tensor("all_gather", "x_shard", x_shard, group, by_function=grad == "split")
    if codec != "none":
        check_codec("all_gather", codec, x_shard.dtype)
    if grad not in GRADS:
        raise ValueError(f"all_gather: grad must be 'reduce' or 'split', got {grad!r}")
    dim = check_dim("all_gather", x_shard, dim)
    check_size("all_gather", "dim_size", dim_size)
    wants_grad = not plain and is_recorded(x_shard)
    unknown = plain and dim_size is None  # the op exchanges the sizes
    size = -1 if unknown else full_size("all_gather", x_shard, dim, dim_size, group, wants_grad)
    place = (group.name, group.world_size, group.rank, dim, size)
    if wants_grad and grad == "split":
        return gather_from(x_shard, *place, codec)
    return call(x_shard, *place, codec, grad_codec)  # type: ignore[no-any-return]


@ALL_GATHER.fake
def _all_gather_fake(
    x_shard: Tensor, group: str, world_size: int, rank: int, dim: int, dim_size: int, codec: str, grad_codec: str
) -> Tensor:
    return x_shard.new_empty(full_shape(x_shard.shape, world_size, dim, dim_size))


def _all_gather_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *ctx.call = inputs


def _all_gather_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    group, world_size, rank, dim, _, codec, grad_codec = ctx.call
    values = torch.view_as_real(dy) if dy.is_complex() else dy
    dx = REDUCE_SCATTER(values, group, world_size, rank, dim, "sum", grad_codec, codec)
    return torch.view_as_complex(dx) if dy.is_complex() else dx, *(None for _ in ctx.call)


ALL_GATHER.gradient(_all_gather_gradient, _all_gather_context)


@DEVICE_ARENA_EMPTY.fake
def _device_arena_empty_fake(group: str, shape: list[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)
