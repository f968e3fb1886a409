"""Cells of the residual add and RMSNorm after an all-reduce: M tokens of N values.

Variants: `gloo` all_reduce in place, add, F.rms_norm; `unfused` the same with this library's all_reduce; `tpkernels`
the op. The normed result is checked, which shows an error of the sum, too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import baselines
from bench.cell import CODEC_FLOOR, CODEC_ROUNDING, Cell, Setting, compare, rounding
from bench.shapes import Rows
from bench.timing import Candidate
from tpkernels import ops

EPS = 1e-5


def check(setting: Setting, shape: Rows, residual: Tensor, weight: Tensor, codec: str) -> Callable[[Tensor], float]:
    """Against fp64: the roundings of the sum, of the residual add and of the result, carried through the norm."""
    terms = [setting.values(rank, shape.M, shape.N).double() for rank in range(setting.world_size)]
    total, magnitude = sum(terms, residual.double()), sum((t.abs() for t in terms), residual.double().abs())
    inverse = torch.rsqrt(total.square().mean(-1, keepdim=True) + EPS)
    unit, scale = rounding(setting.dtype), weight.double().abs()
    off = magnitude * inverse * ((setting.world_size + 2) * unit + 2.02 * CODEC_ROUNDING[codec])
    off = off + magnitude.max() * inverse * 2.02 * CODEC_FLOOR[codec]
    normed = total * inverse
    off = off + normed.abs() * (normed.abs() * off).mean(-1, keepdim=True)
    allowed = scale * (off + normed.abs() * (4 * unit + shape.N**0.5 * rounding(torch.float32)))
    return compare(normed * weight.double(), allowed)


def all_reduce_add_rms_norm(setting: Setting, shape: Rows) -> Cell:
    """What follows a row-parallel layer."""
    group, codec = setting.group(), setting.codec
    source, residual = setting.values(setting.rank, shape.M, shape.N), setting.values(100, shape.M, shape.N)
    weight = setting.values(101, shape.N)
    exact, packed = (check(setting, shape, residual, weight, c) for c in ("none", codec))
    mark = setting.rank + 1

    def candidate(
        name: str, run: Callable[[Tensor], Tensor], error: Callable[[Tensor], float], ours: bool
    ) -> Candidate:
        own = torch.empty_like(source)
        return Candidate(
            name,
            call=lambda: run(own),
            error=error,
            load=lambda: own.copy_(source),
            refresh=lambda: own.fill_(mark),
            label=setting.ours() if ours else {},
        )

    def unfused(x: Tensor) -> Tensor:
        return F.rms_norm(ops.all_reduce(x, group=group, codec=codec) + residual, (shape.N,), weight, EPS)

    def fused(x: Tensor) -> Tensor:
        return ops.all_reduce_add_rms_norm(x, residual, weight, group=group, eps=EPS, codec=codec)[0]

    def plain(x: Tensor) -> Tensor:
        return baselines.add_rms_norm_gloo(x, residual, weight, EPS)

    candidates = setting.pick(
        gloo=lambda: candidate("gloo", plain, exact, ours=False),
        unfused=lambda: candidate("unfused", unfused, packed, ours=True),
        tpkernels=lambda: candidate("tpkernels", fused, packed, ours=True),
    )
    sizes = {**shape._asdict(), "bytes": shape.M * shape.N * setting.itemsize}
    return Cell("all_reduce_add_rms_norm", setting.dtype_name, setting.world_size, sizes, candidates, "gloo")
