"""Up to which size every rank of a group sums a whole message itself, measured where the ranks share memory.

That takes one wait, and each rank a part of the sum two; the bits are the same. Which is faster depends on how many
ranks share how many cores, because a rank that waits for its core waits twice.
"""

from __future__ import annotations

import math
import time
from typing import Any, NamedTuple

from tpkernels._native import _C

_SIZES = tuple(256 << i for i in range(8))  # bytes, up to the most that may be summed so (kMostOneShotBytes)
_ROUNDS = 7  # at least
_BLOCK_NS = 200_000  # of calls in a round: short, so that some rounds have the cores to themselves
_SAME = 1.05  # two times no further apart are the same
_SECONDS = 0.4  # that all sizes may take
_CLEAR = 0.8  # two waits take so much less time: larger messages need not be tried


class Team(NamedTuple):
    """So many ranks, which share so many cores or have one each."""

    ranks: int
    cores: int

    @classmethod
    def of(cls, communicator: Any, cores: int) -> Team:
        """Return that of a group whose ranks may use so many cores together."""
        return cls(communicator.world_size, min(cores, communicator.world_size))


def parse_one_shot(ranks: int, cores: int, nbytes: int) -> tuple[Team, int]:
    """Read a row of a profile.

    Raises:
        ValueError, TypeError: it is none.
    """
    if not all(type(size) is int for size in (ranks, cores, nbytes)) or not 0 <= nbytes <= _SIZES[-1]:
        raise ValueError(f"profile: expected ranks, cores and at most {_SIZES[-1]} bytes, got {(ranks, cores, nbytes)}")
    return Team(ranks, cores), nbytes


def measure_one_shot(communicator: Any) -> int | None:
    """Time both ways for growing messages; all ranks call this.

    Returns:
        the largest message, in bytes, for one wait (0: none); None where times did not repeat, beside other programs.
        Times of the slowest rank decide, so that all ranks return the same.
    """
    until, gain, best, found = time.monotonic_ns() + int(_SECONDS * 1e9), 0.0, 0.0, 0
    try:
        for size in _SIZES:
            ratio = _two_over_one(communicator, size, until)
            if ratio is None:
                return None
            gain += math.log(ratio)
            if gain > best:
                best, found = gain, size
            if ratio < _CLEAR:
                break
        return found
    finally:
        communicator.set_one_shot(_C.limits()["one_shot_bytes"])


def _two_over_one(communicator: Any, size: int, until: int) -> float | None:
    """Time of two waits over that of one: of each the least, once that has been seen twice."""

    def call_ns(limit: int, calls: int) -> float:
        communicator.set_one_shot(limit)
        communicator.barrier()
        ns: int = max(communicator.exchange(communicator.time_all_reduce(size, calls)))
        return ns / calls

    calls = int(min(max(_BLOCK_NS / call_ns(0, 3), 3), 100))
    two, one = [call_ns(0, calls)], [call_ns(_SIZES[-1], calls)]
    while len(two) < _ROUNDS or not (_repeats(two) and _repeats(one)):
        if max(communicator.exchange(time.monotonic_ns() - until)) > 0:
            return None
        two.append(call_ns(0, calls))
        one.append(call_ns(_SIZES[-1], calls))
    return min(two) / min(one)


def _repeats(times: list[float]) -> bool:
    least, next_to_it = sorted(times)[:2]
    return next_to_it < _SAME * least
