"""Process groups of back end tpk for tests."""

from __future__ import annotations

from datetime import timedelta
from functools import cache

import torch.distributed as dist

from tpkernels import c10d


@cache
def new_group(transport: str = "auto", timeout_s: float = 30.0) -> dist.ProcessGroup:
    """All ranks, over that transport; made once in a process."""
    options = c10d.Options(transport)
    return dist.new_group(backend="tpk", timeout=timedelta(seconds=timeout_s), pg_options=options)
