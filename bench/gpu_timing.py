"""Timing on a GPU: the protocol of bench/timing.py on the device's own clock.

A clock that reads CUDA events takes the place of the host's: a block's time is what passed on the device's stream. What
is timed is enqueued faster than it runs, or is a CUDA graph, so that the host does not show.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.rows import Row, circumstances, number, three, times
from bench.timing import Candidate, Timing, measure, ratios, summary

WARM_UPS = 100
ROUNDS = 21


class EventClock:
    """Seconds on the current stream since the first reading."""

    def __init__(self) -> None:
        self._last: Any = None
        self._total = 0.0

    def __call__(self) -> float:
        now = torch.cuda.Event(enable_timing=True)
        now.record()
        now.synchronize()
        if self._last is not None:
            self._total += self._last.elapsed_time(now) / 1e3
        self._last = now
        return self._total


class Alone:
    """A team of this process (bench.timing.Team); virtual ranks are its streams."""

    rank, world_size = 0, 1

    def barrier(self) -> None:
        torch.cuda.synchronize()

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        return [list(values)]

    def lost_s(self) -> float:
        return 0.0  # nobody else works on the GPU


@dataclass
class GpuCell:
    """One measurement on one GPU.

    Args:
        family, op, dtype: names.
        candidates: their calls enqueue on the current stream; `inside` of the job in one call.
        baseline: the candidate that ratios are taken against.
        R: virtual ranks; 1: one rank.
        sizes: those of bytes, M, N, K that mean something.
        traffic: bytes that each candidate must read and write at least, by its name; "" for all others.
        flops: of one job.
        inside: how many jobs one call of a candidate enqueues.
    """

    family: str
    op: str
    dtype: str
    candidates: list[Candidate]
    baseline: str
    R: int = 1
    sizes: dict[str, int] = field(default_factory=dict)
    traffic: dict[str, int] = field(default_factory=dict)
    flops: int = 0
    inside: int = 1


def copy_bytes_per_s(nbytes: int = 1 << 30) -> float:
    """Bytes that a copy on the device reads and writes in a second, the median of ROUNDS."""
    x, y = (torch.ones(nbytes, dtype=torch.uint8, device="cuda") for _ in range(2))
    candidate = Candidate("copy", call=lambda: y.copy_(x), error=lambda y: float(not bool(y[-1] == 1)) * 2)
    (timing,) = timed([candidate])
    return 2 * nbytes / summary(timing.seconds).median


def timed(candidates: Sequence[Candidate], rounds: int = ROUNDS, block_s: float = 0.01) -> list[Timing]:
    """Warm up the candidates that are right, then measure."""
    for candidate in candidates:
        candidate.load()
        if candidate.error(candidate.call()) <= 1.0:
            for _ in range(WARM_UPS):
                candidate.call()
    torch.cuda.synchronize()
    return measure(candidates, Alone(), rounds=rounds, block_s=block_s, clock=EventClock())


def gpu() -> dict[str, Any]:
    """The GPU, in words and numbers."""
    of = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "class": of.name,
        "gpu": of.name,
        "multiprocessors": of.multi_processor_count,
        "gib": round(of.total_memory / 2**30, 1),
    }


def rows_of(cell: GpuCell, copy_speed: float, where: Row | None = None) -> list[Row]:
    """Measure a cell: one row for each candidate.

    Args:
        copy_speed: of `copy_bytes_per_s`; a row's share is the time that its traffic takes at this speed over its own.
    """
    where = circumstances(pinned=False) if where is None else where
    where = {**where, "machine": {**where["machine"], **gpu()}}
    timings = {t.name: t for t in timed(cell.candidates)}
    for timing in timings.values():
        timing.seconds = [s / cell.inside for s in timing.seconds]
    baseline = timings.get(cell.baseline)
    return [row_of(cell, candidate, timings[candidate.name], baseline, copy_speed) | where
            for candidate in cell.candidates]  # fmt: skip


def row_of(cell: GpuCell, candidate: Candidate, timing: Timing, baseline: Timing | None, copy_speed: float) -> Row:
    """The numbers of one candidate; the names are those of bench/rows.py, where they mean the same."""
    of, runs = summary(timing.seconds), bool(timing.seconds)
    ratio = three(ratios(baseline, timing)) if runs and baseline is not None and baseline.seconds else [None] * 3
    traffic = cell.traffic.get(candidate.name, cell.traffic.get("", 0))
    floor = traffic / copy_speed if traffic else math.nan
    return {
        "family": cell.family, "op": cell.op, "variant": candidate.name,
        "codec": candidate.label.get("codec") or "none", "dtype": cell.dtype,
        "bytes": cell.sizes.get("bytes"), **{k: cell.sizes.get(k) for k in "MNK"}, "R": cell.R, "placement": "gpu",
        "path": candidate.label.get("path"), "transport": candidate.label.get("transport"), **times(of),
        "gflops": number(cell.flops / of.median / 1e9) if cell.flops else None,
        "copy_gbs": number(copy_speed / 1e9), "traffic_bytes": traffic or None, "floor_us": number(1e6 * floor),
        "share": number(floor / of.median), "baseline": cell.baseline,
        "ratio": ratio[0], "ratio_min": ratio[1], "ratio_max": ratio[2],
        "verified": timing.verified, "error": number(timing.error), "calls": timing.calls * cell.inside,
        "rounds": sum(not math.isnan(s) for s in timing.seconds),
    }  # fmt: skip


def graph_of(work: Callable[[], Any], inside: int) -> tuple[torch.cuda.CUDAGraph, Any]:
    """So many jobs, one after the other, as a CUDA graph; and the result of the last one."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            made = work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(inside):
            made = work()
    return graph, made
