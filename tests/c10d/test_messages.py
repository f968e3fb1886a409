"""send and recv: tags, sizes, several at once, from any rank; and what ends them when the other rank does not come."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from tests.harness.c10d import new_group
from tests.harness.ops import raised
from tests.harness.ranks import BOTH_TRANSPORTS, Run, on_processes, on_ranks
from tpkernels import PeerLostError, RankMismatchError
from tpkernels.testing import run_ranks, run_ranks_outcomes
from tpkernels.testing.faults import kill_myself

pytestmark = pytest.mark.usefixtures("nothing_is_left_in_shared_memory")

SIZES = (0, 1, 3, 5000, 900_001)  # of bytes: none, less than a header, several rings


def message(sender: int, tag: int, n: int) -> torch.Tensor:
    made = torch.Generator().manual_seed(100 * sender + tag)
    return torch.randint(0, 256, (n,), generator=made, dtype=torch.uint8)


@on_ranks(2, 3, transports=BOTH_TRANSPORTS)
def check_blocking_pairs(transport: str) -> None:
    group, rank, R = new_group(transport), dist.get_rank(), dist.get_world_size()
    for n in SIZES:
        for tag in (0, 5):
            if rank % 2 == 0 and rank + 1 < R:
                dist.send(message(rank, tag, n), rank + 1, group, tag)
            elif rank % 2 == 1:
                x = torch.zeros(n, dtype=torch.uint8)
                assert dist.recv(x, rank - 1, group, tag) == rank - 1
                assert torch.equal(x, message(rank - 1, tag, n)), (n, tag)


@on_ranks(2, 3, transports=BOTH_TRANSPORTS)
def check_everybody_with_everybody_at_once(transport: str) -> None:
    """All messages are under way at the same time; tags are received in another order than they were sent in."""
    group, rank, R = new_group(transport), dist.get_rank(), dist.get_world_size()
    others = [r for r in range(R) if r != rank]
    works = [dist.isend(message(rank, tag, n), r, group, tag) for tag, n in enumerate(SIZES) for r in others]
    found = {}
    for tag, n in reversed(list(enumerate(SIZES))):
        for r in others:
            found[r, tag] = x = torch.zeros(n, dtype=torch.uint8)
            works.append(dist.irecv(x, r, group, tag))
    while transport == "shm" and not all(work.is_completed() for work in works):
        time.sleep(0.001)  # between two looks: no call waits, so that the thread of the group must move them
    for work in works:
        work.wait()
    assert all(torch.equal(x, message(r, tag, SIZES[tag])) for (r, tag), x in found.items())


@on_ranks(2, 3, transports=BOTH_TRANSPORTS)
def check_messages_of_one_tag_keep_their_order(transport: str) -> None:
    group, rank, R = new_group(transport), dist.get_rank(), dist.get_world_size()
    if rank >= 2 or R < 2:
        return
    if rank == 0:
        for i in range(50):
            dist.send(torch.full((i,), float(i)), 1, group)
    else:
        for i in range(50):
            x = torch.zeros(i)
            dist.recv(x, 0, group)
            assert torch.equal(x, torch.full((i,), float(i)))


@on_ranks(2, 3, transports=BOTH_TRANSPORTS)
def check_any_source(transport: str) -> None:
    group, rank, R = new_group(transport), dist.get_rank(), dist.get_world_size()
    if rank > 0:
        first = dist.isend(torch.full((rank,), float(rank)), 0, group, tag=rank)
        dist.send(torch.tensor([rank]), 0, group, tag=9)
        first.wait()
        return
    senders = []
    for _ in range(1, R):
        x = torch.zeros(1, dtype=torch.int64)
        senders.append(dist.recv(x, None, group, tag=9))
        assert x.item() == senders[-1]
    assert sorted(senders) == list(range(1, R))
    for r in range(1, R):  # sent before the ones that were received first
        x = torch.zeros(r)
        dist.recv(x, r, group, tag=r)
        assert torch.equal(x, torch.full((r,), float(r)))


@on_ranks(2, 3, transports=BOTH_TRANSPORTS)
def check_any_source_with_several_tags_at_once(transport: str) -> None:
    """Receives from any rank are posted ahead, with other tags than those that come first."""
    group, rank, R = new_group(transport), dist.get_rank(), dist.get_world_size()
    tags = (3, 1, 2)
    if rank > 0:
        for work in [dist.isend(torch.tensor([rank, tag]), 0, group, tag) for tag in tags]:
            work.wait()
        return
    for tag in sorted(tags):
        pending = [(torch.zeros(2, dtype=torch.int64), tag) for _ in range(1, R)]
        works = [dist.irecv(x, None, group, tag) for x, tag in pending]
        for work in works:
            work.wait()
        assert sorted(x.tolist() for x, _ in pending) == [[r, tag] for r in range(1, R)]
        if transport == "shm":
            assert [work._source_rank() for work in works] == [int(x[0]) for x, _ in pending]


@on_ranks(2, 3, transports=BOTH_TRANSPORTS)
def check_a_ring_of_operations_with_strides(transport: str) -> None:
    group, rank, R = new_group(transport), dist.get_rank(), dist.get_world_size()
    if R == 1:
        return
    values = torch.arange(120.0).view(40, 3)
    out, into = (values + 1000 * rank).t(), torch.zeros(40, 6)[:, ::2].t()
    operations = [
        dist.P2POp(dist.isend, out, (rank + 1) % R, group),
        dist.P2POp(dist.irecv, into, (rank - 1) % R, group),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    assert torch.equal(into, (values + 1000 * ((rank - 1) % R)).t())


@on_ranks(2, 3, transports=BOTH_TRANSPORTS)
def check_messages_and_collectives_mix(transport: str) -> None:
    group, rank, R = new_group(transport), dist.get_rank(), dist.get_world_size()
    x, y = torch.zeros(100_000), torch.full((1000,), 1.0)
    works = []
    if rank == 0 and R > 1:
        works.append(dist.irecv(x, R - 1, group))
    sums = [dist.all_reduce(y, group=group, async_op=True) for _ in range(3)]
    if rank == R - 1 and R > 1:
        works.append(dist.isend(x + 1, 0, group))
    for work in (*sums, *works):
        work.wait()
    assert torch.equal(y, torch.full((1000,), float(R**3)))
    assert rank > 0 or R == 1 or bool((x == 1).all())


@on_processes(globals())
def test_messages(run: Run) -> None:
    run_ranks(run.check, run.R, run.transport)


def check_another_size_or_dtype_is_an_error() -> None:
    group, rank = new_group("shm"), dist.get_rank()
    for sent, wanted, what in (
        (torch.ones(4), torch.zeros(5), "another size"),
        (torch.ones(4), torch.zeros(4, dtype=torch.int32), "another dtype"),
        (torch.ones(300_000), torch.zeros(1), "another size"),
    ):
        if rank == 0:
            dist.send(sent, 1, group)
        elif rank == 1:
            text = raised(lambda x=wanted: dist.recv(x, 0, group), RankMismatchError)
            assert "recv from rank 0" in text and what in text, text
            assert not wanted.any()
    if rank == 0:
        dist.send(torch.ones(2), 1, group)
    elif rank == 1:
        x = torch.zeros(2)
        dist.recv(x, 0, group)
        assert torch.equal(x, torch.ones(2))


def check_a_late_rank_is_an_error() -> None:
    group, rank = new_group("shm", 0.5), dist.get_rank()
    if rank == 0:
        text = raised(lambda: dist.recv(torch.zeros(1), 1, group), RuntimeError)
        assert "recv from rank 1" in text and "within 0.5 s" in text, text
        text = raised(lambda: dist.send(torch.zeros(1_000_000), 1, group), RuntimeError)
        assert "send to rank 1" in text and "within 0.5 s" in text, text
        text = raised(lambda: dist.send(torch.zeros(1), 1, group), RuntimeError)
        assert "half-way" in text, text
    dist.barrier()


def test_what_does_not_fit_or_does_not_come_is_an_error() -> None:
    run_ranks(check_another_size_or_dtype_is_an_error, 2)
    run_ranks(check_a_late_rank_is_an_error, 2)


def check_a_dead_rank_ends_messages() -> str:
    group, rank = new_group("shm"), dist.get_rank()
    if rank == 1:
        dist.send(torch.ones(3), 0, group, tag=1)  # arrives although the sender has died
        kill_myself()
    pending = dist.isend(torch.ones(1_000_000), 1, group)
    text = raised(lambda: dist.recv(torch.zeros(3), 1, group), PeerLostError)
    assert "recv from rank 1" in text and "died" in text, text
    assert "died" in raised(pending.wait, PeerLostError)
    x = torch.zeros(3)
    dist.recv(x, 1, group, tag=1)
    assert torch.equal(x, torch.ones(3))
    return "noticed"


def test_a_dead_rank_ends_the_messages_to_and_from_it() -> None:
    outcomes = run_ranks_outcomes(check_a_dead_rank_ends_messages, 2)
    assert outcomes[0].value == "noticed", outcomes[0].error
