"""Transport `group` on the CPU: sockets of the ranks' own, who may answer on them, and the way without them."""

from __future__ import annotations

import os
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pytest import MonkeyPatch
from torch import Tensor

from tests.harness.hosts import pretended
from tests.harness.ops import raised
from tpkernels import ops
from tpkernels.comm import open as open_module
from tpkernels.comm import sockets
from tpkernels.comm.group import Group
from tpkernels.data_parallel import GradAggregator
from tpkernels.errors import PeerLostError, RankMismatchError
from tpkernels.testing import run_ranks, run_ranks_outcomes
from tpkernels.testing.faults import kill_myself

OVER_CONNECTIONS = "over connections between the ranks, because transport='group' was asked for"


@contextmanager
def opened(**options: float) -> Iterator[Group]:
    with Group.open(transport="group", **options) as group:
        yield group


def check_sums(group: Group) -> None:
    """Values whose sum depends on the order, in every codec; the bits of all ranks are compared."""
    R, rank = group.world_size, group.rank
    for n in (7, 50_000, 3_000_000):
        every = [torch.randn(n, generator=torch.Generator().manual_seed(r)) * 8.0**r for r in range(R)]
        want = every[0].clone()
        for x in every[1:]:
            want += x
        assert torch.equal(ops.all_reduce(every[rank], group=group, op="avg"), want / R), n
        part = ops.reduce_scatter(every[rank], group=group)
        assert torch.equal(ops.all_gather(part, group=group, dim_size=n), want), n
        for codec in ("fp16", "int8"):
            y = ops.all_reduce(every[rank], group=group, codec=codec)
            assert torch.equal(ops.all_reduce(y, group=group, op="max"), y), (n, codec)
            assert (y - want).abs().max() < 0.02 * want.abs().max(), (n, codec)


def check_both_ways(patch: MonkeyPatch) -> None:
    R, rank = dist.get_world_size(), dist.get_rank()
    counted = []
    with opened() as group:
        assert group.explain().reason == OVER_CONNECTIONS
        check_sums(group)
        counted.append(group.stats()["wire_bytes"])
    # One rank whose gloo is set to something else keeps all of them from going around it.
    if rank == R - 1:
        patch.setenv("GLOO_DEVICE_TRANSPORT", "TCP_TLS")
    with opened() as group:
        assert group.explain().reason == (
            "through the process group, because transport='group' was asked for; "
            f"rank {R - 1} has no connections: GLOO_DEVICE_TRANSPORT is TCP_TLS"
        )
        check_sums(group)
        counted.append(group.stats()["wire_bytes"])
        text = raised(lambda: ops.all_reduce(torch.ones(5 + rank), group=group), RankMismatchError)
        assert "the ranks disagree" in text
        model = torch.nn.Linear(40, 40)
        with GradAggregator(model, group=group, codec="none", sync_parameters=True) as aggregator:
            model(torch.full((1, 40), rank + 1.0)).sum().backward()
            assert aggregator.wait()
            assert torch.equal(model.weight.grad, torch.full((40, 40), (R + 1) / 2))
    assert counted[0] < counted[1], "over connections the openings of calls bring no unused room"
    patch.undo()


def check_delays_are_of_links_between_hosts(patch: MonkeyPatch) -> None:
    """On one host the time of an empty call, long on a loaded machine, makes no sum one exchange."""
    patch.setattr(open_module, "measured_link", lambda *_: (1e9, 1.0))
    for hosts in (1, dist.get_world_size()):
        with pretended([[r] for r in range(hosts)]) if hosts > 1 else nullcontext(), opened() as group:
            path = group.explain("all_reduce", numel=100_000).path
            assert (path == "one_exchange") == (hosts > 1), (hosts, path)
    patch.undo()


def check_strangers(patch: MonkeyPatch) -> None:
    """Who calls a rank and does not know its word is hung up on; a rank that calls a stranger does not trust it."""
    rank, plain, strangers = dist.get_rank(), sockets._listen, []

    def call(address: tuple[str, int], says: bytes) -> None:
        with socket.create_connection(address) as stranger:
            stranger.sendall(says)
            strangers.append(stranger.recv(1))

    def listen() -> socket.socket:
        listener = plain()
        if rank == 0:
            threads = [threading.Thread(target=call, args=(listener.getsockname(), b"?" * n)) for n in (20, 500)]
            [thread.start() for thread in threads]
        return listener

    patch.setattr(sockets, "_listen", listen)
    with opened() as group:
        assert group.explain().reason == OVER_CONNECTIONS
        check_sums(group)
    # Rank 0 offers the address of another program, which answers with other bytes.
    patch.setattr(sockets, "_listen", plain)
    other = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        for _ in range(dist.get_world_size() - 1):
            connection, _ = other.accept()
            connection.sendall(b"!" * 100)

    class Elsewhere(socket.socket):
        def getsockname(self) -> tuple[str, int]:
            return other.getsockname()

    if rank == 0:
        threading.Thread(target=answer, daemon=True).start()
        patch.setattr(sockets, "_listen", lambda: Elsewhere(fileno=plain().detach()))
    patch.setattr(sockets, "_DEADLINE_S", 2.0)
    with opened() as group:
        reason = group.explain().reason
        assert reason.startswith("through the process group"), reason
        assert re.search(r"rank \d has not reached all others", reason), reason
        check_sums(group)
    patch.undo()
    other.close()


def check_addresses(patch: MonkeyPatch) -> None:
    """Connections go where gloo's go, or nowhere."""
    patch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert sockets._address() == "127.0.0.1"
    patch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    with opened() as group:
        assert "rank 0 has no connections: it cannot listen" in group.explain().reason
    patch.delenv("GLOO_SOCKET_IFNAME")
    patch.setenv("MASTER_ADDR", "no such host")
    assert sockets._address() == "127.0.0.1"
    patch.undo()


def check_everything() -> None:
    for check in (check_both_ways, check_delays_are_of_links_between_hosts, check_strangers, check_addresses):
        with MonkeyPatch.context() as patch:
            check(patch)
        dist.barrier()


@pytest.mark.parametrize("R", [2, 3])
def test_ranks_connect_or_all_go_through_the_process_group(R: int) -> None:
    run_ranks(check_everything, R, timeout=120.0)


def fail_without_connections(late: bool) -> tuple[str, str]:
    """The last rank dies in, or stays away from, a call through the process group."""
    os.environ["GLOO_DEVICE_TRANSPORT"] = "TCP_TLS"
    try:
        group = Group.open(transport="group", timeout_s=1.0 if late else 20.0)
    finally:
        del os.environ["GLOO_DEVICE_TRANSPORT"]
    store = dist.distributed_c10d._get_default_store()
    ops.all_reduce(torch.ones(50_000), group=group)
    if group.rank == group.world_size - 1:
        if late:  # until the others have given up; not through gloo, which is of no use after that
            store.wait(["gave up 0", "gave up 1"])
            return "", ""
        kill_myself(0.2)
    try:
        while True:
            ops.all_reduce(torch.ones(50_000), group=group)
    except (PeerLostError, TimeoutError) as error:
        store.set(f"gave up {group.rank}", "")
        return type(error).__name__, str(error)


@pytest.mark.parametrize("late", [False, True], ids=["dead", "late"])
def test_without_connections_a_lost_rank_is_named_too(late: bool) -> None:
    outcomes = run_ranks_outcomes(fail_without_connections, 3, late, timeout=60.0)
    for outcome in outcomes[:2]:
        assert outcome.finished, outcome.error
        kind, text = outcome.value
        assert kind == ("TimeoutError" if late else "PeerLostError"), text
        assert re.search(r"ranks? \[?2\b", text), text


class Delayed:
    """A communicator of a rank whose calls take a link's time by a clock of its own; every other empty call is late."""

    name, world_size = "delayed", 4

    def __init__(self, bytes_per_s: float, hop_s: float) -> None:
        self.bytes_per_s, self.hop_s, self.now, self.calls = bytes_per_s, hop_s, 0.0, 0

    def perf_counter_ns(self) -> int:
        return int(self.now * 1e9)

    def exchange(self, mine: int) -> list[int]:
        self.calls += 1
        self.now += 2 * self.hop_s * (self.calls % 2)
        return [mine] * self.world_size

    def set_link(self, bytes_per_s: float, hop_s: float) -> None:
        assert hop_s < 1e-9, "sums are not in one exchange"

    def all_reduce_(self, x: Tensor, *_: Any) -> None:
        self.now += 3 * self.hop_s + 1.5 * x.numel() * x.element_size() / self.bytes_per_s


@pytest.mark.parametrize("bytes_per_s", [1e7, 1e9])
@pytest.mark.parametrize("hop_s", [1e-5, 1e-3, 20e-3])
def test_a_link_is_timed_without_its_delays(monkeypatch: MonkeyPatch, bytes_per_s: float, hop_s: float) -> None:
    link = Delayed(bytes_per_s, hop_s)
    ops_of_link = SimpleNamespace(tpkernels=SimpleNamespace(all_reduce_=link.all_reduce_))
    torch_of_link = SimpleNamespace(zeros=torch.zeros, float32=torch.float32, ops=ops_of_link)
    monkeypatch.setattr(sockets, "time", link)
    monkeypatch.setattr(sockets, "torch", torch_of_link)
    rate, hop = sockets.measured_link(link, 4)
    assert hop == pytest.approx(hop_s, rel=1e-3)
    # 1 MiB of 20 ms takes a twentieth of its time at least: then 1 GB/s cannot be told from the delays.
    assert rate == pytest.approx(bytes_per_s, rel=1e-2) or (hop_s == 20e-3 and 2e8 < rate < bytes_per_s)
