"""What gradient aggregation refuses, and ranks that differ, stay away or die: an error that names them, in time."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.harness.aggregators import Bare, assert_averaged, assert_same_bits, backward, grads, values
from tests.harness.ops import raised
from tpkernels.comm.group import Group
from tpkernels.data_parallel import GradAggregator, OuterSGD, TopK
from tpkernels.data_parallel.lane import open_lane
from tpkernels.errors import PeerLostError
from tpkernels.testing import run_ranks, run_ranks_outcomes
from tpkernels.testing.faults import kill_myself

pytestmark = pytest.mark.usefixtures("nothing_is_left_in_shared_memory")


def test_bad_arguments_say_what_came() -> None:
    with Group.open() as group:
        frozen, sparse = nn.Linear(2, 2).requires_grad_(False), nn.Sequential(nn.Embedding(4, 2, sparse=True))
        complex_one = nn.Module()
        complex_one.w = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
        for model, options, kind, text in (
            (Bare(), {"codec": "fp15"}, ValueError, "codec must be one of 'none', .*'topk', got 'fp15'"),
            (Bare(), {"mode": "async"}, ValueError, "mode must be one of 'sync', 'delayed', 'local', got 'async'"),
            (
                Bare(),
                {"codec": "topk", "mode": "local", "topk": TopK(momentum=0.9)},
                ValueError,
                "topk must have momentum 0 in mode 'local', whose outer optimizer has its own, got 0.9",
            ),
            (Bare(), {"bucket_bytes": 0}, ValueError, "bucket_bytes must be 1 or more, got 0"),
            (Bare(), {"local_steps": 1.5}, TypeError, "local_steps must be an int, got float"),
            (Bare(), {"warmup_steps": -1}, ValueError, "warmup_steps must be 0 or more, got -1"),
            (
                Bare(),
                {"gradient_dtype": torch.float64},
                ValueError,
                "gradient_dtype must be None or torch.float32, got",
            ),
            ([torch.zeros(1)], {}, TypeError, "model must be a torch.nn.Module, got list"),
            (frozen, {}, ValueError, "must have a parameter that requires a gradient, got none"),
            (sparse, {}, ValueError, "gradients must be dense, got '0' with sparse=True"),
            (complex_one, {}, ValueError, "parameter 'w' must have a dtype of float32, .*, got complex64"),
            (
                Bare(torch.float64),
                {},
                ValueError,
                "'fp16' needs a dtype of float32, .* got float64 of parameter 'table'",
            ),
            (Bare(torch.float64), {"codec": "topk"}, ValueError, "'topk' needs a dtype of .* got float64"),
            (nn.Linear(2, 2, device="meta"), {}, ValueError, "parameter 'weight' must be on cpu, .* got device meta"),
            (nn.LazyLinear(2), {}, ValueError, "parameter 'weight' has no shape yet"),
        ):
            with pytest.raises(kind, match=text):
                GradAggregator(model, group=group, **options)
        for settings in ({"lr": 0.0}, {"momentum": 1.0}):
            with pytest.raises(ValueError, match=r"OuterSGD: \w+ must be"):
                OuterSGD(**settings)


def check_ranks_that_differ_are_named_at_the_start() -> None:
    with Group.open() as group:
        last = group.world_size - 1
        mine = group.rank == last

        def refused(model: nn.Module, **options: object) -> str:
            return raised(lambda: GradAggregator(model, group=group, **options), ValueError)

        text = refused(Bare(), codec="bf16" if mine else "fp16")
        assert (
            f"codec must be the same on all ranks of group 'world', got 'fp16' on rank 0 and 'bf16' on rank {last}"
            in text
        )
        shapes = {"table": (40, 30), "inner": (70, 50 + mine)}
        text = refused(Bare(shapes=shapes))
        assert (
            f"'inner' (float32, shape [70, 50]) on rank 0 and 'inner' (float32, shape [70, 51]) on rank {last}" in text
        )
        text = refused(Bare(shapes=dict(list(shapes.items())[: 2 - mine])))
        assert f"number 1 is 'inner' (float32, shape [70, 50]) on rank 0 and missing on rank {last}" in text
        model = Bare()
        if mine:
            model.inner.data[3, 4] = torch.nextafter(model.inner.data[3, 4], torch.tensor(9.0))
        assert f"'inner' differs on ranks [{last}]; pass sync_parameters=True" in refused(model)
        model.bias.data += group.rank
        model.scalar.data.fill_(-0.0 if group.rank == 0 else 1.0)
        with GradAggregator(model, group=group, sync_parameters=True):
            assert_same_bits(values(model), group)
            assert torch.equal(model.bias, Bare().bias)
            assert str(model.scalar.item()) == "-0.0"


def check_misuse_is_an_error_and_nothing_is_lost() -> None:
    with Group.open() as group:
        model = Bare()
        with GradAggregator(model, group=group, codec="none", bucket_bytes=4000) as aggregator:
            assert f"rank {group.rank} of group 'world' has had no gradient since" in raised(
                aggregator.wait, RuntimeError
            )
            backward(model, group.rank, 0)
            text = raised(lambda: backward(model, group.rank, 1), RuntimeError)
            assert re.search(
                r"parameter '\w+' got a gradient after that of this step was sent; put all .* no_sync\(\), "
                r"and call wait\(\) after each step, also after one whose backward pass failed",
                text,
            )
            with aggregator.no_sync():  # which comes before the pass that sends, not after it
                assert "after that of this step was sent" in raised(lambda: backward(model, 0, 1), RuntimeError)
            aggregator.wait()  # the first pass was sent and is not lost
            assert_averaged(model, group.world_size, "none")
            model.zero_grad()
            assert "mode must be 'local'" in raised(aggregator.restore_parameters, RuntimeError)

            model.inner.requires_grad_(False)
            model.added = nn.Parameter(torch.zeros(2))
            backward(model, group.rank, 0, lambda name: name != "added")
            text = raised(aggregator.wait, RuntimeError)
            assert "have changed since it was made: new ['added'], gone or frozen ['inner']" in text
            model.inner.requires_grad_(True)
            del model.added
            aggregator.wait()  # and goes on as if nothing had been
            assert model.inner.grad is None
            assert model.table.grad is not None
            model.zero_grad()

            weight = model.table
            loss = nn.functional.embedding(torch.tensor([1, 2]), weight, sparse=True).sum()
            text = raised(loss.backward, ValueError)
            assert "must be dense, got layout torch.sparse_coo for parameter 'table'" in text
        assert "is closed" in raised(aggregator.wait, RuntimeError)


def unscale(model: nn.Module, scaler: torch.amp.GradScaler) -> None:
    scaler.unscale_(torch.optim.SGD(model.parameters(), lr=0.1))


def clip_one(model: nn.Module, scaler: torch.amp.GradScaler) -> None:
    assert model.outer.grad is not None
    torch.nn.utils.clip_grad_norm_([model.outer], 1e-3)


def replace(model: nn.Module, scaler: torch.amp.GradScaler) -> None:
    model.outer.grad = torch.zeros_like(model.outer)


def check_gradients_that_change_after_they_were_sent_are_an_error() -> None:
    with Group.open() as group:
        for mode, zero in (("sync", 0), ("delayed", 0), ("sync", 1)):
            for change in (unscale, clip_one, replace):
                model, scaler = Bare(), torch.amp.GradScaler("cpu", init_scale=4.0)
                with GradAggregator(model, group=group, codec="none", mode=mode, zero=zero) as aggregator:
                    backward(model, group.rank, 0, scaler=scaler)
                    change(model, scaler)
                    mine = grads(model)
                    text = raised(aggregator.wait, RuntimeError)
                    assert "the gradient was changed after the backward pass had sent it" in text
                    assert "outer" in text or change is unscale, text
                    assert all(p.grad is mine[name] for name, p in model.named_parameters())
                    model.zero_grad()
                    for _ in range(2):  # and goes on; averages of one message share the counter of changes
                        backward(model, group.rank, 0)
                        aggregator.wait()
        model = Bare()
        with GradAggregator(model, group=group, codec="none") as aggregator:
            for name, p in model.named_parameters():  # freed by another hook: nothing is lost
                if name == "inner":
                    p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
            backward(model, group.rank, 0)
            aggregator.wait()
            assert_averaged(model, group.world_size, "none")


def check_a_parameter_that_is_not_finite_is_not_spread() -> None:
    with Group.open() as group:
        model = Bare()
        with GradAggregator(model, group=group, mode="local", local_steps=2, outer=OuterSGD(1.0, 0.0)) as aggregator:
            with torch.no_grad():
                model.bias += 1.0 + group.rank
            assert not aggregator.after_step()
            if group.rank == 1:
                model.inner.data[0, 0] = torch.nan
            before = values(model)
            text = raised(aggregator.after_step, RuntimeError)
            assert "a parameter is not finite after 2 local steps (rank 1: 'inner')" in text
            assert all(torch.equal(p.nan_to_num(), before[n].nan_to_num()) for n, p in model.named_parameters())
            if group.rank == 1:
                aggregator.restore_parameters()
                assert torch.equal(model.bias, Bare().bias)
            aggregator.drain()  # rank 1 brings no change, the others theirs
            R = group.world_size
            want = Bare().bias + sum(1.0 + r for r in range(R) if r != 1) / R
            assert torch.allclose(model.bias, want, atol=4e-3)
            assert_same_bits(values(model), group)


@pytest.mark.parametrize("R", [2, 3])
@pytest.mark.parametrize(
    "check",
    [
        check_ranks_that_differ_are_named_at_the_start,
        check_misuse_is_an_error_and_nothing_is_lost,
        check_gradients_that_change_after_they_were_sent_are_an_error,
        check_a_parameter_that_is_not_finite_is_not_spread,
    ],
    ids=lambda check: check.__name__.removeprefix("check_"),
)
def test_what_cannot_be_right_is_an_error(check: Callable[[], None], R: int) -> None:
    run_ranks(check, R)


def check_a_rank_that_skips_its_backward_pass(transport: str) -> None:
    with Group.open(timeout_s=0.5, transport=transport) as group:
        model = Bare()
        aggregator = GradAggregator(model, group=group, bucket_bytes=4000)
        backward(model, group.rank, 0)
        aggregator.wait()
        model.zero_grad()
        group.barrier()
        if group.rank != 1:
            backward(model, group.rank, 1)
            mine = {name: p.grad.clone() for name, p in model.named_parameters()}
            text = raised(aggregator.wait, TimeoutError)
            # Whoever waits second may hear of it from the first to give up, in its words.
            assert re.search(r"ranks? \[?1\]? did not (signal|come)", text), text
            assert all(torch.equal(p.grad, mine[name]) for name, p in model.named_parameters()), "still the local ones"
            # What comes after says the same, at once.
            assert raised(lambda: backward(model, group.rank, 1), TimeoutError) == text
        dist.barrier()  # rank 1 is there all the time
        aggregator.close()


@pytest.mark.parametrize("transport", ["shm", "group"])
def test_a_rank_that_skips_its_backward_pass_is_named(transport: str) -> None:
    run_ranks(check_a_rank_that_skips_its_backward_pass, 3, transport, fresh=True)


def a_rank_dies_in_its_backward_pass(transport: str) -> tuple[str, str, float]:
    group = Group.open(transport=transport)
    model = Bare()
    aggregator = GradAggregator(model, group=group, bucket_bytes=4000)
    start = time.monotonic()
    for step in range(3):
        if step == 2 and group.rank == 1:
            model.bias.register_hook(lambda gradient: kill_myself())  # between two of its messages
        try:
            backward(model, group.rank, step)
            aggregator.wait()
        except PeerLostError as error:
            aggregator.close()
            return type(error).__name__, str(error), time.monotonic() - start
        model.zero_grad()
    return "", "", 0.0


@pytest.mark.parametrize("transport", ["shm", "group"])
def test_a_killed_rank_is_named_by_the_others(transport: str) -> None:
    outcomes = run_ranks_outcomes(a_rank_dies_in_its_backward_pass, 3, transport)
    assert outcomes[1].exitcode == -9
    for rank in (0, 2):
        assert outcomes[rank].finished, outcomes[rank].error
        kind, text, seconds = outcomes[rank].value
        assert kind == "PeerLostError"
        assert re.search(r"rank 1|ranks \[1\]", text), text
        assert seconds < 20.0, "long before the timeout of 30 s"


def check_python_runs_while_the_lane_waits(transport: str) -> None:
    """Rank 0's job waits for rank 1, which waits for a message that rank 0's Python sends afterwards."""
    with Group.open(transport=transport, timeout_s=20.0) as group:
        lane = open_lane(group)
        for x in (torch.ones(8), torch.ones(200_000), torch.ones(2, 50).t()):  # the fast path, the kernel, strided
            from tpkernels import ops

            def job(x: torch.Tensor = x) -> torch.Tensor:
                return ops.all_reduce(x, group=lane.group)

            if group.rank == 0:
                future = lane.submit(job)
            group.barrier()
            if group.rank != 0:
                future = lane.submit(job)
            assert torch.equal(future.wait(), x * group.world_size)
        failing = lane.submit(lambda: 1 // 0)
        raised(failing.wait, ZeroDivisionError)
        assert "division" in raised(lambda: lane.submit(lambda: 1), ZeroDivisionError), "nothing runs after a failure"
        lane.close()
        lane.close()


@pytest.mark.parametrize("transport", ["shm", "group"])
def test_python_runs_while_the_lane_waits(transport: str) -> None:
    run_ranks(check_python_runs_while_the_lane_waits, 2, transport)


def four_ranks_on_two_cores() -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    with Group.open() as group:
        models = [Bare(), Bare()]
        aggregators = [
            GradAggregator(m, group=group, codec=c, bucket_bytes=2000)
            for m, c in zip(models, ("fp16", "topk"), strict=True)
        ]
        for step in range(10):
            for model, aggregator in zip(models, aggregators, strict=True):
                backward(model, group.rank, step)
                aggregator.wait()
                assert_same_bits({n: p.grad for n, p in model.named_parameters()}, group)
                model.zero_grad()
        for aggregator in aggregators:
            aggregator.close()


def test_more_ranks_than_cores() -> None:
    run_ranks(four_ranks_on_two_cores, 4, fresh=True)
