"""Starts the ranks of a command on this machine, unless torchrun has started them already."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tpkernels.comm.group import Group
from tpkernels.comm.layout import Layout, enough_memory, open_layout


def under_torchrun() -> bool:
    """Whether this process is one of several ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def world_size() -> int:
    """How many ranks torchrun started; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if under_torchrun() else 1


def launch(ranks: int, arguments: Sequence[str], hint: str = "") -> int:
    """Run `python -m tpkernels <arguments>` on so many ranks, as torchrun does; the exit code of the first that failed.

    The ranks write to this terminal and say themselves what went wrong, so torchrun's own report of it is kept quiet.
    """
    logging.disable(logging.CRITICAL)
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
        if first.exitcode < 0:  # a killed rank cannot speak for itself
            name = signal.Signals(-first.exitcode).name
            print(f"tpkernels: rank {rank} was ended by {name}. {hint}".rstrip(), file=sys.stderr)
        return next((f.exitcode for f in failed.failures.values() if f.exitcode > 0), 1)
    except (SignalException, KeyboardInterrupt):
        return 130
    finally:
        logging.disable(logging.NOTSET)
    return 0


def threads(ranks: int) -> int:
    """How many threads each rank of this machine may use so that they do not get in each other's way."""
    return max(1, len(os.sched_getaffinity(0)) // ranks)


@contextmanager
def all_ranks(timeout_s: float, arena_mib: int, *, tp: int, dp: int = 1) -> Iterator[Layout]:
    """The groups of all ranks of this command: dp replicas, each cut over tp ranks.

    Raises:
        UserError: /dev/shm is too small for the ranks' arenas.
    """
    if not under_torchrun():
        with _open(timeout_s, arena_mib) as group:
            yield Layout(group, group)
        return
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    torch.set_num_threads(threads(local))
    # Default arguments of this module take hold of the world's process group where it is imported after this line, and
    # one that is there when Python ends may end the process by a signal (see Group.close).
    importlib.import_module("torch.distributed.nn.functional")
    dist.init_process_group("gloo", timeout=timedelta(minutes=30))
    try:
        with ExitStack() as opened:
            # With several replicas the group of all ranks carries a flag now and then, no tensors.
            group = opened.enter_context(_open(timeout_s, arena_mib if dp == 1 else 1))
            with enough_memory(world_size(), arena_mib + 2):
                layout = opened.enter_context(open_layout(group, tp, dp, arena_bytes=arena_mib << 20))
            try:
                yield layout
            except Exception:
                # torchrun ends all ranks as soon as one is gone; this one is to say first what it met.
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                raise
    finally:
        dist.destroy_process_group()


def _open(timeout_s: float, arena_mib: int) -> Group:
    with enough_memory(world_size(), arena_mib):
        return Group.open(timeout_s=timeout_s, arena_bytes=arena_mib << 20)
