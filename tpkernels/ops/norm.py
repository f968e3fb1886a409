"""The residual add and RMSNorm that follow a row-parallel layer, in one op with its all-reduce; the norm of gradients.

Every function: the public name, the fake kernel (what torch.compile sees), the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, is_autocast_enabled

from tpkernels.comm.group import Group, resolve
from tpkernels.compress import FLOATS

from ._op import Op
from .checks import check_codec, check_one_device, check_tensor, names, sums_dtype
from .gradients import copy_to

ALL_REDUCE_ADD_RMS_NORM = Op("all_reduce_add_rms_norm", communicates=True)
RMS_NORM_BACKWARD = Op("rms_norm_backward")
SQUARED_NORM = Op("squared_norm")


def all_reduce_add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    *,
    group: Group | None = None,
    eps: float | None = None,
    codec: str = "none",
) -> tuple[Tensor, Tensor]:
    """Sum over the ranks, add to the residual stream, normalise: what follows a row-parallel layer, in one op.

    Equal to:

        residual_out = residual + all_reduce(x)                                         # [..., D]
        y = residual_out / sqrt(mean(residual_out^2, dim=-1) + eps) * weight            # [..., D]

    Args:
        x: [..., D], 1 dim or more, partial, fp32 | bf16 | fp16 | fp64, any strides.
        residual: [..., D], replicated, the dtype and device of x.
        weight: [D], replicated, the dtype and device of x.
        group: the ranks; None means all ranks of the default process group.
        eps: 0 or more; None means the smallest step of the dtype in which the norm is taken, as for F.rms_norm.
        codec: how x is packed on the wire; "none" keeps every bit.

    Returns:
        (y, residual_out), contiguous, the dtype of x, the same bits on every rank. The sum over the ranks is rounded as
        `all_reduce` rounds it, residual_out is that sum plus residual, rounded again; the norm of residual_out is taken
        in fp32 (fp64 for fp64) and y rounded once.

    Gradient: local, because the gradients of y and residual_out are the same on all ranks. Under autocast x, residual
    and weight are first cast to the widest dtype among them, in which torch would add and normalise; elsewhere they
    must have one dtype.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices, eps or codec do not fit (says which, expected, got).
        RankMismatchError: the ranks called with different shapes, dtypes or codecs.
        TimeoutError, PeerLostError: a rank did not come within `group.timeout_s`, or died; the text names it.

    Source: RMSNorm of Zhang and Sennrich 2019 (arXiv:1910.07467).
    """
    group = resolve(group)
    if isinstance(x, Tensor) and x.device.type != "meta" and is_autocast_enabled(x.device.type):
        x, residual, weight = _to_the_widest(x, residual, weight)
    call = ALL_REDUCE_ADD_RMS_NORM.way(group, x, residual, weight)
    plain = call is not ALL_REDUCE_ADD_RMS_NORM.dispatch
    _check_add_norm(x, residual, weight, codec, group, plain=plain)
    step = _check_eps(x.dtype, eps)
    y, residual_out, _ = call(x, residual, weight, group.name, group.world_size, step, codec)
    return y, residual_out


def _to_the_widest(*tensors: Any) -> Any:
    """Cast to the dtype of their sum; the checks refuse anything that is no floating-point tensor."""
    if not all(isinstance(t, Tensor) and t.is_floating_point() for t in tensors):
        return tensors
    dtype = tensors[0].dtype
    for t in tensors[1:]:
        dtype = torch.promote_types(dtype, t.dtype)
    return [t.to(dtype) for t in tensors]


def _check_add_norm(x: Any, residual: Any, weight: Any, codec: Any, group: Group, *, plain: bool) -> None:
    op = "all_reduce_add_rms_norm"
    if not plain:
        check_tensor(op, "x", x, group)
        check_tensor(op, "residual", residual, group)
        check_tensor(op, "weight", weight, group)
    if x.dtype not in FLOATS:
        raise ValueError(f"{op}: x must have a dtype of {names(FLOATS)}, got {names([x.dtype])}")
    if not x.dtype == residual.dtype == weight.dtype:
        raise ValueError(
            f"{op}: x, residual and weight must have the same dtype, "
            f"got {names([x.dtype, residual.dtype, weight.dtype])}"
        )
    if x.dim() < 1:
        raise ValueError(f"{op}: x must have 1 dim or more, got 0")
    if residual.shape != x.shape:
        raise ValueError(
            f"{op}: x and residual must have the same shape, got {list(x.shape)} and {list(residual.shape)}"
        )
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"{op}: weight must have shape {list(x.shape[-1:])}, got {list(weight.shape)}")
    if not plain:
        check_one_device(op, x, residual, weight)
    check_codec(op, codec, x.dtype)


def _check_eps(dtype: torch.dtype, eps: Any) -> float:
    if eps is None:
        return torch.finfo(sums_dtype(dtype)).eps
    if isinstance(eps, bool) or not isinstance(eps, int | float):
        raise TypeError(f"all_reduce_add_rms_norm: eps must be a float or None, got {type(eps).__name__}")
    if not 0.0 <= eps < math.inf:
        raise ValueError(f"all_reduce_add_rms_norm: eps must be 0 or more and finite, got {eps}")
    return float(eps)


@ALL_REDUCE_ADD_RMS_NORM.fake
def _all_reduce_add_rms_norm_fake(
    x: Tensor, residual: Tensor, weight: Tensor, group: str, world_size: int, eps: float, codec: str
) -> tuple[Tensor, Tensor, Tensor]:
    inverse_rms = x.new_empty(x.shape[:-1], dtype=sums_dtype(x.dtype))
    return x.new_empty(x.shape), x.new_empty(x.shape), inverse_rms


@RMS_NORM_BACKWARD.fake
def _rms_norm_backward_fake(
    dy: Tensor,
    dresidual_out: Tensor | None,
    residual_out: Tensor,
    weight: Tensor,
    inverse_rms: Tensor,
    need_r: bool,
    need_w: bool,
) -> tuple[Tensor, Tensor]:
    dr = residual_out.new_empty(residual_out.shape if need_r else [0])
    return dr, weight.new_empty(weight.shape if need_w else [0])


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, weight, *ctx.call = inputs
    _, residual_out, inverse_rms = output
    ctx.save_for_backward(residual_out, weight, inverse_rms)
    ctx.set_materialize_grads(False)  # inverse_rms is the op's own, and residual_out of the last layer is not used


def _gradient(
    ctx: Any, dy: Tensor | None, dr_out: Tensor | None, dinverse_rms: Tensor | None
) -> tuple[Tensor | None, ...]:
    need_x, need_residual, need_w, *_ = ctx.needs_input_grad
    need_r = need_x or need_residual
    if torch.is_grad_enabled():
        dr, dw = _differentiable_gradient(ctx, dy, dr_out, dinverse_rms)
    else:
        r, weight, inverse_rms = ctx.saved_tensors
        dr, dw = dr_out, None
        if dy is not None:
            dr, dw = RMS_NORM_BACKWARD(dy, dr_out, r, weight, inverse_rms, need_r, need_w)
        if dinverse_rms is not None and need_r:
            through = _through_inverse_rms(dinverse_rms, r, inverse_rms)
            dr = through if dr is None else dr + through
    group, world_size, _, codec = ctx.call
    dx = None if dr is None or not need_x else copy_to(dr, group, world_size, codec)
    return dx, dr if need_residual else None, dw if need_w else None, *(None for _ in ctx.call)


def _through_inverse_rms(dinverse_rms: Tensor, r: Tensor, inverse_rms: Tensor) -> Tensor:
    scale = -dinverse_rms * inverse_rms.pow(3) / max(r.shape[-1], 1)
    return (scale.unsqueeze(-1) * r.to(scale.dtype)).to(r.dtype)


def _differentiable_gradient(
    ctx: Any, dy: Tensor | None, dr_out: Tensor | None, dinverse_rms: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of residual_out and weight, from differentiable ops, for second derivatives."""
    r, weight, _ = ctx.saved_tensors
    wide = r.to(sums_dtype(r.dtype))
    inverse_rms = torch.rsqrt(wide.square().mean(-1) + ctx.call[2])
    dr, dw, i = dr_out, None, inverse_rms.unsqueeze(-1)
    if dy is not None:
        g = dy.to(wide.dtype) * weight.to(wide.dtype)
        through = i * (g - wide * i.square() * (g * wide).mean(-1, keepdim=True))
        dr = (through if dr_out is None else through + dr_out.to(wide.dtype)).to(r.dtype)
        dw = (dy.to(wide.dtype) * (wide * i)).sum_to_size(weight.shape).to(weight.dtype)
    if dinverse_rms is not None:
        through = _through_inverse_rms(dinverse_rms, r, inverse_rms)
        dr = through if dr is None else dr + through
    return dr, dw


ALL_REDUCE_ADD_RMS_NORM.gradient(_gradient, _context)


def squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of the squares of all values of all tensors, in one pass over them.

    Equal to:

        sum(x.double().square().sum() for x in tensors)

    Args:
        tensors: at least one, of one device, fp32 | bf16 | fp16 | fp64 (also mixed), any shapes and strides.

    Returns:
        a scalar, fp64: squares and sums in fp64, in an order that depends on the shapes alone. NaN and infinity stay.

    No gradient: it is for gradients.

    Raises:
        TypeError, ValueError: something is no tensor, has another dtype, layout or device, or there is nothing.
    """
    found = list(tensors)
    if not found:
        raise ValueError("squared_norm: tensors must have one tensor at least, got none")
    for x in found:
        check_tensor("squared_norm", "tensors", x, None)
        if x.dtype not in FLOATS:
            raise ValueError(f"squared_norm: tensors must have a dtype of {names(FLOATS)}, got {names([x.dtype])}")
        if x.device != found[0].device:
            raise ValueError(f"squared_norm: tensors must be on one device, got {found[0].device} and {x.device}")
    with torch.no_grad():
        return SQUARED_NORM.dispatch(found)  # type: ignore[no-any-return]


@SQUARED_NORM.fake
def _squared_norm_fake(xs: list[Tensor]) -> Tensor:
    return xs[0].new_empty([], dtype=torch.float64)
