"""Handlers of signals that strike while a rank waits: they run, what they raise comes out, and the group goes on."""

from __future__ import annotations

import os
import signal

import pytest
import torch
import torch.distributed as dist
from pytest import MonkeyPatch

from tpkernels import ops
from tpkernels.comm.group import Group
from tpkernels.testing import run_ranks
from tpkernels.testing.faults import come_late


class Struck(Exception):
    """What a handler raises."""


def strike(*_: object) -> None:
    raise Struck


def check_total(group: Group, n: int) -> None:
    R = group.world_size
    y = ops.all_reduce(torch.full((n,), group.rank + 1.0), group=group)
    assert torch.equal(y, torch.full((n,), R * (R + 1) / 2))


def check_signals(transport: str, connections: bool) -> None:
    with MonkeyPatch.context() as patch:
        if not connections:
            patch.setenv("GLOO_DEVICE_TRANSPORT", "TCP_TLS")
        group = Group.open(transport=transport, timeout_s=30.0)
    assert ("over connections" in group.explain().reason) == (connections and transport == "group")
    rank, before = group.rank, {s: signal.getsignal(s) for s in (signal.SIGALRM, signal.SIGINT)}
    signal.signal(signal.SIGALRM, strike)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        # Ctrl-C and an exception in a long wait.
        for kind, send in ((Struck, signal.SIGALRM), (KeyboardInterrupt, signal.SIGINT)):
            if rank == 0:
                with pytest.raises(kind):
                    pid = os.getpid()
                    child = os.spawnlp(os.P_NOWAIT, "sh", "sh", "-c", f"sleep 0.5; kill -{send.value} {pid}")
                    check_total(group, 100_000)
                os.waitpid(child, 0)
            else:
                come_late(1.2)
                check_total(group, 100_000)
            check_total(group, 9)
        # Many, at any moment of many calls.
        struck = 0
        for i in range(150):
            x, calls, raised = torch.full((20_000,), rank + 1.0), group.stats()["calls"], 0
            try:
                if rank == 0:
                    signal.setitimer(signal.ITIMER_REAL, 0.0003)
                elif i % 2:
                    come_late(0.003)  # a call of 80 KB may end before the signal comes
                ops.all_reduce(x, group=group)
            except Struck:
                raised += 1
            finally:
                try:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                except Struck:
                    raised += 1
            assert rank == 0 or raised == 0, i
            if group.stats()["calls"] == calls:  # the signal came before the call
                ops.all_reduce(x, group=group)
            else:
                struck += raised
        assert rank or struck, "no signal came during a call"
        check_total(group, 9)
        group.close()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    dist.barrier()


@pytest.mark.parametrize(
    ("transport", "connections"), [("shm", True), ("group", True), ("group", False)], ids=["shm", "sockets", "gloo"]
)
def test_what_a_handler_raises_comes_out_and_the_ranks_stay_in_step(transport: str, connections: bool) -> None:
    run_ranks(check_signals, 2, transport, connections)
