"""A cell of a table: one op at one size, its candidates, and the bounds of their errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.timing import Candidate
from tpkernels.testing.case import CODEC_FLOOR as CODEC_FLOOR
from tpkernels.testing.case import CODEC_ROUNDING as CODEC_ROUNDING

DTYPES = {
    "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64,
    "int32": torch.int32, "int64": torch.int64,
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One measurement: the candidates that it compares.

    Args:
        sizes: those of bytes, M, N, K that mean something here.
        baseline: the candidate that ratios are taken against.
        roofs: candidates that are part of the job (the GEMM alone); time beyond the fastest of them is exposed.
        flops: of one rank. 0: no GFLOP/s.
        bus_factor: bus bandwidth over bytes / time. 0: no bandwidths.
    """

    op: str
    dtype: str
    world_size: int
    sizes: dict[str, int]
    candidates: list[Candidate]
    baseline: str
    roofs: tuple[str, ...] = ()
    flops: int = 0
    bus_factor: float = 0.0


@dataclass
class Setting:
    """The options and groups that the cells of one run share, on one rank."""

    rank: int
    world_size: int
    dtype_name: str = "fp32"
    codec: str = "none"
    only: tuple[str, ...] = ()
    seed: int = 7
    arena_bytes: int = 16 << 20
    transport: str = "auto"  # of the candidates that name none
    _groups: dict[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    def group(self, transport: str = "auto") -> Any:
        """All ranks, over this transport; opened at the first call."""
        transport = self.transport if transport == "auto" else transport
        if transport not in self._groups:
            import tpkernels as tpk

            self._groups[transport] = tpk.Group.open(None, arena_bytes=self.arena_bytes, transport=transport)
        return self._groups[transport]

    def ours(self, transport: str = "auto", codec: str | None = None, path: str | None = None) -> dict[str, str | None]:
        """The label of a candidate of this library."""
        return {"codec": codec or self.codec, "transport": self.group(transport).transport, "path": path}

    def path(self, op: str, transport: str = "auto", **shape: int) -> str:
        """The path that the chooser takes for this shape (the sizes of this rank)."""
        return str(self.group(transport).explain(op, dtype=self.dtype, codec=self.codec, **shape).path)

    def close(self) -> None:
        """Close the groups, on all ranks in the same order."""
        for group in self._groups.values():
            group.close()
        self._groups.clear()

    def values(self, rank: int, *shape: int) -> Tensor:
        """Rank's input, the same wherever it is made."""
        source = torch.Generator().manual_seed(self.seed * 1000 + rank)
        if self.dtype.is_floating_point:
            return torch.randn(shape, generator=source).to(self.dtype)
        return torch.randint(-1000, 1000, shape, generator=source, dtype=self.dtype)

    def pick(self, **makers: Callable[[], Candidate]) -> list[Candidate]:
        """Make the candidates named in `only`; all, where it is empty."""
        return [make() for name, make in makers.items() if not self.only or name in self.only]


def rounding(dtype: torch.dtype) -> float:
    """Half a unit in the last place, relative; 0 for integers."""
    return torch.finfo(dtype).eps / 2 if dtype.is_floating_point else 0.0


def compare(want: Tensor, allowed: Tensor) -> Callable[[Tensor], float]:
    """A check of a result against fp64: the largest error in units of what rounding explains."""
    floor = torch.finfo(torch.float64).tiny

    def error(found: Tensor) -> float:
        if found.shape != want.shape:
            return math.inf
        if not want.numel():
            return 0.0
        return float(((found.double() - want).abs() / allowed.clamp(min=floor)).max())

    return error


def sum_tolerance(setting: Setting, magnitude: Tensor, codec: str = "none") -> Tensor:
    """How far a sum over the ranks may be off, given the sum of the terms' magnitudes (both fp64).

    Each of R - 1 additions and the result round once in the dtype (gloo adds in the dtype, hop by hop). A codec rounds
    each term and then the sum; small values beside large ones in a block lose a fixed amount.
    """
    steps = setting.world_size * rounding(setting.dtype) + 2.02 * CODEC_ROUNDING[codec]
    floor = 2.0**-22 + 2.02 * CODEC_FLOOR[codec]
    lost = float(magnitude.max()) * floor if codec != "none" and magnitude.numel() else 0.0
    return magnitude * steps + lost


def product_tolerance(setting: Setting, want: Tensor, inner: int, scale: float, codec: str = "none") -> Tensor:
    """How far x @ w.T summed over ranks may be off.

    fp32 accumulation of `inner` products of size `scale` walks at random: 8 standard deviations of it. The partial
    products and their sum round in the dtype, and are of the size of the result's largest element.
    """
    walk = 8 * math.sqrt(inner) * 2.0**-24 * scale * math.sqrt(inner)
    largest = float(want.abs().max()) if want.numel() else 0.0
    packed = 2.02 * (CODEC_ROUNDING[codec] + CODEC_FLOOR[codec])
    steps = (setting.world_size + 1) * rounding(setting.dtype) + packed
    return torch.full_like(want, walk + steps * 2 * largest)
