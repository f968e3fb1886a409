"""How a group opens when ranks are absent, elsewhere or different, and when the machine lacks something."""

from __future__ import annotations

import errno
import logging
import math
import os
import re
import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tests import USUAL_ARENA_BYTES
from tests.harness.ops import raised
from tpkernels import ops
from tpkernels.comm import bootstrap, host, process_groups
from tpkernels.comm.group import Group
from tpkernels.comm.open import ARENA_BYTES
from tpkernels.errors import PeerLostError
from tpkernels.testing import run_ranks, run_ranks_outcomes
from tpkernels.testing.faults import kill_myself


def check_it_works(group: Group) -> None:
    R = group.world_size
    for n in (3, 50_000):
        y = ops.all_reduce(torch.full((n,), group.rank + 1.0), group=group)
        assert torch.equal(y, torch.full((n,), R * (R + 1) / 2)), n


def store() -> dist.Store:
    found: dist.Store = dist.distributed_c10d._get_default_store()
    return found


# --- absent, elsewhere, dead


def check_an_absent_rank_is_named() -> str:
    """The last rank comes when the others have given up; afterwards all of them open the group."""
    R, rank = dist.get_world_size(), dist.get_rank()
    text = ""
    if rank < R - 1:
        text = raised(lambda: Group.open(timeout_s=1.5), TimeoutError)
        store().set(f"gave up {rank}", "")
    else:
        store().wait([f"gave up {r}" for r in range(R - 1)])
    with Group.open(timeout_s=30.0) as group:
        check_it_works(group)
    return text


def test_a_rank_that_does_not_come_is_named_in_time_and_disturbs_no_later_open() -> None:
    start = time.monotonic()
    *texts, _ = run_ranks(check_an_absent_rank_is_named, 3, fresh=True)
    assert time.monotonic() - start < 60.0, "not the process group's time-out"
    for text in texts:
        assert re.search(r"Group.open\('world'\): rank 2 did not come within 1.5 s, ranks \[0, 1\] did", text), text


class Silent:
    """A store behind a cut link."""

    def __getattr__(self, name: str) -> Callable[..., object]:
        return lambda *args: threading.Event().wait()


def check_a_silent_store() -> str:
    with mock.patch.object(
        bootstrap, "store_of", lambda pg: Silent() if pg.rank() == 1 else process_groups.store_of(pg)
    ):
        return raised(lambda: Group.open(timeout_s=1.0), TimeoutError)


def test_a_store_that_never_answers_is_waited_for_no_longer_than_ranks() -> None:
    at_the_store, behind = run_ranks(check_a_silent_store, 2, fresh=True)
    assert "rank 1 did not come within 1 s" in at_the_store
    assert behind.startswith(
        "Group.open('world'), rank 1 of 2: the store of the process group did not answer within 1 s: the rank that "
        "keeps it (rank 0 as a rule) is stopped, or the link to its host is cut"
    )


def check_another_order() -> tuple[str, str]:
    rank, both = dist.get_rank(), [dist.new_group([0, 1], group_desc=name) for name in ("left", "right")]
    first = both[rank]
    text = raised(lambda: Group.open(first, timeout_s=2.0), TimeoutError)
    store().set(f"seen {rank}", "")
    store().wait(["seen 0", "seen 1"])
    for process_group in both:  # and now in one order, although each rank has been at only one of them
        with Group.open(process_group, timeout_s=30.0) as group:
            check_it_works(group)
    return first.group_desc, text


def test_ranks_that_open_groups_in_another_order_learn_where_the_other_is() -> None:
    (first, text), (second, other) = run_ranks(check_another_order, 2, fresh=True)
    assert (first, second) == ("left", "right")
    assert "rank 1 did not come" in text
    assert "rank 1 was seen opening 'right'" in text
    assert "rank 0 did not come" in other
    assert "rank 0 was seen opening 'left'" in other


def die_in_the_middle(rank: int, step: int) -> tuple[str, float]:
    """The last rank dies right before it says something for the step-th time."""
    gather, calls = bootstrap.Bootstrap.gather, []

    def planted(self: bootstrap.Bootstrap, *args: object, **options: object) -> object:
        calls.append(1)
        if dist.get_rank() == rank and len(calls) == step:
            kill_myself()
        return gather(self, *args, **options)  # type: ignore[arg-type]

    with mock.patch.object(bootstrap.Bootstrap, "gather", planted):
        start = time.monotonic()
        return raised(lambda: Group.open(timeout_s=60.0), PeerLostError), time.monotonic() - start


def test_a_rank_that_dies_while_the_group_opens_is_named_at_once() -> None:
    for outcome in run_ranks_outcomes(die_in_the_middle, 3, 2, 2, timeout=90.0)[:2]:
        assert outcome.finished, outcome.error
        text, took = outcome.value
        assert "rank 2 died while the group was opened" in text
        assert took < 30.0


# --- different


def check_builds_are_compared() -> None:
    rank, here = dist.get_rank(), bootstrap.Build.here()
    for change in (
        {"tpkernels": "0.0.1"},
        {"commit": "abc"},
        {"limits": here.limits | {"arena_layout": here.limits["arena_layout"] + 1}},
    ):
        other = replace(here, **change) if rank == 1 else here  # type: ignore[arg-type]
        with mock.patch.object(bootstrap.Build, "here", lambda other=other: other):
            text = raised(Group.open, RuntimeError)
        assert "the ranks run different builds of tpkernels: rank 0 has" in text
        assert "rank 1 has" in text
        assert str(replace(here, **change)) in text  # type: ignore[arg-type]
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("tpkernels").addHandler(handler)
    other = replace(here, torch="2.0.0") if rank == 1 else here
    with mock.patch.object(bootstrap.Build, "here", lambda: other), Group.open() as group:
        check_it_works(group)
    logging.getLogger("tpkernels").removeHandler(handler)
    assert bool(lines) == (rank == 0)
    assert all("rank 1 2.0.0" in line for line in lines), lines


def check_everything_that_needs_two_ranks() -> None:
    check_builds_are_compared()
    check_any_time_will_do()
    check_without_shared_memory()
    check_a_smaller_arena()
    check_too_few_files()


def test_builds_deadlines_shared_memory_and_files() -> None:
    run_ranks(check_everything_that_needs_two_ranks, 2)


# --- deadlines


def check_any_time_will_do() -> None:
    rank = dist.get_rank()
    for n, timeout_s in enumerate((math.inf, 1e30, 10**400 // 10**395)):
        for transport in ("shm", "group"):
            with Group.open(timeout_s=timeout_s, transport=transport) as group:
                assert group.timeout_s == timeout_s
                if rank and not n:
                    time.sleep(0.5)  # the subject: a rank later than the 0.2 s after which the others check on it
                check_it_works(group)
    with mock.patch.dict(os.environ, GLOO_DEVICE_TRANSPORT="TCP_TLS"):
        group = Group.open(timeout_s=math.inf, transport="group")
    with group:
        assert "through the process group" in group.explain().reason
        check_it_works(group)


@pytest.mark.parametrize("timeout_s", [0, -1.0, math.nan, -math.inf])
def test_a_deadline_that_is_none_is_refused(timeout_s: float) -> None:
    with pytest.raises(ValueError, match="timeout_s must be positive"):
        Group.open(timeout_s=timeout_s)
    with pytest.raises(TypeError, match="timeout_s must be a number of seconds, got str"):
        Group.open(timeout_s="3")  # type: ignore[arg-type]


# --- shared memory


def check_without_shared_memory() -> None:
    with mock.patch.object(host, "_SHM_FOLDER", "/proc/nosuch"):
        with Group.open() as group:
            assert group.transport == "group"
            reason = group.explain().reason
            assert reason.startswith("over connections between the ranks, because cannot create shared memory"), reason
            check_it_works(group)
        for options in ({"transport": "shm"}, {"arena_bytes": 1 << 20}):
            text = raised(lambda options=options: Group.open(**options), OSError)
            assert "cannot create shared memory in /proc/nosuch: No such file or directory" in text
            assert "mount -t tmpfs" in text


@contextmanager
def room_for(most: int) -> Iterator[None]:
    """/dev/shm has room for so many bytes."""
    real = os.posix_fallocate

    def planted(fd: int, offset: int, size: int) -> None:
        if size > most:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd, offset, size)

    with mock.patch("os.posix_fallocate", planted):
        yield


def check_a_smaller_arena() -> None:
    R = dist.get_world_size()
    usual = mock.patch.dict(ARENA_BYTES, cpu=USUAL_ARENA_BYTES)
    with usual, room_for(R * (5 << 20)), Group.open() as group:
        assert group.transport == "shm"
        assert f"in arenas of {4 << 20} bytes because the arenas of {R} ranks need" in group.explain().reason
        check_it_works(group)
        x = group.empty(1000).fill_(1.0)
        assert torch.equal(ops.all_reduce_(x, group=group), torch.full((1000,), float(R)))
    with room_for(1 << 19):
        with Group.open() as group:
            assert group.transport == "group"
            check_it_works(group)
        assert "bytes free" in raised(lambda: Group.open(transport="shm"), OSError)


# --- file descriptors


@contextmanager
def few_files(free: int) -> Iterator[None]:
    """This process may open so many more files."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(map(int, os.listdir("/proc/self/fd"))) + 20
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, limits[1]))
    taken = []
    try:
        while True:
            taken.append(os.eventfd(0))
    except OSError:
        pass
    for fd in taken[len(taken) - free :]:
        os.close(fd)
    try:
        yield
    finally:
        for fd in taken[: len(taken) - free]:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def check_too_few_files() -> None:
    """Two are free on the last rank: enough for the store, not for connections."""
    rank, start = dist.get_rank(), time.monotonic()
    with few_files(2) if rank == 1 else few_files(50):
        group = Group.open(transport="group")
    assert time.monotonic() - start < 8.0, "nobody waits for a connection that cannot come"
    reason = group.explain().reason
    assert "rank 1 has no connections: it cannot listen" in reason, reason
    assert "Too many open files: connections of 2 ranks need 3 more" in reason, reason
    with group:
        check_it_works(group)
