"""How well rows of one model can be ranked at all: they scatter around what a model of time can tell apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.planner.fit import Iteration, rank_correlation

LEAST = 8  # tp of the rows that scatter least, which say how the time depends on the micro-batch
DRAWS = 1000


@dataclass(frozen=True)
class Scatter:
    """How rows scatter, and what that does to their ranks.

    Attributes:
        of_least, of_others: standard deviations of the logarithms of rows of tp 8, and of the others.
        fitted: rank correlation of the rows with what was fitted on them.
        expected, low, high: the mean, 5 % and 95 % of it where that is the truth and rows scatter around it.
    """

    of_least: float
    of_others: float
    fitted: float
    expected: float
    low: float
    high: float


def scatter(rows: Sequence[Iteration]) -> Scatter:
    """Fit ms n / (n + pp - 1), n micro-batches, by a factor for each (tp, pp) and one for each micro-batch."""
    size = [{key: int(row.values[key]) for key in ("global_batch", "dp", "micro_batch", "tp", "pp")} for row in rows]
    n = np.array([s["global_batch"] / s["dp"] / s["micro_batch"] for s in size])
    slots = (n + np.array([s["pp"] for s in size]) - 1) / n
    cuts = sorted({(s["tp"], s["pp"]) for s in size})
    sizes = sorted({s["micro_batch"] for s in size})[1:]
    factors = np.array(
        [[(s["tp"], s["pp"]) == cut for cut in cuts] + [s["micro_batch"] == m for m in sizes] for s in size], float
    )
    least = np.array([s["tp"] == LEAST for s in size])
    weight = np.where(least, 1.0, 0.05)
    work = np.log([row.ms for row in rows]) - np.log(slots)
    found, *_ = np.linalg.lstsq(factors * weight[:, None], work * weight)
    errors = work - factors @ found
    free = (sum(tp == LEAST for tp, _ in cuts) + len(sizes), sum(tp != LEAST for tp, _ in cuts))
    own, others = (
        float(np.sqrt((errors[those] ** 2).sum() / (those.sum() - k)))
        for those, k in zip((least, ~least), free, strict=True)
    )
    true = np.exp(factors @ found) * slots
    random, rank = np.random.default_rng(0), np.argsort(np.argsort(true))
    drawn = true * np.exp(random.normal(size=(DRAWS, len(rows))) * np.where(least, own, others))
    ranked = [float(np.corrcoef(rank, np.argsort(np.argsort(ms)))[0, 1]) for ms in drawn]
    low, high = np.quantile(ranked, (0.05, 0.95))
    return Scatter(own, others, rank_correlation(rows, true), float(np.mean(ranked)), float(low), float(high))
