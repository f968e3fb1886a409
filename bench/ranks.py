"""Rank processes for the bench: started once, one OpenMP thread each, pinned, with a barrier of their own.

The barrier spins on shared memory because a gloo barrier lets its ranks go up to 0.1 ms apart.
"""

from __future__ import annotations

import ctypes
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from bench import placement
from bench.study.links import Host
from tpkernels.testing.spawn import fork_server

MOST_VALUES = 64  # that a rank can gather in one go
DEADLINE_S = 300.0
SPINS = 2000
ALL_TASKS = Path("/sys/fs/cgroup/cpuacct/cpuacct.usage")  # nanoseconds that all tasks of the machine have run
OWN_DELAY = Path("/proc/thread-self/schedstat")  # second number: nanoseconds that this thread waited for a core


def cores() -> list[int]:
    """The cores that this process may use."""
    return sorted(os.sched_getaffinity(0))


def cores_of(host: Host, hosts: Sequence[Host]) -> list[int]:
    """A host's share of the cores, or all of them where there are fewer than hosts."""
    all_cores, names = cores(), list(dict.fromkeys(hosts))
    number = names.index(host)
    bounds = [i * len(all_cores) // len(names) for i in (number, number + 1)]
    return all_cores[slice(*bounds)] or all_cores


class RankTeam:
    """A rank's view of the shared page: barrier flags, ping-pong flags, gathered values."""

    def __init__(self, rank: int, world_size: int, page: Any, crowded: bool) -> None:
        self.rank, self.world_size = rank, world_size
        self.crowded = crowded  # more ranks than cores: a rank that spins takes the core of another
        self._spins = 1 if crowded else SPINS
        ints = memoryview(page).cast("B").cast("q")
        step = placement.STRIDE
        self._flags = ints[: world_size * step]
        self._trip = ints[world_size * step : (world_size + 3) * step]
        self._values = ints[(world_size + 3) * step :].cast("B").cast("d")
        self._epoch = self._trips = 0

    @staticmethod
    def page_len(world_size: int) -> int:
        """How many int64s the shared page needs."""
        return (world_size + 3) * placement.STRIDE + world_size * MOST_VALUES

    def barrier(self) -> None:
        self._epoch += 1
        epoch, flags, step = self._epoch, self._flags, placement.STRIDE
        flags[self.rank * step] = epoch
        for other in range(self.world_size):
            self._wait(flags, other * step, epoch)

    def _wait(self, flags: memoryview, index: int, epoch: int) -> None:
        for _ in range(self._spins):
            if flags[index] >= epoch:
                return
        deadline = time.monotonic() + DEADLINE_S
        while flags[index] < epoch:
            os.sched_yield()
            if time.monotonic() > deadline:
                raise TimeoutError(f"bench barrier {epoch}: a rank did not arrive within {DEADLINE_S:.0f} s")

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        if len(values) > MOST_VALUES:
            raise ValueError(f"gather: at most {MOST_VALUES} values, got {len(values)}")
        start = self.rank * MOST_VALUES
        self.barrier()  # everybody has read the values of the time before
        for i, value in enumerate(values):
            self._values[start + i] = value
        self.barrier()
        return [[self._values[r * MOST_VALUES + i] for i in range(len(values))] for r in range(self.world_size)]

    def lost_s(self) -> float:
        ours = sum(spent for (spent,) in self.gather([time.process_time()]))
        try:
            return (int(ALL_TASKS.read_text()) / 1e9 - ours) / len(cores())
        except OSError:  # cgroups of version 2 count whole ticks, which is too coarse for a block
            return 0.0 if self.crowded else float(OWN_DELAY.read_text().split()[1]) / 1e9

    def flag_rtt_ns(self) -> float:
        """Nanoseconds that a flag needs from rank 0 to rank 1 and back; the same answer on all ranks.

        nan where ranks share cores: that measures the scheduler.
        """
        step, found = placement.STRIDE, 0.0
        if self.crowded or self.world_size < 2:
            return math.nan
        self.barrier()
        if self.rank < 2:
            mine, other = (self._trip[(r % 2) * step :] for r in (self.rank, self.rank + 1))
            found = placement.round_trip(mine, other, self.rank == 0, self._trips)
        if self.rank == 0:
            found = max(0.0, found - placement.python_share(self._trip[2 * step :]))
        self._trips += placement.TRIPS
        return self.gather([found])[0][0]


def _rank_main(rank: int, world_size: int, body: Callable[..., None], spec: Any, pin: bool, hosts: Sequence[Host],
               folder: str, page: Any, queue: Any) -> None:  # fmt: skip
    torch.set_num_threads(1)
    if hosts:
        hosts[rank].enter()  # before gloo opens connections
    crowded = world_size > len(cores())
    if hosts:  # otherwise ranks of one host would count on the cores of the other, and spin
        os.sched_setaffinity(0, cores_of(hosts[rank], hosts))
    mine = cores()
    if pin:
        os.sched_setaffinity(0, {mine[rank % len(mine)]})  # before gloo starts its threads, which inherit it
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    try:
        body(RankTeam(rank, world_size, page, crowded=crowded), spec, queue.put)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def launch(
    world_size: int, body: Callable[..., None], spec: Any, *, pin: bool, hosts: Sequence[Host] = ()
) -> Iterator[Any]:
    """Run body(team, spec, send) on every rank; yield the messages of the ranks as they arrive.

    Args:
        hosts: where each rank runs; none: all on this machine.

    Raises:
        torch.multiprocessing.ProcessRaisedException, ProcessExitedException: a rank failed; the others are ended.
    """
    context = fork_server()
    page, queue = context.RawArray(ctypes.c_int64, RankTeam.page_len(world_size)), context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        args = (world_size, body, spec, pin, hosts, folder, page, queue)
        ranks = start_processes(_rank_main, args, nprocs=world_size, join=False, start_method="forkserver")  # type: ignore[no-untyped-call]
        running = True
        while running:
            running = not ranks.join(timeout=0.2)
            while not queue.empty():
                yield queue.get()
