"""Starts the ranks of a command on this machine."""

from __future__ import annotations

import os
import signal
import sys
import uuid
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tpkernels.comm.torchrun import threads

STOPPED = 130  # the exit code after a signal


def launch(ranks: int, arguments: Sequence[str], hint: str = "") -> int:
    """Run `python -m tpkernels <arguments>` on so many ranks, as torchrun does, and wait for them.

    Args:
        ranks: processes to start.
        arguments: of the command line of each.
        hint: printed after the name of a rank that a signal ended.

    Returns:
        0; the exit code of the first rank that failed; or STOPPED where a signal ended this process.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(threads(ranks)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)("-u", "-m", "tpkernels", *arguments)
    except ChildFailedError as failed:
        rank, first = failed.get_first_failure()
        if first.exitcode < 0:  # a killed rank has printed nothing
            name = signal.Signals(-first.exitcode).name
            print(f"tpkernels: rank {rank} was ended by {name}. {hint}".rstrip(), file=sys.stderr)
        return next((f.exitcode for f in failed.failures.values() if f.exitcode > 0), 1)
    except (SignalException, KeyboardInterrupt):
        return STOPPED
    return 0
