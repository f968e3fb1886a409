"""Works: several in flight end in order, their futures, their errors; and what torch builds on them."""

from __future__ import annotations

import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import nn

from tests.harness.c10d import new_group
from tests.harness.ops import raised
from tests.harness.ranks import Run, on_processes, on_ranks
from tpkernels import RankMismatchError
from tpkernels.testing import run_ranks
from tpkernels.testing.faults import come_late

pytestmark = pytest.mark.usefixtures("nothing_is_left_in_shared_memory")


@on_ranks(1, 2, 3)
def check_works_in_flight_end_in_order() -> None:
    group, rank, R = new_group(), dist.get_rank(), dist.get_world_size()
    if rank == 0:
        come_late(0.2)
    x, ended = torch.ones(100_000), []
    started = time.monotonic()
    works = [dist.all_reduce(x, group=group, async_op=True) for _ in range(5)]
    assert rank == 0 or R == 1 or time.monotonic() - started < 0.15  # they return at once: rank 0 is not here yet
    for i, work in enumerate(works):
        work.get_future().then(lambda _, i=i: ended.append(i))
    # A call that waits comes after those that do not.
    y = x.clone()
    dist.all_reduce(x, group=group)
    assert all(work.is_completed() and work.wait() for work in works)
    assert ended == sorted(ended)
    assert torch.equal(x, torch.full_like(x, float(R**6))), y


@on_ranks(1, 2, 3)
def check_futures_have_the_outputs() -> None:
    group, rank, R = new_group(), dist.get_rank(), dist.get_world_size()
    x = torch.full((3,), float(rank))
    work = dist.all_reduce(x, group=group, async_op=True)
    doubled = work.get_future().then(lambda future: future.value()[0] * 2)
    assert torch.equal(doubled.wait(), torch.full((3,), float(R * (R - 1))))
    assert work.get_future().wait()[0].data_ptr() == x.data_ptr()
    assert work.result()[0].data_ptr() == x.data_ptr()


@on_ranks(1, 2, 3)
def check_an_error_is_that_of_its_work() -> None:
    group, rank, R = new_group(), dist.get_rank(), dist.get_world_size()
    if R == 1:
        return
    x, y = torch.ones(4 + (rank == 1)), torch.ones(3)
    wrong, right = (dist.all_reduce(t, group=group, async_op=True) for t in (x, y))
    assert "the ranks disagree" in raised(wrong.wait, RankMismatchError)
    assert "the ranks disagree" in raised(lambda: wrong.get_future().wait(), RuntimeError)
    right.wait()
    assert torch.equal(y, torch.full((3,), float(R)))


@on_ranks(1, 2, 3)
def check_a_callback_calls_the_next_collective() -> None:
    """While another one waits behind the one that it is of: what it calls comes after that."""
    group, rank, R = new_group(), dist.get_rank(), dist.get_world_size()
    x, y = torch.ones(5), torch.ones(6)

    def call_next(_: object = None) -> torch.Tensor:
        dist.all_reduce(y, group=group)
        return y

    if rank == 0:
        dist.barrier()  # gloo's: the others have made their calls, of which none can have ended
        dist.all_reduce(x, group=group)
        dist.all_reduce(x, group=group)
        call_next()
    else:
        first = dist.all_reduce(x, group=group, async_op=True)
        following = first.get_future().then(call_next)
        last = dist.all_reduce(x, group=group, async_op=True)
        dist.barrier()
        following.wait()
        last.wait()
    assert torch.equal(y, torch.full((6,), float(R)))
    assert torch.equal(x, torch.full((5,), float(R * R)))


@on_ranks(1, 2, 3)
def check_a_callback_waits_for_the_future_of_another_collective() -> None:
    """Of one that was called before it, and of its own calls, one inside the other, as the hook of PowerSGD does."""
    group, rank, R = new_group(), dist.get_rank(), dist.get_world_size()
    x, others = torch.ones(5), [torch.ones(6) for _ in range(4)]

    def call_all(depth: int) -> torch.Tensor:
        future = dist.all_reduce(others[depth], group=group, async_op=True).get_future()
        if depth + 1 < len(others):
            future = future.then(lambda _: call_all(depth + 1))
        future.wait()
        return x

    if rank == 0:
        dist.barrier()  # gloo's: the others have made their first calls, of which none can have ended
        for t in (x, x, *others):
            dist.all_reduce(t, group=group)
    else:
        first, second = (dist.all_reduce(x, group=group, async_op=True) for _ in range(2))
        waited = first.get_future().then(lambda _: second.get_future().wait())
        called = second.get_future().then(lambda _: call_all(0))
        dist.barrier()
        waited.wait()
        called.wait()
    for t, want in ((x, R * R), *((t, R) for t in others)):
        assert torch.equal(t, torch.full_like(t, float(want)))


@on_ranks(2)
def check_hooks_of_torch_that_chain_collectives() -> None:
    """PowerSGD's waits in callbacks; with gloo the parameters are the same."""
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

    found = []
    for group in (new_group(), dist.group.WORLD):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))
        parallel = nn.parallel.DistributedDataParallel(model, process_group=group)
        state = powerSGD_hook.PowerSGDState(group, matrix_approximation_rank=2, start_powerSGD_iter=2)
        parallel.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for step in range(4):
            optimizer.zero_grad()
            x = torch.randn(8, 16, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
            parallel(x).square().mean().backward()
            optimizer.step()
        found.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*found)


@on_ranks(1, 2, 3)
def check_who_waits_runs_what_has_not_begun() -> None:
    """Waiting for the last of several, for one with a limit, for one again."""
    group, R = new_group(), dist.get_world_size()
    for n in (1, 4000, 200_000):
        x = torch.ones(n)
        for _ in range(20):
            works = [dist.all_reduce(x, group=group, async_op=True) for _ in range(3)]
            works[2].wait()
            assert works[0].is_completed() and works[1].is_completed()
            works[0].wait(timedelta(seconds=20))
            x /= R**3
        dist.all_reduce(x, group=group, async_op=True).wait(timedelta(seconds=20))
        assert torch.equal(x, torch.full((n,), float(R)))


@on_ranks(1, 2, 3)
def check_functional_collectives() -> None:
    group, rank, R = new_group(), dist.get_rank(), dist.get_world_size()
    x = torch.full((2 * R, 3), float(rank + 1))
    total = R * (R + 1) / 2
    assert torch.equal(functional.all_reduce(x, "sum", group) + 0, torch.full_like(x, total))
    assert torch.equal(functional.all_gather_tensor(x[:1], 0, group)[:, 0] + 0, torch.arange(1.0, R + 1))
    assert torch.equal(functional.reduce_scatter_tensor(x, "avg", 0, group) + 0, torch.full((2, 3), total / R))
    every = functional.all_to_all_single(x, None, None, group) + 0
    assert torch.equal(every[::2, 0], torch.arange(1.0, R + 1))


@on_ranks(1, 2, 3)
def check_data_parallel_training() -> None:
    """DistributedDataParallel has the gradients of the whole batch, on all ranks alike."""
    group, rank, R = new_group(), dist.get_rank(), dist.get_world_size()
    torch.manual_seed(3)
    model, whole = nn.Linear(40, 30), nn.Linear(40, 30)
    whole.load_state_dict(model.state_dict())
    x = torch.randn(R, 5, 40)
    parallel = nn.parallel.DistributedDataParallel(model, process_group=group)
    parallel(x[rank]).square().mean().backward()
    whole(x.flatten(0, 1)).square().mean().backward()
    torch.testing.assert_close(model.weight.grad, whole.weight.grad)
    every = [torch.empty_like(model.weight) for _ in range(R)]
    dist.all_gather(every, model.weight.grad, group)
    assert all(torch.equal(one, every[0]) for one in every)


@on_ranks(1, 2, 3)
def check_objects_and_barriers() -> None:
    group, rank, R = new_group(), dist.get_rank(), dist.get_world_size()
    found: list[object] = [None] * R
    dist.all_gather_object(found, {"rank": rank, "text": "x" * rank}, group)
    assert found == [{"rank": r, "text": "x" * r} for r in range(R)]
    box = [rank * 7]
    dist.broadcast_object_list(box, R - 1, group)
    assert box == [(R - 1) * 7]
    assert dist.barrier(group, async_op=True).wait()
    dist.barrier(group)


@on_ranks(1, 2, 3)
def check_a_thread_calls_while_another_does() -> None:
    """Calls of two threads on two groups do not disturb each other."""
    group, other, R = new_group(), new_group(timeout_s=31.0), dist.get_world_size()
    failed: list[BaseException] = []

    def work() -> None:
        try:
            for i in range(100):
                x = torch.full((1000,), float(i))
                dist.all_reduce(x, group=other)
                assert torch.equal(x, torch.full_like(x, float(i * R)))
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    for i in range(100):
        x = torch.full((10_000,), float(i))
        dist.all_reduce(x, group=group, async_op=bool(i % 2) or None)
        dist.barrier(group)
        assert torch.equal(x, torch.full_like(x, float(i * R)))
    thread.join()
    assert not failed, failed


@on_processes(globals())
def test_works(run: Run) -> None:
    run_ranks(run.check, run.R)
