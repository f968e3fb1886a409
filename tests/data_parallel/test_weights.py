"""Replicas that count by their tokens, sums in the place of averages, replicas that run out of batches, loss scales."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tests.harness.ops import raised
from tpkernels.comm.group import Group
from tpkernels.data_parallel import GradAggregator, TopK, comm_hook, replicas_agree
from tpkernels.testing import run_ranks
from tpkernels.testing.case import CODEC_FLOOR, CODEC_ROUNDING

TOKENS = [[512.0, 3.0, 100.0], [0.0, 77.0, 1e4], [1.0, 1.0, 0.0], [5.0, 0.0, 0.0]]
"""By step, then by rank."""


class Net(nn.Module):
    """Two layers; `forward` returns a loss."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 24, dtype=dtype), nn.Linear(24, 3, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        loss: Tensor = self.second(torch.tanh(self.first(x.to(self.first.weight.dtype)))).square().mean()
        return loss


def data(step: int, rank: int) -> Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(100 * step + rank), dtype=torch.float64)


def combined(
    model: nn.Module, step: int, weights: list[float], reduce: str, before: float = 0.0
) -> tuple[list[Tensor], float]:
    """Of the gradients of all ranks, in fp64; and the largest value that any has sent, `before` among them.

    What packing lost of a step of large weights comes with the next, be its weights small or not.
    """
    wide = Net(torch.float64)
    wide.load_state_dict(model.state_dict())
    found, largest = [torch.zeros_like(p) for p in wide.parameters()], before
    by = sum(weights) if reduce == "mean" else 1.0
    for rank, weight in enumerate(weights):
        gradients = torch.autograd.grad(wide(data(step, rank)), list(wide.parameters()))
        for total, gradient in zip(found, gradients, strict=True):
            total += gradient * (weight / by)
            largest = max(largest, float(gradient.abs().max()) * weight / by * len(weights))
    return found, largest


def assert_combined(model: nn.Module, want: tuple[list[Tensor], float], codec: str, what: Any) -> None:
    lost = 0.0 if codec == "none" else CODEC_ROUNDING[codec] + CODEC_FLOOR[codec]
    for p, exact in zip(model.parameters(), want[0], strict=True):
        assert p.grad is not None
        got = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        error, bound = float((got - exact).abs().max()), (4 * lost + 64 * torch.finfo(torch.float32).eps) * want[1]
        assert error <= bound, f"{what}: off by {error}, bound {bound}"


def aggregators_weigh() -> None:
    with Group.open() as group:
        R, rank = group.world_size, group.rank
        options = itertools.product(("none", "fp16", "int8"), (True, False), ("sync", "delayed"), ("mean", "sum"))
        for codec, error_feedback, mode, reduce in options:
            what, model = (codec, error_feedback, mode, reduce), Net()
            with GradAggregator(
                model, group=group, codec=codec, error_feedback=error_feedback, mode=mode, reduce=reduce,
                warmup_steps=1, bucket_bytes=200,
            ) as aggregator:  # fmt: skip
                wants: list[tuple[list[Tensor], float]] = []
                for step, weights in enumerate(TOKENS):
                    model.zero_grad()
                    aggregator.weigh(torch.tensor(weights[rank]) if step else weights[rank])
                    if weights[rank] or step == 1:  # a weight of 0 with gradients, and without
                        with aggregator.no_sync():
                            (model(data(step, rank)) / 2).backward()
                        (model(data(step, rank)) / 2).backward()
                    wants.append(combined(model, step, weights[:R], reduce, wants[-1][1] if wants else 0.0))
                    if aggregator.wait():
                        assert_combined(model, wants[-1 if mode == "sync" or step == 0 else -2], codec, (*what, step))
                        assert replicas_agree(nn.ParameterList([p.grad for p in model.parameters()]), group=group)
                if aggregator.drain():
                    assert_combined(model, wants[-1], codec, what)


def topk_and_fp64_weigh() -> None:
    with Group.open() as group:
        for codec, dtype in (("topk", torch.float32), ("none", torch.float64)):
            model = Net(dtype)
            with GradAggregator(model, group=group, codec=codec, topk=TopK(ratio=1.0)) as aggregator:
                aggregator.weigh(TOKENS[0][group.rank])
                model(data(0, group.rank)).backward()
                aggregator.wait()
                want, largest = combined(model, 0, TOKENS[0][: group.world_size], "mean")
                for p, exact in zip(model.parameters(), want, strict=True):
                    assert p.grad is not None
                    bound = 1e-12 if dtype == torch.float64 else 2 * CODEC_ROUNDING["fp16"] + CODEC_FLOOR["fp16"]
                    assert float((p.grad - exact).abs().max()) <= bound * largest


def nothing_is_lost_by_weights() -> None:
    """What was applied in 40 steps, and what residuals still hold, is the sum of the true averages."""
    with Group.open() as group:
        R, rank = group.world_size, group.rank
        for reduce in ("mean", "sum"):
            model = nn.Linear(32, 1, bias=False)
            nn.init.zeros_(model.weight)
            options: dict[str, Any] = {"group": group, "codec": "int8", "reduce": reduce}
            with GradAggregator(model, **options) as aggregator:
                ddp = DistributedDataParallel(copy.deepcopy(model))
                hook = comm_hook("int8", group=group, reduce=reduce)
                hook.register(ddp)
                applied, by_hook, true = (torch.zeros(1, 32, dtype=torch.float64) for _ in range(3))
                for step in range(40):
                    weights = [1.0 + (7 * step + 3 * r) % 5 for r in range(R)]
                    xs = [torch.randn(1, 32, generator=torch.Generator().manual_seed(R * step + r)) for r in range(R)]
                    for one in (model, ddp):
                        one.zero_grad()
                        (aggregator if one is model else hook).weigh(weights[rank])
                        one(xs[rank]).sum().backward()
                    aggregator.wait()
                    assert model.weight.grad is not None
                    applied += model.weight.grad
                    by_hook += ddp.module.weight.grad
                    by = sum(weights) if reduce == "mean" else 1.0
                    true += sum(w / by * x.double() for w, x in zip(weights, xs, strict=True))
                kept = [aggregator.state_dict()["tensors"]["residual.weight"]]
                kept.append(hook.state_dict(ddp)["residual.weight"])
                for done, residual in zip((applied, by_hook), kept, strict=True):
                    every = [torch.empty_like(residual) for _ in range(R)]
                    dist.all_gather(every, residual)
                    owed = sum(e.double() for e in every) * (R if reduce == "sum" else 1)
                    assert float((done + owed - true).abs().max()) <= 1e-4 * float(true.abs().max())
                hook.close()


def hooks_weigh() -> None:
    R, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh("cpu", (R,))
    for codec, error_feedback, reduce in itertools.product(("none", "fp16", "int8"), (True, False), ("mean", "sum")):
        hook = comm_hook(codec, error_feedback, reduce=reduce)
        ddp = DistributedDataParallel(Net(), bucket_cap_mb=1e-4)
        sharded: Any = Net()
        for module in (sharded.first, sharded):
            fully_shard(module, mesh=mesh)
        for model in (ddp, sharded):
            hook.register(model)
            largest = 0.0
            for step, weights in enumerate(TOKENS[:3]):
                model.zero_grad()
                hook.weigh(weights[rank])
                model(data(step, rank)).backward()
                want = combined(Net(), step, weights[:R], reduce, largest)
                largest = want[1]
                assert_combined(model, want, codec, (codec, error_feedback, reduce, step, type(model).__name__))
        hook.close()


def a_loss_scale_that_changes_moves_residuals_along() -> None:
    """Scales are powers of two, and fp16 keeps one exponent for a block: the bits are those without a scale."""
    rank, runs = dist.get_rank(), {}
    for scales in ((1.0, 1.0, 1.0), (1024.0, 4.0, 2.0**15)):
        hook, ddp = comm_hook("fp16"), DistributedDataParallel(Net(), bucket_cap_mb=1e-4)
        hook.register(ddp)
        found = []
        for step, scale in enumerate(scales):
            ddp.zero_grad()
            hook.set_loss_scale(scale)
            (ddp(data(step, rank)) * scale).backward()
            found.append([p.grad / scale for p in ddp.parameters() if p.grad is not None])
        state = hook.state_dict(ddp)
        hook.load_state_dict(state, ddp)
        assert all(torch.equal(kept, hook.state_dict(ddp)[name]) for name, kept in state.items())
        runs[scales[0]] = found, state
        with pytest.raises(ValueError, match="set_loss_scale: scale must be finite and above 0, got 0"):
            hook.set_loss_scale(0.0)
        hook.close()
    (plain, kept), (scaled, also) = runs.values()
    assert all(torch.equal(a, b) for x, y in zip(plain, scaled, strict=True) for a, b in zip(x, y, strict=True))
    assert all(torch.equal(kept[name], also[name]) for name in kept)


def replicas_that_run_out_join_in() -> None:
    with Group.open() as group:
        R, rank = group.world_size, group.rank
        counts = [3, 5, 1][:R]
        whole, model = Net(torch.float64), Net(torch.float64)
        optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (model, whole)]
        with GradAggregator(model, group=group, codec="none") as aggregator:
            for epoch in range(2):
                turns = 0
                for batch in aggregator.join(data(10 * epoch + i, rank) for i in range(counts[rank])):
                    assert (batch is None) == (turns >= counts[rank])
                    if batch is not None:
                        model(batch).backward()
                    assert aggregator.step(optimizers[0])
                    there = [r for r in range(R) if turns < counts[r]]
                    for r in there:
                        (whole(data(10 * epoch + turns, r)) / len(there)).backward()
                    optimizers[1].step()
                    optimizers[1].zero_grad()
                    turns += 1
                assert turns == max(counts)
            for p, q in zip(model.parameters(), whole.parameters(), strict=True):
                torch.testing.assert_close(p, q)
            assert replicas_agree(model, group=group)
        for mode, codec in (("delayed", "fp16"), ("local", "fp16"), ("delayed", "topk")):
            model = Net()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            options: dict[str, Any] = {"mode": mode, "codec": codec, "warmup_steps": 1, "local_steps": 2}
            with GradAggregator(model, group=group, **options) as aggregator:
                for batch in aggregator.join(data(i, rank) for i in range(counts[rank])):
                    if batch is not None:
                        model(batch).backward()
                    aggregator.step(optimizer)
                if aggregator.drain():
                    optimizer.step()
                assert replicas_agree(model, group=group), mode


def ddp_join_goes_through_the_hook() -> None:
    R, rank = dist.get_world_size(), dist.get_rank()
    hook, ddp = comm_hook("none"), DistributedDataParallel(Net())
    hook.register(ddp)
    with ddp.join():
        for step in range(2 + rank):
            ddp.zero_grad()
            ddp(data(step, rank)).backward()
            want, largest = combined(Net(), step, [float(step < 2 + r) for r in range(R)], "sum")
            assert_combined(ddp.module, ([total / R for total in want], largest), "none", step)
    hook.close()


def wrong_weights_are_refused() -> None:
    with Group.open() as group:
        assert "reduce must be one of 'mean', 'sum', got 'max'" in raised(
            lambda: GradAggregator(Net(), group=group, reduce="max"), ValueError
        )
        assert "comm_hook: reduce must be one of" in raised(lambda: comm_hook("none", reduce="max"), ValueError)
        assert "'mean' in mode 'local'" in raised(
            lambda: GradAggregator(Net(), group=group, reduce="sum", mode="local"), ValueError
        )
        with GradAggregator(Net(), group=group, mode="local") as local:
            assert "mode must be 'sync' or 'delayed'" in raised(lambda: local.weigh(1.0), RuntimeError)
        model = Net()
        with GradAggregator(model, group=group) as aggregator:
            for weight in (-1.0, math.nan, math.inf):
                assert "finite and 0 or more" in raised(lambda weight=weight: aggregator.weigh(weight), ValueError)
            aggregator.weigh(0.0)
            text = raised(lambda: model(data(0, 0)).backward(), ValueError)
            assert f"got 0 on all {group.world_size} ranks" in text
            aggregator.weigh(1.0)
            model(data(0, 0)).backward()
            assert "between steps" in raised(lambda: aggregator.weigh(2.0), RuntimeError)
            aggregator.wait()


@pytest.mark.parametrize("R", [2, 3])
@pytest.mark.parametrize(
    "check",
    [
        aggregators_weigh,
        topk_and_fp64_weigh,
        nothing_is_lost_by_weights,
        hooks_weigh,
        a_loss_scale_that_changes_moves_residuals_along,
        replicas_that_run_out_join_in,
        ddp_join_goes_through_the_hook,
        wrong_weights_are_refused,
    ],
)
def test_replicas_count_as_they_say(check: Callable[[], None], R: int) -> None:
    run_ranks(check, R)
