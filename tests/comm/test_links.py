"""Ranks on hosts that are network namespaces with a /dev/shm of their own, joined by links of a known rate."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import Empty
from typing import Any

import pytest
import torch
import torch.distributed as dist

from bench.study import links
from tests.harness.hosts import reduced, values
from tests.harness.ops import raised
from tests.harness.ranks import nightly, weekly
from tpkernels import ops
from tpkernels.comm.group import Group
from tpkernels.errors import PeerLostError
from tpkernels.testing.spawn import fork_server

OBSTACLE = links.obstacle()
pytestmark = pytest.mark.skipif(OBSTACLE is not None, reason=f"needs network namespaces: {OBSTACLE}")
STORE = "tcp://10.77.0.1:29501"
TIMEOUT_S = 3.0  # of the group whose link is cut


def _on_rank(host: links.Host, rank: int, world_size: int, body: Callable[..., Any], args: Any, results: Any) -> None:
    torch.set_num_threads(1)
    host.enter()
    dist.init_process_group("gloo", init_method=STORE, rank=rank, world_size=world_size)
    results.put((rank, body(*args)))
    threading.Event().wait()  # until all have returned and are killed: a process that ends would be a lost rank


def run_on(
    hosts: Sequence[links.Host], body: Callable[..., Any], *args: Any, meanwhile: Callable[[], object] = lambda: None
) -> list[Any]:
    """body(*args) on a rank of each of these hosts, and `meanwhile` here; what the ranks returned."""
    context = fork_server()
    results, found = context.Queue(), {}
    ranks = [
        context.Process(target=_on_rank, args=(host, r, len(hosts), body, args, results), daemon=True)
        for r, host in enumerate(hosts)
    ]
    for rank in ranks:
        rank.start()
    try:
        meanwhile()
        deadline = time.monotonic() + 100
        while len(found) < len(ranks):
            try:
                rank, value = results.get(timeout=1)
                found[rank] = value
            except Empty:
                ended = {r: p.exitcode for r, p in enumerate(ranks) if p.exitcode and r not in found}
                assert not ended and time.monotonic() < deadline, f"ranks {ended} failed; {sorted(found)} returned"
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    return [found[r] for r in range(len(ranks))]


def check_sums(hosts: Sequence[Sequence[int]]) -> float:
    """Seconds of a sum of a few values."""
    R, rank = dist.get_world_size(), dist.get_rank()
    with Group.open() as group:
        assert group.transport == "hierarchical", group.explain().reason
        for n in (7, 5_003, 300_001):
            inputs = [values(n, torch.float32, r) for r in range(R)]
            want = reduced(inputs, hosts, "sum", "none")
            assert torch.equal(ops.all_reduce(inputs[rank], group=group), want)
            mine = ops.reduce_scatter(inputs[rank], group=group)
            assert torch.equal(ops.all_gather(mine, group=group, dim_size=n), want)
            packed = ops.all_reduce(inputs[rank], group=group, codec="int8")
            assert torch.equal(ops.all_reduce(packed, group=group, op="max"), packed)
        started = time.perf_counter()
        for _ in range(5):
            ops.all_reduce(torch.ones(8), group=group)
        return (time.perf_counter() - started) / 5


def check_two_and_two(link: str) -> list[float]:
    with links.shaped(link, own_memory=True) as made:
        return run_on([made.hosts[0]] * 2 + [made.hosts[1]] * 2, check_sums, [[0, 1], [2, 3]])


def test_two_hosts_with_two_ranks_each() -> None:
    assert len(check_two_and_two("1gbit")) == 4


@pytest.mark.parametrize(
    "link",
    [
        *nightly("100mbit+1ms", "10gbit+20ms"),
        *weekly("100mbit", "100mbit+20ms", "1gbit+1ms", "1gbit+20ms", "10gbit", "10gbit+1ms"),
    ],
)
def test_links_of_any_rate_and_delay(link: str) -> None:
    check_two_and_two(link)


@pytest.mark.nightly
def test_three_hosts_and_uneven_ones() -> None:
    with links.shaped("1gbit", 3, own_memory=True) as made:
        a, b, c = made.hosts
        run_on([a, a, b, b, c, c], check_sums, [[0, 1], [2, 3], [4, 5]])
        run_on([a, a, a, b], check_sums, [[0, 1, 2], [3]])
        run_on([a, b, a, c, b], check_sums, [[0, 2], [1, 4], [3]])


def cut(made: links.Link, *begun: Path) -> None:
    """Cut the link of the second host once there are these files."""
    deadline = time.monotonic() + 60
    while not all(file.exists() for file in begun) and time.monotonic() < deadline:
        time.sleep(0.01)  # between two looks
    links.run(links.program("ip"), "-n", str(made.hosts[1].namespace), "link", "set", "v1", "down")


def open_behind_the_cut(folder: Path) -> tuple[str, float]:
    """The error of a group that is opened when the link is cut, and the seconds until it came."""
    Path(folder, f"begun {dist.get_rank()}").touch()
    while not Path(folder, "cut").exists():
        time.sleep(0.01)  # between two looks
    start = time.monotonic()
    text = raised(lambda: Group.open(timeout_s=TIMEOUT_S), TimeoutError)
    return text, time.monotonic() - start


@pytest.mark.nightly
def test_a_group_that_is_opened_behind_a_cut_link_fails_in_time(tmp_path: Path) -> None:
    with links.shaped("1gbit", own_memory=True) as made:

        def meanwhile() -> None:
            cut(made, tmp_path / "begun 0", tmp_path / "begun 1")
            (tmp_path / "cut").touch()

        (near, _), (behind, seconds) = run_on(made.hosts, open_behind_the_cut, tmp_path, meanwhile=meanwhile)
    assert "rank 1 did not come within 3 s" in near
    assert "rank 1 of 2: the store of the process group did not answer within 3 s" in behind
    assert seconds < TIMEOUT_S + 10


def call_until_the_link_is_cut(begun: Path) -> tuple[str, float]:
    """The error, and the seconds from the last call before the cut."""
    group = Group.open(timeout_s=TIMEOUT_S)
    last = time.monotonic()

    def call() -> None:
        nonlocal last
        while True:
            ops.all_reduce(torch.ones(100_000), group=group)
            last = time.monotonic()
            begun.touch()

    return raised(call, (TimeoutError, PeerLostError)), time.monotonic() - last


@pytest.mark.parametrize("hosts", [(0, 0, 1, 1), (0, 1)], ids=["hierarchical", "group"])
def test_where_a_link_is_cut_all_ranks_leave_and_name_those_behind_it(tmp_path: Path, hosts: tuple[int, ...]) -> None:
    """The store is behind the cut for the second host."""
    with links.shaped("1gbit", own_memory=True) as made:
        places, begun = [made.hosts[h] for h in hosts], tmp_path / "begun"
        found = run_on(places, call_until_the_link_is_cut, begun, meanwhile=lambda: cut(made, begun))
    for rank, (text, seconds) in enumerate(found):
        behind = [r for r, host in enumerate(hosts) if host != hosts[rank]]
        assert f"ranks {behind} did not come" in text, text
        assert seconds < TIMEOUT_S + 10
