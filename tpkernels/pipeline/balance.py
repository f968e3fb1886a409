"""Which layers each stage gets: neighbours, so that the largest stage is as small as it can be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate


def balanced(costs: Sequence[float], before: float, after: float, num_stages: int) -> list[int]:
    """The numbers of layers of the stages: the largest cost of a stage is minimal, then the sum of squares.

    Args:
        costs: of each layer.
        before: of what the first stage computes ahead of its layers; after: of the last one behind its own.
        num_stages: each gets one layer or more; at most len(costs).
    """
    sums = [0.0, *accumulate(costs)]
    last = len(costs)

    def cost(stage: int, start: int, stop: int) -> float:
        return sums[stop] - sums[start] + before * (stage == 0) + after * (stage == num_stages - 1)

    def best(limit: float, power: int) -> tuple[float, list[int]]:
        """The least sum (power 2) or maximum (power 0) over the stages, none of which exceeds the limit."""
        found: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
        for stage in range(num_stages):
            left = num_stages - 1 - stage
            reached: dict[int, tuple[float, list[int]]] = {}
            for start, (so_far, sizes) in found.items():
                for stop in [last] if left == 0 else range(start + 1, last - left + 1):
                    value = cost(stage, start, stop)
                    total = max(so_far, value) if power == 0 else so_far + value**power
                    if value <= limit and (stop not in reached or total < reached[stop][0]):
                        reached[stop] = (total, [*sizes, stop - start])
            found = reached
        return found[last]

    largest, _ = best(math.inf, 0)
    return best(largest * (1 + 1e-9), 2)[1]
