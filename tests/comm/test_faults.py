"""Late, dead, stopped and leaving ranks: an error in bounded time that names the rank and the call."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

import tpkernels as tpk
from tests.harness.hosts import open_group
from tests.harness.ops import raised
from tests.harness.ranks import nightly
from tpkernels import ops
from tpkernels.comm.group import Group
from tpkernels.testing import Outcome, run_ranks, run_ranks_outcomes
from tpkernels.testing.faults import come_late, kill_myself, stop_myself

pytestmark = pytest.mark.usefixtures("nothing_is_left_in_shared_memory")

TRANSPORTS = pytest.mark.parametrize("transport", ["shm", "group"])
ALL_TRANSPORTS = pytest.mark.parametrize("transport", ["shm", "group", "hierarchical"])
STOPPED_S = 3.0  # the deadline where a rank is stopped; opening has it, too
NOTICED_S = 2.0  # after its death a rank must be named by the others


def finished(outcomes: list[Outcome]) -> list[Outcome]:
    """The outcomes of the ranks that returned, which must be all but those that were killed."""
    for outcome in outcomes:
        assert outcome.finished or outcome.exitcode is not None, f"rank {outcome.rank}: {outcome.error}"
    return [outcome for outcome in outcomes if outcome.finished]


def report(call: Callable[[], object]) -> tuple[str, str, float]:
    """The kind and text of the error that a call ends in, and when."""
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic()
    return "", "", time.monotonic()


# --- late


def check_a_late_rank_is_waited_for(transport: str) -> None:
    with Group.open(transport=transport) as group:
        R, rank = group.world_size, group.rank
        for late in range(R):
            for n in (4, 300_000):
                x = torch.zeros(n)
                if rank == late:
                    come_late(0.3)
                x += rank + 1  # written at the last moment: an early read gives zeros
                group.reset_stats()
                y = ops.all_reduce(x, group=group)
                assert torch.equal(y, torch.full((n,), R * (R + 1) / 2)), (late, n)
                if rank != late and n == 4:
                    assert group.stats()["wait_seconds"] > 0.2
                mine = ops.reduce_scatter(x, group=group)
                assert torch.equal(ops.all_gather(mine, group=group), y)


@TRANSPORTS
@pytest.mark.parametrize("R", [2, 3])
def test_a_late_sender_is_waited_for_and_not_read_early(transport: str, R: int) -> None:
    run_ranks(check_a_late_rank_is_waited_for, R, transport)


def check_a_reused_buffer_is_not_read_late() -> None:
    """A rank may write into its input as soon as its call has returned, however slow the others are."""
    with Group.open() as group:
        R, rank = group.world_size, group.rank
        x = torch.empty(200_000)
        for i in range(60):
            x.fill_(float(i + rank))
            if i % 7 == rank:
                come_late(0.01)
            y = ops.all_reduce(x, group=group) if i % 2 else ops.all_gather(x[:1000], group=group)
            x.fill_(-1.0)
            want = torch.full_like(y, float(R * i + R * (R - 1) // 2))
            if i % 2 == 0:
                want = torch.cat([torch.full((1000,), float(i + r)) for r in range(R)])
            assert torch.equal(y, want), i


@pytest.mark.parametrize("R", [2, 4])
def test_a_buffer_can_be_written_again_as_soon_as_the_call_returns(R: int) -> None:
    run_ranks(check_a_reused_buffer_is_not_read_late, R)


# --- dead


def die_waiting(transport: str, victim: int, n: int) -> tuple[float, tuple[str, str, float], tuple[str, str, float]]:
    """The victim is killed inside a collective, waiting for the last rank, which comes after that."""
    group = open_group(transport=transport, timeout_s=20.0)
    ops.all_reduce(torch.ones(n), group=group)
    group.barrier()
    start = time.monotonic()
    if group.rank == victim:
        kill_myself(0.3)
    last = group.world_size - 1 if victim != group.world_size - 1 else 0
    if group.rank == last:
        come_late(0.8)
    first = report(lambda: ops.all_reduce(torch.ones(n), group=group))
    return start, first, report(lambda: ops.all_reduce(torch.ones(n), group=group))


@pytest.mark.parametrize(
    ("transport", "R", "victim"),
    [
        ("shm", 3, 0),
        ("group", 4, 2),
        ("hierarchical", 3, 1),
        *nightly(("shm", 2, 1), ("shm", 4, 2), ("group", 2, 1), ("group", 3, 0), ("hierarchical", 4, 2)),
    ],
)
def test_a_rank_killed_inside_a_collective_is_named_within_two_seconds(transport: str, R: int, victim: int) -> None:
    outcomes = run_ranks_outcomes(die_waiting, R, transport, victim, 50_000, timeout=60.0)
    assert outcomes[victim].exitcode == -9
    survivors = finished(outcomes)
    assert len(survivors) == R - 1
    for outcome in survivors:
        start, (kind, text, when), (later_kind, later_text, _) = outcome.value
        assert kind == "PeerLostError", (outcome.rank, kind, text)
        assert re.search(rf"rank {victim}\b|ranks \[{victim}\]", text), text
        assert "all_reduce" in text, text
        assert "call " in text, text
        assert when - (start + 0.8) < NOTICED_S, f"rank {outcome.rank} noticed after {when - start:.1f} s"
        assert later_kind == "PeerLostError", "the group stays broken"
        assert "broken" in later_text, later_text


def die_working(transport: str, victim: int) -> tuple[str, str, float, int]:
    """The victim is killed while all ranks move data without a pause."""
    group = open_group(transport=transport, timeout_s=20.0)
    x = torch.ones(2_000_000)
    group.barrier()
    if group.rank == victim:
        kill_myself(0.4)
    calls = 0
    while True:
        kind, text, when = report(lambda: ops.all_reduce(x, group=group))
        if kind:
            return kind, text, when, calls
        calls += 1


@ALL_TRANSPORTS
def test_a_rank_killed_while_data_moves_is_named(transport: str) -> None:
    outcomes = run_ranks_outcomes(die_working, 3, transport, 1, timeout=60.0)
    assert outcomes[1].exitcode == -9
    survivors = finished(outcomes)
    for outcome in survivors:
        kind, text, _, _ = outcome.value
        assert kind == "PeerLostError", (kind, text)
        assert re.search(r"rank 1\b|ranks \[1\]", text), text
    whens = [outcome.value[2] for outcome in survivors]
    assert max(whens) - min(whens) < NOTICED_S


def leave_by_exception() -> tuple[str, str, float]:
    """One rank raises between two calls and its program ends."""
    group = Group.open(timeout_s=20.0)
    ops.all_reduce(torch.ones(3), group=group)
    if group.rank == 0:
        os._exit(3)
    return report(lambda: ops.all_reduce(torch.ones(3), group=group))


def test_a_rank_whose_program_ends_is_named() -> None:
    outcomes = run_ranks_outcomes(leave_by_exception, 3, timeout=60.0)
    assert outcomes[0].exitcode == 3
    for outcome in finished(outcomes):
        kind, text, _ = outcome.value
        assert kind == "PeerLostError", text
        assert re.search(r"rank 0\b|ranks \[0\]", text), text


# --- stopped


def stop_one(transport: str, victim: int) -> tuple[float, tuple[str, str, float], tuple[str, str, float]]:
    group = open_group(transport=transport, timeout_s=STOPPED_S)
    for _ in range(4):
        ops.all_reduce(torch.ones(10), group=group)
    group.barrier()
    if group.rank == victim:
        stop_myself()
    start = time.monotonic()
    first = report(lambda: ops.all_reduce(torch.ones(10), group=group))
    return start, first, report(lambda: ops.all_gather(torch.ones(10), group=group))


@pytest.mark.parametrize(
    ("transport", "R", "victim"),
    [
        ("shm", 3, 2),
        ("group", 2, 0),
        ("hierarchical", 4, 1),
        *nightly(("shm", 2, 0), ("group", 3, 2), ("hierarchical", 3, 2)),
    ],
)
def test_a_stopped_rank_is_a_timeout_that_names_rank_op_and_call(transport: str, R: int, victim: int) -> None:
    outcomes = run_ranks_outcomes(stop_one, R, transport, victim, timeout=20.0, stopped_for_good=True)
    assert "stopped by a signal" in outcomes[victim].error
    for outcome in outcomes:
        if outcome.rank == victim:
            continue
        assert outcome.finished, outcome.error
        start, (kind, text, when), (later_kind, _, later) = outcome.value
        assert kind == "TimeoutError", (kind, text)
        assert f"all_reduce on group 'world' (rank {outcome.rank} of {R}), call " in text, text
        assert re.search(rf"ranks \[{victim}\]|because rank {victim} did not signal", text), text
        assert "timeout_s" in text or "gave up" in text, "it says what to raise when the rank is only slow"
        assert STOPPED_S - 0.1 < when - start < STOPPED_S + 3.0, when - start
        assert later_kind == "PeerLostError"
        assert later - when < 0.5, "a broken group does not wait again"


def stop_for_a_while(transport: str) -> None:
    with Group.open(transport=transport, timeout_s=20.0) as group:
        x = torch.ones(100_000)
        group.barrier()
        if group.rank == 1:
            stop_myself(after_s=0.1, for_s=0.7)
        start, longest, on = time.monotonic(), 0.0, True
        while on:
            before = time.monotonic()
            assert torch.equal(ops.all_reduce(x, group=group), torch.full_like(x, group.world_size))
            young = torch.tensor([time.monotonic() - start < 1.5], dtype=torch.uint8)
            on = bool(ops.all_reduce(young, group=group, op="min"))
            longest = max(longest, time.monotonic() - before)  # of both calls: the signal comes in either
        slowest = ops.all_reduce(torch.tensor([longest]), group=group, op="max")
        assert slowest.item() > 0.5, "rank 1 stood still inside a call"


@TRANSPORTS
def test_a_rank_that_stands_still_for_a_while_is_waited_for(transport: str) -> None:
    run_ranks(stop_for_a_while, 2, transport, fresh=True)


def come_after_the_deadline(transport: str) -> list[tuple[str, str, float]]:
    group = Group.open(transport=transport, timeout_s=1.0)
    ops.all_reduce(torch.ones(3), group=group)
    if group.rank == 1:
        come_late(3.0)
    found = []
    for _ in range(2):
        start = time.monotonic()
        kind, text, when = report(lambda: check_values(ops.all_reduce(torch.ones(3), group=group)))
        found.append((kind, text, when - start))
    return found


def check_values(y: torch.Tensor) -> None:
    assert y.tolist() == [float(dist.get_world_size())] * 3


@TRANSPORTS
def test_a_rank_that_comes_after_the_deadline_does_not_hang(transport: str) -> None:
    (first, _), late = run_ranks(come_after_the_deadline, 2, transport, fresh=True)
    assert first[0] == "TimeoutError", first
    assert 0.9 < first[2] < 4.0
    # What the others had sent before they gave up may still arrive; after that the group is broken.
    assert late[0][0] in ("", "PeerLostError", "TimeoutError"), late
    assert late[1][0] in ("PeerLostError", "TimeoutError"), late
    assert all(took < 4.0 for _, _, took in late)


# --- memory, closing


def check_shared_memory_is_too_small() -> list[str]:
    texts = [raised(lambda: Group.open(arena_bytes=1 << 42), OSError)]
    with Group.open(arena_bytes=1 << 20) as group:
        texts.append(raised(lambda: group.empty((1 << 22,), dtype=torch.float32), ValueError))
        kept = group.empty((1000,), dtype=torch.float32).fill_(2.0)
        assert torch.equal(ops.all_reduce(kept, group=group), torch.full((1000,), 2.0 * group.world_size))
    assert kept.sum() == 2000.0, "a tensor of a closed group keeps its memory"
    return texts


def test_too_little_shared_memory_is_an_error_with_both_sizes_on_every_rank() -> None:
    for opening, making in run_ranks(check_shared_memory_is_too_small, 3):
        assert str(3 << 42) in opening, opening
        assert "bytes free" in opening, opening
        assert "arena_bytes" in opening, opening
        assert str(4 << 22) in making, making
        assert "arena_bytes" in making, making


def check_closed_groups(transport: str) -> tuple[str, str, float, float]:
    group = open_group(dist.new_group(), transport=transport, timeout_s=10.0)  # gloo may be of no use afterwards
    R = group.world_size
    ops.all_reduce(torch.ones(2), group=group)
    start = time.monotonic()
    if group.rank == 1:
        group.close()
        group.close()  # twice does nothing
        come_late(0.5)
    kind, text, when = report(lambda: ops.all_reduce(torch.ones(2), group=group))
    group.close()
    with Group.open() as again:
        assert ops.all_reduce(torch.ones(2), group=again).tolist() == [float(R)] * 2
    text_after = raised(lambda: ops.all_reduce(torch.ones(2), group=again), tpk.PeerLostError)
    assert "closed" in text_after, text_after
    return kind, text, start, when


@ALL_TRANSPORTS
def test_a_closed_group_says_who_closed_it(transport: str) -> None:
    for rank, (kind, text, start, when) in enumerate(run_ranks(check_closed_groups, 3, transport, fresh=True)):
        assert kind == "PeerLostError", text
        assert ("closed" in text) if rank == 1 or transport == "shm" else re.search(r"rank 1|\[1\]", text), text
        assert when - start < 4.0, "not only by the deadline"


def check_a_fork_may_not_call() -> int:
    group = Group.open()
    ops.all_reduce(torch.ones(2), group=group)
    pid = os.fork()
    if pid == 0:
        text = raised(lambda: ops.all_reduce(torch.ones(2), group=group), ValueError)
        os._exit(0 if "forked" in text else 1)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert ops.all_reduce(torch.ones(2), group=group).tolist() == [2.0, 2.0]
    return code


def test_a_forked_process_is_told_to_open_its_own_group() -> None:
    assert run_ranks(check_a_fork_may_not_call, 2, fresh=True) == [0, 0]


def many_calls() -> float:
    with Group.open() as group:
        start = time.monotonic()
        for i in range(300):
            assert ops.all_reduce(torch.full((5,), float(i)), group=group)[0].item() == i * group.world_size
        return time.monotonic() - start


def test_eight_ranks_on_few_cores_do_not_spin_each_other_out() -> None:
    seconds = max(run_ranks(many_calls, 8))
    assert seconds < 60.0, f"300 calls of 8 ranks took {seconds:.1f} s"


def check_counters_during_a_call() -> None:
    """Rank 0 asks for the counters while its own call waits for rank 1, over a transport whose waits are Python's."""
    store = dist.distributed_c10d._get_default_store()
    with Group.open(transport="group", timeout_s=60) as group:
        call = threading.Thread(target=ops.all_reduce, args=(torch.ones(1 << 20),), kwargs={"group": group})
        if group.rank == 0:
            call.start()
            store.set("asks", "now")
        else:
            store.wait(["asks"])
            call.start()
        assert group.stats()["calls"] in (0, 1)
        group.reset_stats()
        call.join()


def test_counters_can_be_read_while_another_thread_is_in_a_call() -> None:
    run_ranks(check_counters_during_a_call, 2, timeout=60)
