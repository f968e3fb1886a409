"""What tests of tensor-parallel code need: rank processes, cases with references, faults on purpose."""

from __future__ import annotations

from .spawn import Outcome, RankError, run_ranks, run_ranks_outcomes

__all__ = ["Outcome", "RankError", "run_ranks", "run_ranks_outcomes"]
