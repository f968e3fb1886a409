"""Products of few rows on one core, beside torch's linear and the mere reading of the weights.

One rank: `python -m bench.run few_rows --ranks 1 --dtype bf16`. Weights are taken from so many copies that no cache
holds them; of `few_rows_cached` there is one copy. "read" is torch's sum over their bytes as integers of eight bytes,
so K must be even, in 16 bits a multiple of four.
"""

from __future__ import annotations

from itertools import cycle

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.cell import Cell, Setting, compare, rounding
from bench.shapes import Gemm
from bench.timing import Candidate
from tpkernels import ops

MEMORY = 128 << 20  # bytes of weights, at least where they are not tiny
MOST_COPIES = 64


def few_rows(setting: Setting, size: Gemm) -> Cell:
    """y[M, N] = x[M, K] @ w[N, K].T by each of them, w in memory."""
    return _few_rows(setting, size, "few_rows", MEMORY)


def few_rows_cached(setting: Setting, size: Gemm) -> Cell:
    """The same, w where the last product left it: in a cache that it fits into."""
    return _few_rows(setting, size, "few_rows_cached", 0)


def _few_rows(setting: Setting, size: Gemm, op: str, memory: int) -> Cell:
    M, N, K = size
    x, w, group = setting.values(0, M, K), setting.values(1, N, K), setting.group()
    copies = max(1, min(MOST_COPIES, -(-memory // w.nbytes)))
    weights = cycle([w.clone() for _ in range(copies)])
    words = cycle([w.clone().view(torch.int64) for _ in range(copies)])
    exact = x.double() @ w.double().T
    steps = x.double().abs() @ w.double().abs().T
    right = compare(exact, 1.01 * rounding(setting.dtype) * exact.abs() + (K + 2) * 2.0**-24 * steps)
    total = int(w.view(torch.int64).sum())

    def read(found: Tensor) -> float:
        return 0.0 if int(found) == total else 9.0

    label: dict[str, str | None] = {"codec": "none", "path": None, "transport": None}
    candidates = [
        Candidate("read", lambda: next(words).sum(), read, label=label),
        Candidate("linear", lambda: F.linear(x, next(weights)), right, label=label),
        Candidate("tpkernels", lambda: ops.replicated_gemm(x, next(weights), group=group), right, label=label),
    ]
    wanted = [c for c in candidates if not setting.only or c.name in ("read", *setting.only)]
    return Cell(op, setting.dtype_name, setting.world_size, size._asdict(), wanted, "read", flops=2 * M * N * K)
