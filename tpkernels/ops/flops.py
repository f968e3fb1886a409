"""The floating-point operations of this rank's products, for torch.utils.flop_counter.FlopCounterMode."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

Call = torch.ops.tpkernels


@register_flop_formula([Call.gemm_all_reduce, Call.gemm_reduce_scatter, Call.replicated_gemm])
def _forward(x: torch.Size, w: torch.Size, *args: Any, **kwargs: Any) -> int:
    return 2 * prod(x[:-1]) * prod(w)


@register_flop_formula(Call.all_gather_gemm)
def _gathered(x_shard: torch.Size, w: torch.Size, *args: Any, out_shape: torch.Size, **kwargs: Any) -> int:
    return 2 * prod(out_shape[:-1]) * prod(w)


def _of_gradients(dy: torch.Size, x: torch.Size, w: torch.Size, need_x: bool, need_w: bool, tokens: int) -> int:
    """Of dx = dy @ w and dw = dy.T @ x; what is not needed for these has another shape."""
    return 2 * tokens * dy[-1] * (need_x * w[-1] + need_w * x[-1])


@register_flop_formula([Call.linear_backward, Call.replicated_gemm_backward, Call.all_gather_gemm_backward])
def _backward(dy: torch.Size, x: torch.Size, w: torch.Size, x_too: bool, w_too: bool, *args: Any, **kwargs: Any) -> int:
    return _of_gradients(dy, x, w, x_too, w_too, prod(dy[:-1]))


@register_flop_formula(Call.gemm_reduce_scatter_backward)
def _scattered_backward(
    dy_shard: torch.Size,
    x: torch.Size,
    w: torch.Size,
    x_too: bool,
    w_too: bool,
    *args: Any,
    out_shape: Sequence[torch.Size],
    **kwargs: Any,
) -> int:
    return _of_gradients(dy_shard, x, w, x_too, w_too, prod((x if w_too else out_shape[0])[:-1]))
