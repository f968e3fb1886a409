"""Measured GEMM engines: timed when the user asks, agreed over the ranks, kept in a file for this machine and torch.

A run never times anything by itself: which engine multiplies decides the last bits of a product, and two runs must give
the same bits. `group.explain(op, M=..., N=..., K=..., tune=True)` measures one shape; from then on that shape takes the
faster engine in this group, and in every group of this machine that opens later. No group that is open already changes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Protocol

import torch

_ROUNDS = 7


class Ranks(Protocol):
    """A communicator, as far as measuring needs it."""

    rank: int

    def barrier(self) -> None:
        """Return when every rank has called this."""

    def exchange(self, mine: int) -> list[int]:
        """All-gather one integer: every rank's, in rank order."""

    def set_measured_engine(self, dtype: str, M: int, N: int, K: int, engine: str) -> None:
        """Take this engine for products of this shape."""

    def forget_measured_engines(self) -> None:
        """Take the engines of the rule."""


def engines_file() -> Path:
    """Return the file of the measured engines of this machine, torch and number of threads."""
    key = f"{_cpu_model()}|{torch.__version__}|{torch.get_num_threads()}"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return folder / "tpkernels" / f"engines-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


@cache
def _cpu_model() -> str:
    """The CPU's name; empty on other kinds of machines, which torch and threads still distinguish mostly."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return ""


def load(ranks: Ranks) -> None:
    """Give a group that opens the engines that were measured before; a file that cannot be read counts as none."""
    try:
        rows = json.loads(engines_file().read_text(encoding="utf-8"))
        for dtype, m, n, k, engine in rows:
            ranks.set_measured_engine(dtype, m, n, k, engine)
    except (OSError, ValueError, TypeError):
        ranks.forget_measured_engines()


def measure(ranks: Ranks, m: int, n: int, k: int, dtype: torch.dtype) -> dict[str, float]:
    """Time both engines for y[m, n] = x[m, k] @ w[n, k].T on every rank at once, and take the faster one from now on.

    Args:
        ranks: the communicator of the group; all ranks call this.
        m, n, k: this rank's sizes, all positive.
        dtype: float32; in the other dtypes a rule decides.

    Returns:
        microseconds by engine, of the slowest rank; the same on all ranks.
    """
    x, w = torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype)
    engines = {
        "aten": lambda: torch.nn.functional.linear(x, w),
        "onednn": lambda: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], ""),
    }
    best = torch.full((len(engines),), float("inf"), dtype=torch.float64)
    for _ in range(_ROUNDS):
        for i, run in enumerate(engines.values()):
            ranks.barrier()
            started = time.perf_counter()
            run()  # type: ignore[no-untyped-call]
            best[i] = min(best[i].item(), (time.perf_counter() - started) * 1e6)
    slowest = [max(times) / 1000 for times in zip(*_from_all(ranks, best), strict=True)]
    measured = dict(zip(engines, slowest, strict=True))
    name = str(dtype).removeprefix("torch.")
    winner = min(measured, key=lambda engine: measured[engine])
    ranks.set_measured_engine(name, m, n, k, winner)
    if ranks.rank == 0:
        _keep([name, m, n, k, winner])
    ranks.barrier()
    return measured


def _from_all(ranks: Ranks, microseconds: torch.Tensor) -> list[list[int]]:
    """All-gather the times, as whole nanoseconds: [rank][engine]."""
    columns = [ranks.exchange(int(us * 1000)) for us in microseconds.tolist()]
    return [list(row) for row in zip(*columns, strict=True)]


def _keep(row: list[str | int]) -> None:
    """Add a row to the file, replacing an older one of the same shape; other processes see the old file or the new."""
    file = engines_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        rows = [old for old in json.loads(file.read_text(encoding="utf-8")) if old[:4] != row[:4]]
    except (OSError, ValueError):
        rows = []
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False, encoding="utf-8") as new:
        json.dump([*rows, row], new)
    os.replace(new.name, file)
