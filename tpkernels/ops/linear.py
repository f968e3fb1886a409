"""Helpers of the fused GEMMs: y = x[..., K] @ w[N, K].T + bias[N], its shape, its gradients, autocast."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
Needs = tuple[bool, bool, bool]


def autocast(kind: str, *tensors: Tensor | None) -> list[Tensor | None]:
    """Cast as autocast does before an F.linear: floating-point tensors of that kind of device, fp64 excepted.

    Args:
        kind: of device, "cpu" or "cuda".
        tensors: x, w and bias; None and other devices' tensors are returned as they are.
    """
    dtype = torch.get_autocast_dtype(kind)

    def casts(t: Tensor | None) -> bool:
        return isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 and t.device.type == kind

    return [t.to(dtype) if t is not None and casts(t) else t for t in tensors]


def linear_shape(x: Tensor, w: Tensor) -> list[Any]:
    """Return the shape of x @ w.T: [..., K] and [N, K] give [..., N]."""
    return [*x.shape[:-1], w.shape[0]]


def save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Save the operands that the gradients need: x for that of w, w for that of x; and the arguments after bias."""
    x, w, _, *ctx.call = inputs
    need_x, need_w, *_ = ctx.needs_input_grad
    ctx.save_for_backward(x if need_w else None, w if need_x else None)


def saved_linear(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Needs]:
    """Return x, w and which gradients are wanted; dy in place of an operand that was not saved, which is not read."""
    x, w = ctx.saved_tensors
    need_x, need_w, need_b, *_ = ctx.needs_input_grad
    return dy if x is None else x, dy if w is None else w, (need_x, need_w, need_b)


def wanted(ctx: Any, needs: Needs, gradients: Gradients) -> tuple[Tensor | None, ...]:
    """Return the gradients of all arguments of the op: x, w and bias where wanted, else None."""
    found = [g if need else None for g, need in zip(gradients, needs, strict=True)]
    return *found, *(None for _ in ctx.needs_input_grad[3:])


def rows(x: Tensor) -> Tensor:
    """Return x[..., K] as [M, K]."""
    return x.flatten(0, -2)


def linear_gradients(dy: Tensor, x: Tensor, w: Tensor, needs: Needs, dy_bias: Tensor | None = None) -> Gradients:
    """Return the gradients of y = x @ w.T + bias, from differentiable ops; None for those that are not needed.

    Args:
        dy: [..., N].
        x: [..., K].
        w: [N, K].
        needs: which of the gradients of x, w and bias.
        dy_bias: summed for bias instead of dy.
    """
    need_x, need_w, need_b = needs
    dx = dy @ w if need_x else None
    dw = rows(dy).t() @ rows(x) if need_w else None
    db = rows(dy if dy_bias is None else dy_bias).sum(0) if need_b else None
    return dx, dw, db


def gradient_fakes(tokens: list[Any], dy: Tensor, x: Tensor, w: Tensor, needs: Needs) -> tuple[Tensor, Tensor, Tensor]:
    """Return tensors of the gradients' shapes; [0] for those that are not needed.

    Args:
        tokens: the dimensions of dx but the last.
        dy: [..., N].
        x: [..., K].
        w: [N, K].
        needs: which of the gradients of x, w and bias.
    """
    shapes = ([*tokens, w.shape[-1]], [dy.shape[-1], x.shape[-1]], [dy.shape[-1]])
    dx, dw, db = (dy.new_empty(shape if need else [0]) for shape, need in zip(shapes, needs, strict=True))
    return dx, dw, db
