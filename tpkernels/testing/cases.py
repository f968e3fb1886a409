"""One Case for every op, for forward, gradient, opcheck, compile, equality of the ranks and the bench; see case.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tpkernels import ops
from tpkernels.compress import bytes_per_value
from tpkernels.ops.checks import sums_dtype

from .case import PARTIAL, Case, Cut, Sizes, floor_of, present, unit

# --- collectives: x[..., M, N], the cut along dim


def _reduced(s: Sizes, x: Tensor) -> Tensor:
    reductions: dict[str, Callable[[Tensor], Tensor]] = {
        "sum": lambda t: t.sum(0, dtype=t.dtype),
        "avg": lambda t: t.mean(0),
        "max": lambda t: t.amax(0),
        "min": lambda t: t.amin(0),
    }
    return reductions[s.op](x)


def _whole(s: Sizes) -> dict[str, Tensor | None]:
    return {"x": s.randn("x", *s.x_shape, s.N)}


def _partials(s: Sizes) -> dict[str, Tensor | None]:
    return {"x": s.randn("x", s.R, *s.x_shape, s.N)}


def _message_bytes(s: Sizes) -> float:
    numel = torch.Size(s.x_shape).numel() * s.N
    return numel * bytes_per_value(s.codec, s.dtype.itemsize)


ALL_REDUCE = Case(
    name="all_reduce",
    op=ops.all_reduce,
    inputs=_partials,
    cuts=lambda s: {"x": PARTIAL},
    program=_reduced,
    options=lambda s: {"op": s.op, "codec": s.codec},
    roundings=1,
    wire_bytes=lambda s: 2 * _message_bytes(s) * (s.R - 1) / s.R,
)

REDUCE_SCATTER = Case(
    name="reduce_scatter",
    op=ops.reduce_scatter,
    inputs=_partials,
    cuts=lambda s: {"x": PARTIAL},
    program=_reduced,
    output_cut=lambda s: s.dim,
    options=lambda s: {"dim": s.dim, "op": s.op, "codec": s.codec},
    roundings=1,
    wire_bytes=lambda s: _message_bytes(s) * (s.R - 1) / s.R,
)

ALL_GATHER = Case(
    name="all_gather",
    op=ops.all_gather,
    inputs=_whole,
    cuts=lambda s: {"x": s.dim},
    program=lambda s, x: x.clone(),
    options=lambda s: {"dim": s.dim, "codec": s.codec, "grad": "split"},
    roundings=0,
    wire_bytes=lambda s: _message_bytes(s) * (s.R - 1) / s.R,
)

# --- GEMMs: x[..., M, K], w[N, K], bias[N]


def _linear(s: Sizes) -> dict[str, Tensor | None]:
    bias = s.randn("bias", s.N) if s.bias else None
    return {"x": s.randn("x", *s.x_shape, s.K), "w": s.randn("w", s.N, s.K), "bias": bias}


def _multiply(s: Sizes, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, w, bias)


def _over_k(s: Sizes) -> dict[str, Cut]:
    return {"x": len(s.x_shape), "w": 1, "bias": None}


def _gemm_flops(s: Sizes) -> int:
    return 2 * torch.Size(s.x_shape).numel() * s.N * s.K // s.R


def _output_bytes(s: Sizes) -> float:
    return torch.Size(s.x_shape).numel() * s.N * bytes_per_value(s.codec, s.dtype.itemsize)


GEMM_ALL_REDUCE = Case(
    name="gemm_all_reduce",
    op=ops.gemm_all_reduce,
    inputs=_linear,
    cuts=_over_k,
    program=_multiply,
    options=lambda s: {"codec": s.codec},
    terms=lambda s: s.K + s.R,
    roundings=3,
    flops=_gemm_flops,
    wire_bytes=lambda s: 2 * _output_bytes(s) * (s.R - 1) / s.R,
)

GEMM_REDUCE_SCATTER = replace(
    GEMM_ALL_REDUCE,
    name="gemm_reduce_scatter",
    op=ops.gemm_reduce_scatter,
    output_cut=lambda s: s.dim,
    options=lambda s: {"dim": s.dim, "codec": s.codec},
    wire_bytes=lambda s: _output_bytes(s) * (s.R - 1) / s.R,
)

ALL_GATHER_GEMM = replace(
    GEMM_ALL_REDUCE,
    name="all_gather_gemm",
    op=ops.all_gather_gemm,
    cuts=lambda s: {"x": s.dim, "w": 0, "bias": 0},
    output_cut=lambda s: len(s.x_shape),
    options=lambda s: {"dim": s.dim, "codec": s.codec},
    wire_bytes=lambda s: _output_bytes(replace(s, N=s.K)) * (s.R - 1) / s.R,
)

REPLICATED_GEMM = replace(
    GEMM_ALL_REDUCE,
    name="replicated_gemm",
    op=ops.replicated_gemm,
    cuts=lambda s: {"x": None, "w": 0, "bias": 0},
    output_cut=lambda s: len(s.x_shape),
    packings=0,
    wire_bytes=lambda s: 0.0,
)

# --- vocabulary: ids and targets [..., M], table[V, K], logits[..., M, V]


def _cross_entropy(s: Sizes, logits: Tensor, target: Tensor) -> Tensor:
    flat = F.cross_entropy(
        logits.reshape(-1, s.V), target.reshape(-1), reduction="none", ignore_index=-100, label_smoothing=s.smoothing
    )
    return flat.reshape(target.shape)


def _loss_inputs(s: Sizes) -> dict[str, Tensor | None]:
    target = s.ids("target", 0, *s.x_shape)
    return {"logits": s.randn("logits", *s.x_shape, s.V), "target": target.masked_fill(target % 5 == 1, -100)}


VOCAB_EMBEDDING = Case(
    name="vocab_embedding",
    op=ops.vocab_embedding,
    inputs=lambda s: {"ids": s.ids("ids", 0, *s.x_shape), "table": s.randn("table", s.V, s.K)},
    cuts=lambda s: {"ids": None, "table": 0},
    program=lambda s, ids, table: F.embedding(ids, table),
    roundings=0,
    packings=0,
    wire_bytes=lambda s: 2 * torch.Size(s.x_shape).numel() * s.K * s.dtype.itemsize * (s.R - 1) / s.R,
)


@dataclass(frozen=True)
class _Loss(Case):
    """Not a sum of products: the error is relative to the largest logit, which exponentials amplify."""

    def bound(self, s: Sizes, rank: int) -> Tensor:
        """The largest error of the loss: every exponential, V additions and a logarithm, each of size 1 + |logits|."""
        logits = present(self.inputs(s)["logits"])
        largest = 1.0 + logits.abs().amax(-1)
        return (s.V + s.R + 16) * unit(sums_dtype(s.dtype)) * largest

    def _mine(self, dy: Tensor, s: Sizes, rank: int) -> Tensor:
        return super()._mine(dy, s, rank).to(sums_dtype(s.dtype))

    def gradients(self, s: Sizes, rank: int) -> tuple[Tensor, list[Tensor | None], list[Tensor | None]]:
        """As in Case; a gradient is dloss times a difference of probabilities."""
        dy, wanted, _ = super().gradients(s, rank)
        logits = present(self.inputs(s)["logits"])
        largest = 1.0 + float(logits.abs().max()) if logits.numel() else 1.0
        factor = 2 * ((s.V + 16) * unit(sums_dtype(s.dtype)) * largest + unit(s.dtype))
        return dy, wanted, [factor * dy.double().abs().unsqueeze(-1).expand_as(present(wanted[0])), None]


VOCAB_CROSS_ENTROPY = _Loss(
    name="vocab_cross_entropy",
    op=ops.vocab_cross_entropy,
    inputs=_loss_inputs,
    cuts=lambda s: {"logits": len(s.x_shape), "target": None},
    program=_cross_entropy,
    options=lambda s: {"label_smoothing": s.smoothing},
    packings=0,
    wire_bytes=lambda s: 4 * torch.Size(s.x_shape).numel() * sums_dtype(s.dtype).itemsize * (s.R - 1) / s.R,
)

# --- residual add and norm: x[..., M, N], residual[..., M, N], weight[N]

EPS = 1e-5


def _add_norm_inputs(s: Sizes) -> dict[str, Tensor | None]:
    return {**_partials(s), "residual": s.randn("residual", *s.x_shape, s.N), "weight": s.randn("weight", s.N)}


def _inverse_rms(total: Tensor) -> Tensor:
    return torch.rsqrt(total.square().mean(-1, keepdim=True) + EPS)


def _add_norm(s: Sizes, x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    total = x.sum(0, dtype=x.dtype) + residual
    return torch.stack([total * _inverse_rms(total) * weight, total])


@wraps(ops.all_reduce_add_rms_norm)
def _stacked_add_norm(x: Tensor, residual: Tensor, weight: Tensor, **options: Any) -> Tensor:
    """Both results as one tensor [2, ..., M, N]: a Case has one."""
    return torch.stack(ops.all_reduce_add_rms_norm(x, residual, weight, **options))


@dataclass(frozen=True)
class _AddNorm(Case):
    """Not a sum of products: the rounding of the sum r is propagated to first order through i = 1 / rms(r)."""

    def _errors(self, s: Sizes) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return r, i, the largest errors of r, of i (relative) and of r * i."""
        x, residual = (present(self.inputs(s)[name]) for name in ("x", "residual"))
        r = x.sum(0) + residual
        i = _inverse_rms(r)
        magnitude = x.abs().sum(0) + residual.abs()
        off_r = self.rounding(s, self.packings) * magnitude + self.packings * floor_of(s, magnitude)
        off_i = i * ((r * i).abs() * off_r).mean(-1, keepdim=True) + (s.N + 8) * unit(sums_dtype(s.dtype))
        return r, i, off_r, off_i, i * off_r + (r * i).abs() * off_i

    def bound(self, s: Sizes, rank: int) -> Tensor:
        """The largest errors of y and residual_out."""
        weight = present(self.inputs(s)["weight"]).abs()
        r, i, off_r, _, off_normed = self._errors(s)
        off_y = weight * (off_normed + (r * i).abs() * (unit(s.dtype) + 4 * unit(sums_dtype(s.dtype))))
        return torch.stack([off_y, off_r])

    def gradients(self, s: Sizes, rank: int) -> tuple[Tensor, list[Tensor | None], list[Tensor | None]]:
        """As in Case; the gradient of r is i (g - n mean(g n)) with n = r i and g = dy weight."""
        dy, wanted, _ = super().gradients(s, rank)
        (dy_normed, dr_out), sums = dy.double().abs(), unit(sums_dtype(s.dtype))
        r, i, _, off_i, off_n = self._errors(s)
        n, g = (r * i).abs(), dy_normed * present(self.inputs(s)["weight"]).abs()

        def mean(x: Tensor) -> Tensor:
            return x.mean(-1, keepdim=True)

        size = i * (g + n * mean(g * n))
        off_r = size * (off_i + (s.N + 16) * sums + unit(s.dtype)) + i * (off_n * mean(g * n) + n * mean(g * off_n))
        off_r = off_r + unit(s.dtype) * dr_out
        tokens = torch.Size(s.x_shape).numel()
        off_w = dy_normed * (off_n + n * ((tokens + 16) * sums + unit(s.dtype)))
        return dy, wanted, [off_r, off_r, off_w.sum_to_size(s.N)]


ALL_REDUCE_ADD_RMS_NORM = _AddNorm(
    name="all_reduce_add_rms_norm",
    op=_stacked_add_norm,
    inputs=_add_norm_inputs,
    cuts=lambda s: {"x": PARTIAL, "residual": None, "weight": None},
    program=_add_norm,
    options=lambda s: {"eps": EPS, "codec": s.codec},
    wire_bytes=lambda s: 2 * _message_bytes(s) * (s.R - 1) / s.R,
)

COLLECTIVES = (ALL_REDUCE, REDUCE_SCATTER, ALL_GATHER)
GEMMS = (GEMM_ALL_REDUCE, GEMM_REDUCE_SCATTER, ALL_GATHER_GEMM, REPLICATED_GEMM)
VOCAB = (VOCAB_EMBEDDING, VOCAB_CROSS_ENTROPY)
CASES = (*COLLECTIVES, *GEMMS, *VOCAB, ALL_REDUCE_ADD_RMS_NORM)
"""Every op that has a result and a gradient."""
