"""Functions on the ranks of a process group of any back end, and the back ends that tests compare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from tpkernels.testing.spawn import RankError, call_ranks, report

BACKEND = "tpk"
REFERENCE = "gloo"
needs_backend = pytest.mark.skipif(
    not dist.is_backend_available(BACKEND), reason=f"needs tpkernels with the back end {BACKEND!r}"
)


def on_backend(backend: str, fn: Callable[..., Any], ranks: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """fn(*args) on every rank of a team whose default process group has this back end; the values in rank order.

    Raises:
        RankError: a rank raised or died, or the deadline passed; the text shows every rank.
    """
    outcomes = call_ranks(fn, ranks, args, timeout, False, backend)
    if not all(outcome.finished for outcome in outcomes):
        raise RankError(report(fn, outcomes), outcomes)
    return [outcome.value for outcome in outcomes]
