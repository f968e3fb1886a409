"""For tests of tensor-parallel code: rank processes, cases with references, planted faults."""

from __future__ import annotations

from .spawn import Outcome, RankError, run_ranks, run_ranks_outcomes

__all__ = ["Outcome", "RankError", "run_ranks", "run_ranks_outcomes"]
