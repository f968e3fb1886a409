"""Where the host has put our cores: a virtual machine's cores move, and the price of a cache line with them.

A flag goes from rank 0 to rank 1 and back through shared memory. With both cores behind one cache that takes about
100 ns ("near"), otherwise 500 ns and more ("far"); reading what the other core wrote differs as much. Numbers of the
two kinds must not be mixed, so each round is marked. Flags are polled from Python, whose own share is measured on the
spot and subtracted: the result is within some tens of nanoseconds of that of a C loop.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from itertools import pairwise

NEAR_BELOW_NS = 250.0
STRIDE = 16  # int64s: two cache lines, because lines are fetched in pairs
TRIPS = 101


def round_trip(mine: memoryview, other: memoryview, leads: bool, base: int) -> float:
    """Median nanoseconds of TRIPS round trips, polling included.

    Args:
        mine, other: one int64 each, in shared memory, on lines of their own.
        base: larger than anything that either flag has held.
    """
    clock, times = time.perf_counter_ns, []
    for flag in range(base + 1, base + TRIPS + 1):
        start = clock()
        if leads:
            mine[0] = flag
        while other[0] < flag:
            pass
        if not leads:
            mine[0] = flag
        times.append(clock() - start)
    return float(sorted(times)[TRIPS // 2])


def python_share(scratch: memoryview) -> float:
    """Median nanoseconds that the same steps take when both flags are this core's own: two stores, two polls."""
    clock, times = time.perf_counter_ns, []
    for flag in range(TRIPS):
        start = clock()
        scratch[0] = flag
        while scratch[0] < flag:
            pass
        while scratch[0] < flag:
            pass
        scratch[0] = flag
        times.append(clock() - start)
    return float(sorted(times)[TRIPS // 2])


def name_of(flag_rtt_ns: float, crowded: bool) -> str:
    """near or far; without a measurement, crowded where the ranks share cores, else unprobed."""
    if math.isnan(flag_rtt_ns):
        return "crowded" if crowded else "unprobed"
    return "near" if flag_rtt_ns < NEAR_BELOW_NS else "far"


def of_rounds(probes: Sequence[float], crowded: bool = False) -> list[str]:
    """A name for each round from the probes around it (one more than rounds); mixed if it changed inside."""
    names = [name_of(p, crowded) for p in probes]
    return [before if before == after else "mixed" for before, after in pairwise(names)]


def of_run(rounds: Sequence[str]) -> str:
    """The name that fits nine rounds of ten, or mixed."""
    for name in ("near", "far", "crowded", "unprobed"):
        if rounds and sum(r == name for r in rounds) >= 0.9 * len(rounds):
            return name
    return "mixed"
