"""A sharded GEMM with the collective that follows or precedes it, and its gradient, which is the dual op.

Every function: the public name, the fake kernel (what torch.compile sees), the gradient. A gradient has two ways: the
fused backward op, and, when a second derivative is wanted, the same made of differentiable ops.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, is_autocast_enabled
from torch.compiler import is_dynamo_compiling

from tpkernels._native import _C
from tpkernels.comm.group import Group, resolve

from ._op import Op, recorder
from .checks import check_dim, check_linear, check_size
from .collectives import ALL_GATHER, ALL_REDUCE
from .gradients import backward_codec, copy_to
from .linear import autocast, gradient_fakes, linear_gradients, linear_shape, rows, save_linear, saved_linear, wanted
from .sizes import full_shape, full_size, shard_shape

GEMM_ALL_REDUCE = Op("gemm_all_reduce", communicates=True)
GEMM_REDUCE_SCATTER = Op("gemm_reduce_scatter", communicates=True)
ALL_GATHER_GEMM = Op("all_gather_gemm", communicates=True)
REPLICATED_GEMM = Op("replicated_gemm")  # sends in its backward alone
LINEAR_BACKWARD = Op("linear_backward")
REPLICATED_GEMM_BACKWARD = Op("replicated_gemm_backward", communicates=True)
GEMM_REDUCE_SCATTER_BACKWARD = Op("gemm_reduce_scatter_backward", communicates=True)
ALL_GATHER_GEMM_BACKWARD = Op("all_gather_gemm_backward", communicates=True)

# Bound once: an attribute takes 25 ns.
_fast_linear, _fast_gemm_all_reduce = _C.fast_linear, _C.fast_gemm_all_reduce


def gemm_all_reduce(
    x_shard: Tensor, w_shard: Tensor, bias: Tensor | None = None, *, group: Group | None = None, codec: str = "none"
) -> Tensor:
    """Multiply by a weight cut along K and sum over the ranks.

    Equal to:

        y = all_reduce(x_shard @ w_shard.T) + bias       # [..., N], the same on every rank

    Args:
        x_shard: [..., K / R], 2 dims or more, fp32 | bf16 | fp16 | fp64, any strides.
        w_shard: [N, K / R], the dtype and device of x_shard. K need not divide by R.
        bias: [N], replicated, or None. It is added once, before the sum is rounded.
        group: the ranks; None means all ranks of the default process group.
        codec: how partial sums are packed on the wire; "none" keeps every bit.

    Returns:
        y, contiguous, the dtype of x_shard. Sums over the ranks in fp32, in rank order: every rank has the same bits.

    Gradient: local, because the gradient of y is the same on all ranks. Under autocast all tensors are cast first.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or codec do not fit (says which, expected, got).
        RankMismatchError: the ranks called with different shapes, dtypes or codecs.
        TimeoutError, PeerLostError: a rank did not come within `group.timeout_s`, or died; the text names it.

    Source: row-parallel linear of Shoeybi et al. 2019 (arXiv:1909.08053).
    """
    if type(group) is not Group:
        group = resolve(group)
    if is_autocast_enabled(group._device_type):
        x_shard, w_shard, bias = autocast(group._device_type, x_shard, w_shard, bias)  # type: ignore[assignment]
    elif (
        not is_dynamo_compiling()
        and (y := _fast_gemm_all_reduce(x_shard, w_shard, bias, group._address, codec)) is not None
    ):
        return y
    tensors = (x_shard, w_shard) if bias is None else (x_shard, w_shard, bias)
    call = GEMM_ALL_REDUCE.way(group, *tensors)
    plain = call is not GEMM_ALL_REDUCE.dispatch
    check_linear("gemm_all_reduce", x_shard, w_shard, bias, codec, group, plain=plain)
    return call(x_shard, w_shard, bias, group.name, group.world_size, codec)  # type: ignore[no-any-return]


@GEMM_ALL_REDUCE.fake
def _gemm_all_reduce_fake(
    x_shard: Tensor, w_shard: Tensor, bias: Tensor | None, group: str, world_size: int, codec: str
) -> Tensor:
    return x_shard.new_empty(linear_shape(x_shard, w_shard))


def _gemm_all_reduce_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, w, needs = saved_linear(ctx, dy)
    if torch.is_grad_enabled():
        return wanted(ctx, needs, linear_gradients(copy_to(dy, *ctx.call), x, w, needs, dy_bias=dy))
    return wanted(ctx, needs, LINEAR_BACKWARD(dy, x, w, *needs, ctx.call[0]))


GEMM_ALL_REDUCE.gradient(_gemm_all_reduce_gradient, save_linear)


def gemm_reduce_scatter(
    x_shard: Tensor,
    w_shard: Tensor,
    bias: Tensor | None = None,
    *,
    group: Group | None = None,
    dim: int = 0,
    codec: str = "none",
    grad_codec: str | None = None,
) -> Tensor:
    """Multiply by a weight cut along K, sum over the ranks, keep this rank's tokens.

    Equal to:

        y = all_reduce(x_shard @ w_shard.T) + bias       # [M, N]
        return split(y, R, dim)[rank]                    # [M / R, N] with dim=0

    Args:
        x_shard: [..., K / R], 2 dims or more, fp32 | bf16 | fp16 | fp64, any strides.
        w_shard: [N, K / R], the dtype and device of x_shard.
        bias: [N], replicated, or None.
        group: the ranks; None means all ranks of the default process group.
        dim: the token dimension that is cut, any but the last. It need not divide by R: the first ranks get one more.
        codec: how partial sums are packed on the wire; "none" keeps every bit.
        grad_codec: how the backward packs the gradient that it gathers; None: as `codec`.

    Returns:
        this rank's tokens of y, contiguous, the dtype of x_shard; the same bits as `gemm_all_reduce` gives.

    Gradient: that of the result is gathered once, and gives those of x_shard, w_shard and bias. The one of bias is the
    full sum over all tokens, on every rank. Under autocast all tensors are cast first.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices, dim or codecs do not fit (says which, expected, got).
        RankMismatchError, TimeoutError, PeerLostError: as in `gemm_all_reduce`.

    Source: row-parallel linear of Shoeybi et al. 2019 (arXiv:1909.08053), split as in Korthikanti et al. 2022
    (arXiv:2205.05198).
    """
    group = resolve(group)
    if is_autocast_enabled(group._device_type):
        x_shard, w_shard, bias = autocast(group._device_type, x_shard, w_shard, bias)  # type: ignore[assignment]
    grad_codec = backward_codec("gemm_reduce_scatter", codec, grad_codec, x_shard)
    tensors = (x_shard, w_shard) if bias is None else (x_shard, w_shard, bias)
    call = GEMM_REDUCE_SCATTER.way(group, *tensors)
    plain = call is not GEMM_REDUCE_SCATTER.dispatch
    check_linear("gemm_reduce_scatter", x_shard, w_shard, bias, codec, group, plain=plain)
    dim = check_dim("gemm_reduce_scatter", x_shard, dim, tokens=True)
    place = (group.name, group.world_size, group.rank)
    return call(x_shard, w_shard, bias, *place, dim, codec, grad_codec)  # type: ignore[no-any-return]


@GEMM_REDUCE_SCATTER.fake
def _gemm_reduce_scatter_fake(
    x_shard: Tensor,
    w_shard: Tensor,
    bias: Tensor | None,
    group: str,
    world_size: int,
    rank: int,
    dim: int,
    codec: str,
    grad_codec: str,
) -> Tensor:
    full = torch.Size(linear_shape(x_shard, w_shard))
    return x_shard.new_empty(shard_shape(full, world_size, rank, dim))


def _gemm_reduce_scatter_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    save_linear(ctx, inputs, output)
    ctx.dim_size = inputs[0].size(inputs[6])


def _gemm_reduce_scatter_gradient(ctx: Any, dy_shard: Tensor) -> tuple[Tensor | None, ...]:
    group, world_size, rank, dim, codec, grad_codec = ctx.call
    x, w, needs = saved_linear(ctx, dy_shard)
    if not torch.is_grad_enabled():
        call = (group, world_size, dim, ctx.dim_size, grad_codec)
        return wanted(ctx, needs, GEMM_REDUCE_SCATTER_BACKWARD(dy_shard, x, w, *needs, *call))
    dy = ALL_GATHER(dy_shard, group, world_size, rank, dim, ctx.dim_size, grad_codec, codec)
    dx, dw, _ = linear_gradients(dy, x, w, (needs[0], needs[1], False))
    db = ALL_REDUCE(rows(dy_shard).sum(0), group, world_size, "sum", "none") if needs[2] else None
    return wanted(ctx, needs, (dx, dw, db))


GEMM_REDUCE_SCATTER.gradient(_gemm_reduce_scatter_gradient, _gemm_reduce_scatter_context)


def all_gather_gemm(
    x_shard: Tensor,
    w_shard: Tensor,
    bias: Tensor | None = None,
    *,
    group: Group | None = None,
    dim: int = 0,
    dim_size: int | None = None,
    codec: str = "none",
    grad_codec: str | None = None,
) -> Tensor:
    """Gather the tokens of all ranks and multiply them by a weight cut along N.

    Equal to:

        x = all_gather(x_shard, dim)             # [M, K] with dim=0
        return x @ w_shard.T + bias              # [M, N / R]

    Args:
        x_shard: [..., K], this rank's tokens, 2 dims or more, fp32 | bf16 | fp16 | fp64, any strides.
        w_shard: [N / R, K], the dtype and device of x_shard. N need not divide by R.
        bias: [N / R], this rank's part, or None.
        group: the ranks; None means all ranks of the default process group.
        dim: the token dimension that is gathered, any but the last.
        dim_size: its size after gathering, cut so that the first ranks have one index more. None: the ranks exchange
            theirs (a short call more); under torch.compile it means R equal parts.
        codec: how x_shard is packed on the wire, also where the backward gathers it again; "none" keeps every bit.
        grad_codec: how the backward packs the partial gradients of x that it scatters; None: as `codec`.

    Returns:
        y of all tokens and this rank's part of N, contiguous, the dtype of x_shard.

    Gradient: that of x_shard is reduce_scatter of the ranks' partial ones; that of w_shard gathers x again instead of
    keeping it. Under autocast all tensors are cast first.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices, dim, dim_size or codecs do not fit (says which, expected, got).
        RankMismatchError, TimeoutError, PeerLostError: as in `gemm_all_reduce`.

    Source: column-parallel linear with sequence parallelism, Korthikanti et al. 2022 (arXiv:2205.05198).
    """
    group = resolve(group)
    if is_autocast_enabled(group._device_type):
        x_shard, w_shard, bias = autocast(group._device_type, x_shard, w_shard, bias)  # type: ignore[assignment]
    grad_codec = backward_codec("all_gather_gemm", codec, grad_codec, x_shard)
    tensors = (x_shard, w_shard) if bias is None else (x_shard, w_shard, bias)
    call = ALL_GATHER_GEMM.way(group, *tensors)
    plain = call is not ALL_GATHER_GEMM.dispatch
    check_linear("all_gather_gemm", x_shard, w_shard, bias, codec, group, plain=plain)
    dim = check_dim("all_gather_gemm", x_shard, dim, tokens=True)
    check_size("all_gather_gemm", "dim_size", dim_size)
    wants_grad = torch.is_grad_enabled() and (x_shard.requires_grad or w_shard.requires_grad)
    size = full_size("all_gather_gemm", x_shard, dim, dim_size, group, wants_grad)
    place = (group.name, group.world_size, group.rank)
    return call(x_shard, w_shard, bias, *place, dim, size, codec, grad_codec)  # type: ignore[no-any-return]


@ALL_GATHER_GEMM.fake
def _all_gather_gemm_fake(
    x_shard: Tensor,
    w_shard: Tensor,
    bias: Tensor | None,
    group: str,
    world_size: int,
    rank: int,
    dim: int,
    dim_size: int,
    codec: str,
    grad_codec: str,
) -> Tensor:
    shape = torch.Size(linear_shape(x_shard, w_shard))
    return x_shard.new_empty(full_shape(shape, world_size, dim, dim_size))


def _all_gather_gemm_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    save_linear(ctx, inputs, output)
    ctx.dim_size = output.size(inputs[6])


def _all_gather_gemm_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    group, world_size, rank, dim, _, codec, grad_codec = ctx.call
    x, w, needs = saved_linear(ctx, dy)
    if not torch.is_grad_enabled():
        call = (group, world_size, rank, dim, ctx.dim_size, codec, grad_codec)
        return wanted(ctx, needs, ALL_GATHER_GEMM_BACKWARD(dy, x, w, *needs, *call))
    place = (group, world_size, rank, dim)
    dx = GEMM_REDUCE_SCATTER.dispatch(dy, w.t(), None, *place, grad_codec, codec) if needs[0] else None
    full = ALL_GATHER(x, *place, ctx.dim_size, codec, grad_codec) if needs[1] else x
    _, dw, db = linear_gradients(dy, full, w, (False, needs[1], needs[2]))
    return wanted(ctx, needs, (dx, dw, db))


ALL_GATHER_GEMM.gradient(_all_gather_gemm_gradient, _all_gather_gemm_context)


def replicated_gemm(
    x: Tensor,
    w_shard: Tensor,
    bias: Tensor | None = None,
    *,
    group: Group | None = None,
    codec: str = "none",
    grad_codec: str | None = None,
) -> Tensor:
    """Multiply what all ranks hold by a weight cut along N; the communication is in the backward.

    Equal to, with every rank getting its part of N:

        y = x @ w_shard.T + bias                 # [..., N / R]

    Args:
        x: [..., K], replicated, 2 dims or more, fp32 | bf16 | fp16 | fp64, any strides.
        w_shard: [N / R, K], the dtype and device of x. N need not divide by R.
        bias: [N / R], this rank's part, or None.
        group: the ranks; None means all ranks of the default process group.
        codec: how the partial gradients of x are packed on the wire; "none" keeps every bit.
        grad_codec: takes the place of `codec`, so that all ops with a backward of their own read alike.

    Returns:
        this rank's part of y, contiguous, the dtype of x. Nothing is sent.

    Gradient: that of x is summed over the ranks, while that of w_shard is being computed. x must require a gradient on
    all ranks or on none. Under autocast all tensors are cast first.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or codec do not fit (says which, expected, got).
        RankMismatchError, TimeoutError, PeerLostError: in the backward, as in `gemm_all_reduce`.

    Source: column-parallel linear of Shoeybi et al. 2019 (arXiv:1909.08053).
    """
    if type(group) is not Group:
        group = resolve(group)
    if is_autocast_enabled(group._device_type):
        x, w_shard, bias = autocast(group._device_type, x, w_shard, bias)  # type: ignore[assignment]
    elif (
        grad_codec is None
        and not is_dynamo_compiling()
        and (y := _fast_linear(x, w_shard, bias, group._address, codec)) is not None
    ):
        return y
    grad_codec = backward_codec("replicated_gemm", codec, grad_codec, x)
    tensors = (x, w_shard) if bias is None else (x, w_shard, bias)
    call = REPLICATED_GEMM.way(group, *tensors)
    plain = call is not REPLICATED_GEMM.dispatch
    check_linear("replicated_gemm", x, w_shard, bias, codec, group, x_name="x", plain=plain)
    return call(x, w_shard, bias, group.name, group.world_size, grad_codec)  # type: ignore[no-any-return]


@REPLICATED_GEMM.fake
def _replicated_gemm_fake(
    x: Tensor, w_shard: Tensor, bias: Tensor | None, group: str, world_size: int, codec: str
) -> Tensor:
    return x.new_empty(linear_shape(x, w_shard))


def _replicated_gemm_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, w, needs = saved_linear(ctx, dy)
    if not torch.is_grad_enabled():
        return wanted(ctx, needs, REPLICATED_GEMM_BACKWARD(dy, x, w, *needs, *ctx.call))
    dx = GEMM_ALL_REDUCE.dispatch(dy, w.t(), None, *ctx.call) if needs[0] else None
    _, dw, db = linear_gradients(dy, copy_to(x, *ctx.call), w, (False, needs[1], needs[2]))
    return wanted(ctx, needs, (dx, dw, db))


REPLICATED_GEMM.gradient(_replicated_gemm_gradient, save_linear)


_C.set_recorders(
    recorder("replicated_gemm", _C.forward_linear, _C.backward_linear),
    _replicated_gemm_gradient,
    recorder("gemm_all_reduce", _C.forward_gemm_all_reduce, _C.backward_gemm_all_reduce),
    _gemm_all_reduce_gradient,
)


def _fake_backward(op: Op, tokens: Callable[..., Sequence[Any]]) -> None:
    """Register the shapes of an op that returns the gradients of x, w and bias.

    Args:
        op: takes dy, x, w, which gradients are wanted, and its call: the arguments from the group on.
        tokens: (shape of dy, *call) -> the shape of x without its last dimension.
    """

    def fake(
        dy: Tensor, x: Tensor, w: Tensor, need_x: bool, need_w: bool, need_b: bool, *call: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        return gradient_fakes(list(tokens(dy.shape, *call)), dy, x, w, (need_x, need_w, need_b))

    op.fake(fake)


def _same_tokens(dy: torch.Size, *call: Any) -> Sequence[Any]:
    return dy[:-1]


def _all_tokens(dy: torch.Size, group: str, world_size: int, dim: int, dim_size: int, codec: str) -> Sequence[Any]:
    return full_shape(dy, world_size, dim, dim_size)[:-1]


def _tokens_of_rank(dy: torch.Size, group: str, world_size: int, rank: int, dim: int, *rest: Any) -> Sequence[Any]:
    return shard_shape(dy, world_size, rank, dim)[:-1]


_fake_backward(LINEAR_BACKWARD, _same_tokens)
_fake_backward(REPLICATED_GEMM_BACKWARD, _same_tokens)
_fake_backward(GEMM_REDUCE_SCATTER_BACKWARD, _all_tokens)
_fake_backward(ALL_GATHER_GEMM_BACKWARD, _tokens_of_rank)
