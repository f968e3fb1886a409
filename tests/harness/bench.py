"""A clock that moves only when work is done, a team of pretended ranks, and rows made from both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from bench import rows
from bench.cell import Cell
from bench.timing import Candidate, measure, nothing


class Clock:
    """Moves only when work is done."""

    def __init__(self) -> None:
        self.now = 0.0
        self.speed = 1.0
        self.events: list[str] = []

    def __call__(self) -> float:
        return self.now

    def work(self, name: str, seconds: float) -> Callable[[], str]:
        def run() -> str:
            self.now += seconds / self.speed
            self.events.append(name)
            return name

        return run


class Team:
    """One real rank, and others that report whatever a test wants."""

    def __init__(self, others: Callable[[float], list[float]] = lambda value: []) -> None:
        self.rank, self.others = 0, others
        self.world_size = 1 + len(others(0.0))
        self.barriers = 0
        self.lost = 0.0

    def barrier(self) -> None:
        self.barriers += 1

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        columns = [[value, *self.others(value)] for value in values]
        return [[column[rank] for column in columns] for rank in range(self.world_size)]

    def lost_s(self) -> float:
        return self.lost


def right(_: Any) -> float:
    return 0.0


def wrong(_: Any) -> float:
    return 1.5


def candidate(clock: Clock, name: str, seconds: float, rewrite: float = 0.0, error: Any = right) -> Candidate:
    refresh = clock.work(f"rewrite {name}", rewrite) if rewrite else nothing
    return Candidate(name, call=clock.work(name, seconds), error=error, refresh=refresh)


def where(kind: str = "AMD Zen 4, AVX-512") -> rows.Row:
    return {"machine": {"class": kind, "cpu": "C", "cores": 2, "mhz": 2000, "virtual": True}, "torch": "2.13.0",
            "version": "0.1.0", "commit": "abc", "date": "2026-01-02T03:04:05Z", "load": 0.1, "pinned": True,
            "threads": 1, "scheduler": "normal"}  # fmt: skip


def some_rows(
    probes: Sequence[float] = (100.0,) * 6, size: int = 4096, kind: str = "AMD Zen 4, AVX-512", gloo: float = 0.9
) -> list[rows.Row]:
    clock = Clock()
    jobs = [candidate(clock, "gloo", gloo), candidate(clock, "plain", 0.01), candidate(clock, "bad", 0.1, error=wrong)]
    timings = {t.name: t for t in measure(jobs, Team(), rounds=len(probes) - 1, clock=clock)}
    cell = Cell("all_reduce", "fp32", 2, {"bytes": size}, jobs, "gloo", bus_factor=1.0)
    return [rows.row_of(cell, job, timings, probes, where(kind)) for job in jobs]


def gemm_rows(link: str | None = None, codec: str = "none") -> list[rows.Row]:
    clock = Clock()
    names = {"linear_gloo": 0.5, "linear_tpk": 0.45, "tpkernels": 0.41, "gemm_aten": 0.45, "gemm_onednn": 0.4}
    names |= {"one_chunk": 0.44} if link else {}
    jobs = [candidate(clock, name, seconds) for name, seconds in names.items()]
    jobs = [replace(job, label={"codec": codec if job.name in ("tpkernels", "one_chunk") else "none"}) for job in jobs]
    timings = {t.name: t for t in measure(jobs, Team(), rounds=3, clock=clock)}
    cell = Cell("gemm_all_reduce", "fp32", 2, {"M": 16, "N": 4096, "K": 4096, "bytes": 262144}, jobs, "linear_gloo",
                ("gemm_aten", "gemm_onednn"), flops=10**9)  # fmt: skip
    return [rows.row_of(cell, job, timings, [600.0] * 4, {**where(), "link": link}) for job in jobs]
