"""The ranks that torchrun started for a command: their number, their threads, their groups."""

from __future__ import annotations

import importlib
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from tpkernels.comm.group import Group
from tpkernels.comm.mesh import Mesh, enough_memory


def is_rank() -> bool:
    """Whether torchrun started this process as one of several ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def world_size() -> int:
    """How many ranks torchrun started; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if is_rank() else 1


def local_size() -> int:
    """How many of them are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def threads(ranks: int) -> int:
    """How many threads each of so many ranks of this machine may use, so that they do not share cores."""
    return max(1, len(os.sched_getaffinity(0)) // ranks)


@contextmanager
def open_ranks(timeout_s: float, arena_mib: int, *, tp: int, dp: int = 1, pp: int = 1) -> Iterator[Mesh]:
    """Open the groups of all ranks of this command: pp stages of dp replicas, sharded over tp ranks. Collective.

    Args:
        timeout_s: the deadline of a call that waits for other ranks.
        arena_mib: shared memory of each rank in the groups that shard a replica.
        tp, dp, pp: their product is the number of ranks.

    Raises:
        UserError: /dev/shm is too small for the ranks' arenas.
        ValueError: torchrun started another number of ranks than tp * dp * pp.
    """
    if not is_rank():
        with _open(timeout_s, arena_mib) as group:
            yield Mesh(group, group)
        return
    torch.set_num_threads(threads(local_size()))
    # Default arguments of this module keep a reference to the world's process group where it is imported after this
    # line, and a process group that is alive when Python exits may end the process by a signal (see Group.close).
    importlib.import_module("torch.distributed.nn.functional")
    dist.init_process_group("gloo", timeout=timedelta(minutes=30))
    try:
        with ExitStack() as opened:
            # With several replicas or stages the group of all ranks carries flags, no tensors.
            group = opened.enter_context(_open(timeout_s, arena_mib if dp == pp == 1 else 1))
            with enough_memory(world_size(), arena_mib + 2):
                layout = opened.enter_context(Mesh.open(tp=tp, dp=dp, pp=pp, world=group, arena_bytes=arena_mib << 20))
            try:
                yield layout
            except Exception:
                # torchrun ends all ranks as soon as one has exited; the error of this one is printed first.
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                raise
    finally:
        dist.destroy_process_group()


def _open(timeout_s: float, arena_mib: int) -> Group:
    with enough_memory(world_size(), arena_mib):
        return Group.open(timeout_s=timeout_s, arena_bytes=arena_mib << 20)
