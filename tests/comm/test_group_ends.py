"""What is left of a group when it is closed, its process group is destroyed, or its process forks."""

from __future__ import annotations

import atexit
import os
import resource
import select
import signal
import threading
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

import tpkernels as tpk
from tests import ARENA_BYTES, USUAL_ARENA_BYTES
from tests.harness.ops import raised
from tpkernels import ops
from tpkernels._native import _C
from tpkernels.comm.group import Group, _close_all
from tpkernels.errors import PeerLostError
from tpkernels.testing import run_ranks
from tpkernels.testing.faults import come_late


def in_a_child(do: Callable[[], object], at_exit: Callable[[], None] = atexit._run_exitfuncs) -> int:
    """The exit code of a forked child that calls `do` and the functions that Python calls at its end."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            do()
            at_exit()
            code = 0
        finally:
            os._exit(code)
    end = os.pidfd_open(pid)
    ended, _, _ = select.select([end], [], [], 20.0)
    os.close(end)
    if not ended:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status) if ended else -999


def forked(f: Callable[[], object]) -> None:
    assert "this process was forked after the group was opened" in raised(f, ValueError)


def check_a_child(transport: str) -> None:
    group = Group.open(transport=transport)
    R = group.world_size
    xs = [group.empty(1000).fill_(1.0) if transport == "shm" else torch.ones(1000) for _ in range(3)]

    def use() -> None:
        forked(lambda: ops.all_reduce(torch.ones(3), group=group))
        forked(lambda: ops.all_reduce(torch.ones(3)[::2], group=group))
        forked(lambda: ops.all_gather(torch.ones(3), group=group))
        forked(lambda: ops.all_reduce_(xs[0], group=group))
        forked(group.barrier)
        forked(lambda: group.all_gather_ints(1))
        forked(lambda: group.empty(1000))
        forked(group.stats)
        forked(group.reset_stats)
        forked(group.check)
        assert "forked from the one that made the process group" in raised(Group.open, RuntimeError)
        assert "forked from" in raised(lambda: ops.all_reduce(torch.ones(1)), RuntimeError)
        xs.clear()  # frees nothing of the parent's
        group.close()

    assert in_a_child(use) == 0
    if transport == "shm":
        xs.append(group.empty(1000).fill_(5.0))
        assert len({x.data_ptr() for x in xs}) == 4
    for x in xs[:3]:
        assert torch.equal(ops.all_reduce_(x, group=group), torch.full((1000,), float(R)))
    assert group.stats()["calls"] == 3

    # A child of a rank whose other thread waits in a collective, and holds the group's lock.
    store = dist.distributed_c10d._get_default_store()
    if group.rank == 0:
        thread = threading.Thread(target=lambda: ops.all_reduce(torch.ones(9), group=group))
        thread.start()
        come_late(0.3)  # it is inside by then; if it is not, the child has it easier
        assert in_a_child(lambda: forked(group.stats)) == 0
        store.set(f"child ended {transport}", "")
        thread.join()
    else:
        store.wait([f"child ended {transport}"])
        ops.all_reduce(torch.ones(9), group=group)
    assert ops.all_reduce(torch.ones(9), group=group).tolist() == [R] * 9
    group.close()


@pytest.mark.parametrize("transport", ["shm", "group"])
def test_a_forked_child_is_refused_and_leaves_the_group_alone(transport: str) -> None:
    run_ranks(check_a_child, 2, transport, fresh=True)


def check_a_child_without_ranks() -> None:
    assert ops.all_reduce(torch.ones(2)).tolist() == [1.0, 1.0]  # a group of one
    assert in_a_child(lambda: ops.all_reduce(torch.ones(2)), _close_all) == 0  # and one of the child's own
    assert ops.all_reduce(torch.ones(2)).tolist() == [1.0, 1.0]


def test_a_child_of_a_process_without_ranks_has_its_own_group_of_one() -> None:
    check_a_child_without_ranks()


# --- the process group is destroyed


def check_a_new_default() -> None:
    R, rank = dist.get_world_size(), dist.get_rank()
    layer, half = tpk.layers.ColumnParallelLinear(4, 8, group=None), dist.new_group(list(range(R)))
    group, mine = Group.open(half), Group.open()
    assert ops.all_reduce(torch.ones(1)).item() == R
    assert ops.all_reduce(torch.ones(1), group=group).item() == R
    dist.barrier()
    dist.destroy_process_group(half)
    gone = "the process group that it was opened over was destroyed"
    assert gone in raised(lambda: ops.all_reduce(torch.ones(1), group=group), PeerLostError)
    assert "was destroyed" in raised(lambda: Group.open(half), ValueError)
    assert ops.all_reduce(torch.ones(1), group=mine).item() == R
    x = torch.ones(1, 4, requires_grad=True)
    y = layer(x)
    dist.barrier()
    dist.destroy_process_group()
    assert "process group was destroyed" in raised(lambda: layer(torch.ones(1, 4)), PeerLostError)
    assert gone in raised(mine.barrier, PeerLostError)
    assert "its process group was destroyed" in raised(lambda: y.sum().backward(), PeerLostError)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert ops.all_reduce(torch.ones(1)).item() == 1
    assert tpk.layers.ColumnParallelLinear(4, 8)(torch.ones(1, 4)).shape == (1, 8)
    assert "process group was destroyed" in raised(lambda: layer(torch.ones(1, 4)), PeerLostError), rank
    dist.destroy_process_group()
    assert ops.all_reduce(torch.ones(1)).item() == 1


def test_a_group_ends_with_its_process_group_and_none_means_the_new_one() -> None:
    run_ranks(check_a_new_default, 2, fresh=True)


# --- memory


def mapped() -> int:
    """Bytes of shared memory that this process has mapped."""
    total = 0
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:
        for line in file:
            if "/dev/shm/" in line:
                first, last = line.split()[0].split("-")
                total += int(last, 16) - int(first, 16)
    return total


def check_memory_goes_with_close() -> None:
    before = mapped()
    group = Group.open()
    layer = tpk.layers.RowParallelLinear(4, 4, group=group)
    assert mapped() - before == group.world_size * ARENA_BYTES
    assert USUAL_ARENA_BYTES == 16 << 20
    x = group.empty(1000).fill_(3.0)
    dist.barrier()
    group.close()
    assert mapped() > before, "a tensor lies there"
    assert x.add_(1).tolist() == [4.0] * 1000
    assert "closed" in raised(lambda: group.empty(3), PeerLostError)
    del x
    assert mapped() == before
    assert "closed" in raised(lambda: layer(torch.ones(1, 2)), PeerLostError)


def test_close_gives_the_memory_back_while_layers_keep_the_group() -> None:
    run_ranks(check_memory_goes_with_close, 2)


def check_close_beside_calls() -> None:
    """Other threads are in calls, and make tensors, when the group closes."""
    for _ in range(10):
        group, errors = Group.open(arena_bytes=1 << 20), []

        def calls(group: Group = group, errors: list[str] = errors) -> None:
            try:
                while True:
                    ops.all_reduce_(group.empty(9000).fill_(1.0), group=group)
            except PeerLostError as error:
                errors.append(str(error))

        thread = threading.Thread(target=calls)
        thread.start()
        come_late(0.02)
        group.close()
        thread.join()
        assert len(errors) == 1


def test_close_waits_for_calls_of_other_threads() -> None:
    run_ranks(check_close_beside_calls, 2)


# --- a rank that has ended and that nobody has reaped, where there is no pidfd


def test_a_zombie_is_noticed_without_a_pidfd() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # it has ended, and stays
    fd = os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR, 0o600)
    os.posix_fallocate(fd, 0, 2 << 18)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = [fd]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1, limits[1]))
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                taken.append(os.eventfd(0))
        comm = _C.open_shm("zombie/1", "zombie", 0, 2, 60.0, fd, 1 << 18, [os.getpid(), pid], 2)  # opens no pidfd
    finally:
        for one in taken:
            os.close(one)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    start = time.monotonic()
    with pytest.raises(PeerLostError, match="rank 1 died"):
        comm.barrier()
    assert time.monotonic() - start < 30.0
    comm.close()
    os.waitpid(pid, 0)
