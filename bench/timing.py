"""The protocol: how candidates are timed against each other so that a ratio can be believed.

1. All candidates run in the same rank processes. A round runs every candidate once, as a block of calls that lasts
   about `block_s`; the order is reversed in every other round, so that no candidate always follows the same one.
2. Before each block there is a barrier. A block's time is that of the slowest rank.
3. How many calls a block has is measured beforehand and agreed over the ranks: all of them make the same number.
4. The input of every call is rewritten by its own rank first, as the GEMM in front of a collective would, because
   repeating on one untouched buffer flatters zero-copy. A block of rewrites alone follows each block and is subtracted.
5. A ratio is taken inside a round and only then summarised: rounds differ (clocks, placement of virtual cores) by more
   than candidates do. For the same reason the median is what counts; minimum and maximum say how far to trust it.
6. A candidate whose result is wrong is not timed.
7. A block during which something else had the cores is repeated. Programs that sleep (gloo) suffer from company ten
   times more than programs that spin, so that it would flatter the latter.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

MOST_CALLS = 20_000  # of one block
CALIBRATIONS = 3  # the shortest counts
TRIES = 10  # to have a block to ourselves


class Team(Protocol):
    """The ranks that measure together."""

    rank: int
    world_size: int

    def barrier(self) -> None:
        """Return when every rank has arrived, on all of them within microseconds."""

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """Every rank's values, in rank order, the same on all ranks."""

    def lost_s(self) -> float:
        """Seconds so far that something else had the cores (on average over them); differences mean something."""


def nothing() -> None:
    """The rewrite of a candidate that has no input to rewrite."""


@dataclass(frozen=True)
class Candidate:
    """One way to do a job."""

    name: str
    call: Callable[[], Any]
    error: Callable[[Any], float]  # error over tolerance: more than 1 is wrong
    load: Callable[[], object] = nothing  # puts the real input in place, for the check
    refresh: Callable[[], object] = nothing  # rewrites the input the cheapest way, before each timed call
    label: dict[str, str | None] = field(default_factory=dict)  # codec, path, transport: fields of its row


@dataclass
class Timing:
    """What came out for one candidate: one time for each round, nan where there was none to be had."""

    name: str
    error: float
    calls: int = 0
    seconds: list[float] = field(default_factory=list)
    repeated: int = 0  # blocks that were disturbed

    @property
    def verified(self) -> bool:
        return self.error <= 1.0


def slowest(team: Team, value: float) -> float:
    """The largest value over the ranks; nan if any is nan."""
    values = [v for (v,) in team.gather([value])]
    return math.nan if any(math.isnan(v) for v in values) else max(values)


def verify(candidate: Candidate, team: Team) -> float:
    """Run once on the real input; the worst error over the ranks. nan counts as infinitely wrong."""
    candidate.load()
    error = slowest(team, candidate.error(candidate.call()))
    return math.inf if math.isnan(error) else error


def block(work: Callable[[], object], before: Callable[[], object], calls: int, clock: Callable[[], float]) -> float:
    """Seconds for so many (rewrite, call) pairs on this rank."""
    start = clock()
    for _ in range(calls):
        before()
        work()
    return clock() - start


def agree_on_calls(candidate: Candidate, team: Team, block_s: float, clock: Callable[[], float]) -> int:
    """How many calls fill a block; the same number on every rank."""
    calls = 1
    while True:
        took = math.inf
        for _ in range(CALIBRATIONS):
            team.barrier()
            took = min(took, slowest(team, block(candidate.call, candidate.refresh, calls, clock)))
        wanted = round(calls * block_s / max(took, 1e-9))
        if took >= block_s / 8 or calls >= MOST_CALLS:
            return max(1, min(MOST_CALLS, wanted))
        calls = min(MOST_CALLS, calls * 8)


def once(candidate: Candidate, team: Team, calls: int, clock: Callable[[], float]) -> tuple[float, float]:
    """Seconds of one call (slowest rank, rewrite subtracted), and the part of the time that others had the cores.

    nan seconds if the rewrite alone seemed to take longer.
    """
    lost = team.lost_s()
    team.barrier()
    with_call = block(candidate.call, candidate.refresh, calls, clock)
    rewrite = 0.0
    if candidate.refresh is not nothing:
        team.barrier()
        rewrite = block(nothing, candidate.refresh, calls, clock)
    missing = slowest(team, (team.lost_s() - lost) / (with_call + rewrite))
    took = slowest(team, (with_call - rewrite) / calls)
    return (took if took > 0 else math.nan), missing


def undisturbed(
    candidate: Candidate, timing: Timing, team: Team, most_lost: float, clock: Callable[[], float]
) -> float:
    """Seconds of one call, from a block that had its cores and was longer than its rewriting; nan if none of TRIES."""
    for _ in range(TRIES):
        took, missing = once(candidate, team, timing.calls, clock)
        if missing <= most_lost and not math.isnan(took):
            return took
        timing.repeated += 1
    return math.nan


def measure(
    candidates: Sequence[Candidate],
    team: Team,
    *,
    rounds: int,
    block_s: float = 0.02,
    most_lost: float = 0.05,
    clock: Callable[[], float] = time.perf_counter,
    each_round: Callable[[], None] = nothing,
) -> list[Timing]:
    """Check all candidates, time those that are right in interleaved rounds, and check them again at the end.

    Args:
        most_lost: the part of a block's time that others may have had the cores; beyond, it is repeated.
        each_round: called between rounds (to probe the placement of the cores).
    """
    timings = [Timing(c.name, verify(c, team)) for c in candidates]
    running = [(c, t) for c, t in zip(candidates, timings, strict=True) if t.verified]
    for candidate, timing in running:
        timing.calls = agree_on_calls(candidate, team, block_s, clock)
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            each_round()
            for candidate, timing in running if turn % 2 == 0 else reversed(running):
                timing.seconds.append(undisturbed(candidate, timing, team, most_lost, clock))
    finally:
        gc.enable()
    for candidate, timing in running:
        timing.error = max(timing.error, verify(candidate, team))
    return timings


@dataclass(frozen=True)
class Summary:
    """Median, 90th percentile, extremes; nan all through when there was nothing to summarise."""

    median: float
    p90: float
    least: float
    most: float


def summary(values: Sequence[float]) -> Summary:
    """Of the values that are numbers. The 90th percentile is the nearest value at or above (no interpolation)."""
    known = sorted(v for v in values if not math.isnan(v))
    if not known:
        return Summary(math.nan, math.nan, math.nan, math.nan)
    middle = len(known) // 2
    median = known[middle] if len(known) % 2 else (known[middle - 1] + known[middle]) / 2
    return Summary(median, known[math.ceil(0.9 * len(known)) - 1], known[0], known[-1])


def ratios(baseline: Timing, timing: Timing) -> list[float]:
    """How many times faster than the baseline, round by round."""
    return [b / t for b, t in zip(baseline.seconds, timing.seconds, strict=True)]


def exposed(timing: Timing, roofs: Sequence[Timing]) -> list[float]:
    """Seconds beyond the fastest roof (the GEMM alone), round by round."""
    by_round = zip(*(roof.seconds for roof in roofs), strict=True)
    best = [min(times, key=lambda t: math.inf if math.isnan(t) else t) for times in by_round]
    return [t - b for t, b in zip(timing.seconds, best, strict=True)]
