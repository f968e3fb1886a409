"""What c10d programs hang in: ranks that disagree, are late, die, or leave. Each is an error on every rank."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.harness.c10d import new_group
from tests.harness.ops import raised
from tpkernels import PeerLostError, RankMismatchError, c10d
from tpkernels.testing import run_ranks, run_ranks_outcomes
from tpkernels.testing.faults import come_late, kill_myself, stop_myself

pytestmark = pytest.mark.usefixtures("nothing_is_left_in_shared_memory")

NOTICED_S = 2.0
ROOT = Path(__file__).resolve().parents[2]


def disagreements(rank: int, R: int, group: dist.ProcessGroup) -> dict[str, Callable[[], object]]:
    """Calls of which rank 1 makes another one than the other ranks."""
    odd = rank == 1
    x, parts = torch.ones(4), [torch.ones(2) for _ in range(R)]
    return {
        "size": lambda: dist.all_reduce(torch.ones(4 + odd), group=group),
        "size of a large one": lambda: dist.all_reduce(torch.ones(500_000 + odd), group=group),
        "dtype": lambda: dist.all_reduce(torch.ones(4, dtype=torch.int32 if odd else torch.float32), group=group),
        "dtype of bytes": lambda: dist.broadcast(torch.ones(4).to(torch.bool if odd else torch.uint8), 0, group),
        "operation": lambda: dist.all_reduce(x, dist.ReduceOp.MAX if odd else dist.ReduceOp.SUM, group),
        "collective": lambda: dist.barrier(group) if odd else dist.all_reduce(x, group=group),
        "order": lambda: dist.broadcast(x, 0, group) if odd else dist.reduce(x, 0, group=group),
        "root": lambda: dist.broadcast(x, 1 if odd else 0, group),
        "root of a gather": lambda: dist.gather(x[:2], parts if rank == odd else None, int(odd), group),
        "rows sent": lambda: dist.all_to_all_single(
            torch.empty(R), torch.ones(R + odd), [1] * R, [1] * (R - 1) + [1 + odd], group
        ),
        "size of a gather": lambda: dist.all_gather(
            [torch.ones(2 + odd) for _ in range(R)], torch.ones(2 + odd), group
        ),
    }


def check_disagreements(transport: str) -> None:
    group, rank, R = new_group(transport), dist.get_rank(), dist.get_world_size()
    for what, call in disagreements(rank, R, group).items():
        started = time.monotonic()
        text = raised(call, RankMismatchError)
        assert time.monotonic() - started < 5, what
        assert f"rank {rank} of {R}" in text and "call" in text and group.group_name in text, text
        x = torch.ones(2)  # the group stays usable
        dist.all_reduce(x, group=group)
        assert torch.equal(x, torch.full((2,), float(R))), what


@pytest.mark.parametrize(("R", "transport"), [(2, "shm"), (3, "shm"), (3, "group")])
def test_ranks_that_disagree_get_an_error_each(R: int, transport: str) -> None:
    run_ranks(check_disagreements, R, transport)


def check_wrong_arguments() -> None:
    """What one rank alone can see is refused before the others are concerned."""
    group, rank, R = new_group(), dist.get_rank(), dist.get_world_size()
    x = torch.ones(4)
    for call, words in {
        lambda: dist.all_reduce(torch.ones(4, dtype=torch.float8_e4m3fn), group=group): "no sums of Float8_e4m3fn",
        lambda: dist.all_reduce(
            torch.ones(4, dtype=torch.int32), dist.ReduceOp.AVG, group
        ): "avg has no meaning for Int",
        lambda: dist.all_reduce(x, dist.ReduceOp.BAND, group): "bitwise and has no meaning for Float",
        lambda: dist.all_gather_into_tensor(torch.ones(3), x, group): f"output must have {4 * R} values",
        lambda: dist.reduce_scatter_tensor(torch.ones(3), x, group=group): f"input must have {3 * R} values",
        lambda: dist.all_to_all_single(x.clone(), x, [1] * R, [2] * R, group): "_split_sizes must",
    }.items():
        text = raised(call, (RuntimeError, NotImplementedError))
        assert words in text, text
    dist.all_reduce(x, group=group)
    assert torch.equal(x, torch.full((4,), float(R)))
    assert "must be 'tpk'" in raised(lambda: c10d.codec(None, "int8").__enter__(), ValueError)
    assert "must be one of none, fp16, bf16, int8, fp8, got 'x'" in raised(
        lambda: c10d.codec(group, "x").__enter__(), ValueError
    )
    assert rank < R


def check_groups() -> None:
    """Overlapping groups, groups of one, a mesh; one that is destroyed while others live."""
    rank, R = dist.get_rank(), dist.get_world_size()
    pairs = [dist.new_group([r, (r + 1) % R], backend="tpk") for r in range(R)]
    alone = [dist.new_group([r], backend="tpk") for r in range(R)]
    for r, pair in enumerate(pairs):
        if rank in (r, (r + 1) % R):
            x = torch.tensor([float(rank)])
            dist.all_reduce(x, group=pair)
            assert x.item() == r + (r + 1) % R
    x = torch.tensor([7.0])
    dist.all_reduce(x, group=alone[rank])
    assert x.item() == 7.0
    mine = pairs[rank]
    assert mine.get_group_store() is not None
    assert mine._get_backend(torch.device("cpu")).name() == "tpk"
    dist.destroy_process_group(mine)
    x = torch.tensor([float(rank)])
    dist.all_reduce(x, group=new_group())
    assert x.item() == R * (R - 1) / 2


def check_monitored_barrier() -> None:
    group, rank, R = new_group(), dist.get_rank(), dist.get_world_size()
    group.monitored_barrier(timedelta(seconds=10), wait_all_ranks=True)
    limit = timedelta(seconds=0.3)
    if rank < R - 1:
        text = raised(lambda: group.monitored_barrier(limit, wait_all_ranks=True), RuntimeError)
        assert f"{R - 1} failed to pass monitoredBarrier" in text or rank > 0, text
    dist.barrier()


def check_all() -> None:
    check_wrong_arguments()
    check_groups()
    check_monitored_barrier()


def test_groups_and_what_one_rank_sees_alone() -> None:
    run_ranks(check_all, 3)


def check_a_late_rank() -> None:
    group, rank = new_group("shm", 0.5), dist.get_rank()
    if rank == 1:
        come_late(1.0)
    started = time.monotonic()
    if rank == 0:
        text = raised(lambda: dist.all_reduce(torch.ones(3), group=group), RuntimeError)
        assert "[1] did not signal within 0.5 s" in text and "all_reduce" in text and "call 1" in text, text
        assert "broken" in raised(lambda: dist.barrier(group), PeerLostError)  # and why
    else:  # what it was waited for is there; the next call is not
        dist.all_reduce(torch.ones(3), group=group)
        text = raised(lambda: dist.barrier(group), RuntimeError)
        assert "rank 0 gave up at call 1 because rank 1 (this rank) did not signal" in text, text
    assert time.monotonic() - started < 5


def test_a_late_rank_is_an_error_after_the_timeout_of_the_group() -> None:
    run_ranks(check_a_late_rank, 2, fresh=True)


def check_a_dead_rank(transport: str) -> str:
    group, rank = new_group(transport), dist.get_rank()
    dist.all_reduce(torch.ones(3), group=group)
    if rank == 1:
        kill_myself()
    pending = dist.all_reduce(torch.ones(3), group=group, async_op=True)
    started = time.monotonic()
    text = raised(pending.wait, PeerLostError)
    assert time.monotonic() - started < NOTICED_S
    return text


@pytest.mark.parametrize("transport", ["shm", "group"])
def test_a_dead_rank_is_named_by_all_others(transport: str) -> None:
    outcomes = run_ranks_outcomes(check_a_dead_rank, 3, transport)
    for rank in (0, 2):
        assert re.search(r"rank.? \[?1\]?", str(outcomes[rank].value)), outcomes[rank]
        assert "all_reduce" in outcomes[rank].value


def check_a_death_among_large_parts() -> str:
    """In the middle of an all-to-all, a gather or a message, whichever runs then."""
    group, rank, R = new_group("shm"), dist.get_rank(), dist.get_world_size()
    before, after = (rank - 1) % R, (rank + 1) % R
    x, out = torch.full((3 << 20,), float(rank)), torch.empty(3 << 20)
    if rank == 1:
        kill_myself(after_s=0.2)

    def go_on() -> None:
        while True:
            dist.all_to_all_single(out, x, group=group)
            assert all(bool((part == r).all()) for r, part in enumerate(out.chunk(R)))
            dist.all_gather_into_tensor(out, x[: len(x) // R], group)
            ops = [dist.P2POp(dist.isend, x, after, group), dist.P2POp(dist.irecv, out, before, group)]
            for work in dist.batch_isend_irecv(ops):
                work.wait()
            assert bool((out == before).all())

    return raised(go_on, PeerLostError)


def test_a_death_among_large_parts_is_noticed_by_all_others() -> None:
    outcomes = run_ranks_outcomes(check_a_death_among_large_parts, 3)
    for rank in (0, 2):
        assert "rank 1" in str(outcomes[rank].value) and "died" in outcomes[rank].value, outcomes[rank]


def check_a_stopped_rank(transport: str) -> str:
    """All reduce again and again, until one of them stands still for longer than the timeout."""
    group, rank = new_group(transport, 0.7), dist.get_rank()
    dist.all_reduce(torch.ones(3), group=group)
    if rank == 1:
        stop_myself(after_s=0.1, for_s=2.5)

    def go_on() -> None:
        while True:
            dist.all_reduce(torch.ones(3000), group=group)

    started = time.monotonic()
    text = raised(go_on, RuntimeError)
    assert time.monotonic() - started < 10, text
    return text


@pytest.mark.parametrize("transport", ["shm", "group"])
def test_a_stopped_rank_is_an_error_on_the_others_and_then_on_itself(transport: str) -> None:
    first, stopped, third = run_ranks(check_a_stopped_rank, 3, transport, fresh=True)
    for text in (first, third):
        assert "all_reduce" in text and re.search(r"rank.? \[?1\]?", text), text
    assert "all_reduce" in stopped, stopped


def check_threads_on_one_group() -> None:
    """Each call of a thread meets one of the same kind on the other ranks: all of them end."""
    group, R = new_group(), dist.get_world_size()
    failed: list[BaseException] = []

    def work(is_async: bool) -> None:
        try:
            for _ in range(100):
                x = torch.ones(5000)
                done = dist.all_reduce(x, group=group, async_op=is_async)
                if done is not None:
                    done.wait()
                assert torch.equal(x, torch.full_like(x, float(R)))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(bool(i % 2),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed


def check_threads_that_disagree() -> int:
    """Two threads make different calls in an order of chance: what does not fit is an error on all ranks."""
    group, refused = new_group(), []

    def work(n: int) -> None:
        for _ in range(50):
            try:
                dist.all_reduce(torch.ones(n), group=group)
            except RankMismatchError as error:
                refused.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in (10, 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    x = torch.ones(2)
    dist.all_reduce(x, group=group)
    assert torch.equal(x, torch.full((2,), float(dist.get_world_size())))
    return len(refused)


def test_calls_of_several_threads_on_one_group() -> None:
    run_ranks(check_threads_on_one_group, 3)
    assert len(set(run_ranks(check_threads_that_disagree, 2))) == 1


def check_leaving() -> None:
    """destroy_process_group and abort free the memory at once, and end the calls of others."""
    rank = dist.get_rank()

    def mapped() -> int:
        gc.collect()  # groups of calls before this one
        with open("/proc/self/maps", encoding="ascii") as maps:
            return sum("/dev/shm" in line for line in maps)

    before = mapped()
    group = dist.new_group(backend="tpk")
    assert mapped() == before + 1
    dist.all_reduce(torch.ones(3), group=group)
    dist.destroy_process_group(group)
    del group
    assert mapped() == before
    group = dist.new_group(backend="tpk")
    backend = group._get_backend(torch.device("cpu"))
    if rank == 0:
        pending = dist.irecv(torch.ones(3), 1, group=group)
        assert pending is not None
        backend.abort()
        assert "aborted" in raised(pending.wait, PeerLostError)
    else:
        text = raised(lambda: dist.barrier(group), PeerLostError)
        assert "rank 0" in text, text
    dist.barrier()


def test_who_leaves_frees_the_memory_and_ends_the_calls_of_others() -> None:
    run_ranks(check_leaving, 2, fresh=True)


def check_a_forked_child() -> None:
    group, rank = new_group(), dist.get_rank()
    dist.all_reduce(torch.ones(3), group=group)
    dist.all_reduce(torch.ones(3), group=group, async_op=True).wait()
    child = os.fork()
    if child == 0:
        refused = "forked" in raised(lambda: dist.all_reduce(torch.ones(3), group=group), ValueError)
        os._exit(0 if refused else 1)
    assert os.waitpid(child, 0)[1] == 0
    x = torch.ones(3)
    dist.all_reduce(x, group=group)
    assert torch.equal(x, torch.full((3,), float(dist.get_world_size()))), rank


def test_a_forked_child_is_refused_and_leaves_the_group_as_it_is() -> None:
    run_ranks(check_a_forked_child, 2, fresh=True)


FORKING = """
import os, signal, sys, torch, torch.distributed as dist, tpkernels
dist.init_process_group("tpk", store=dist.HashStore(), rank=0, world_size=1)
dist.all_reduce(torch.ones(3), async_op=True).wait()  # begins the thread of the group
child = os.fork()
if child == 0:
    signal.alarm(20)
    dist.distributed_c10d._world.pg_map.clear()
    sys.exit(7)  # as any program ends: objects are destroyed
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_child_ends_as_any_process_does() -> None:
    done = subprocess.run([sys.executable, "-c", FORKING], cwd=ROOT, capture_output=True, timeout=60, check=False)
    assert done.returncode == 7, done.stderr


RESTARTING = """
import os, signal, sys, torch, torch.distributed as dist, tpkernels
dist.init_process_group("tpk")
x = torch.ones(3)
dist.all_reduce(x)
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        dist.all_reduce(x)
    except tpkernels.PeerLostError as error:
        print("lost:", error, flush=True)
        raise
sys.stdout.write(f"done {x.tolist()} ")  # at once: both ranks write to one pipe
dist.destroy_process_group()
"""


@pytest.mark.nightly
def test_torchrun_starts_anew_after_a_death(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(RESTARTING)
    arguments = ["--standalone", "--nproc-per-node=2", "--max-restarts=1", "--monitor-interval=0.5"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *arguments, str(tmp_path / "program.py")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done [2.0, 2.0, 2.0]") == 2, done.stdout
