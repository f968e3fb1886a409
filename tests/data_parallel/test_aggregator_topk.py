"""Codec "topk": what is chosen, sent, kept and counted, against Deep Gradient Compression written out."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests.harness.aggregators import Bare, assert_same_bits, backward, gradient, grads
from tpkernels import ops
from tpkernels.comm.group import Group
from tpkernels.data_parallel import GradAggregator, OuterSGD, TopK
from tpkernels.data_parallel.sparse import largest
from tpkernels.testing import run_ranks

R_RANKS = pytest.mark.parametrize("R", [2, 3])


def by_hand(settings: TopK, R: int, steps: int, order: list[str]) -> list[tuple[Tensor, list[Tensor], list[Tensor]]]:
    """(mean, residuals, velocities) after each step, of all parameters in one bucket in this order."""
    names = dict(Bare().named_parameters())
    n = sum(names[name].numel() for name in order)
    u, v = ([torch.zeros(n) for _ in range(R)] for _ in range(2))
    seen = []
    for step in range(steps):
        mean = torch.zeros(n)
        for r in range(R):
            flat = torch.cat([gradient(name, names[name].shape, r, step).float().reshape(-1) for name in order]) / R
            u[r] = settings.momentum * u[r] + flat
            v[r] = v[r] + u[r]
            index = v[r].abs().sort(descending=True).indices[: settings.count(n, step)]
            # The op that packs has its own tests; ascending order or not, a block has one exponent.
            wire = ops.compress(v[r][index], "fp16")
            sent = ops.decompress(wire, index.shape, torch.float32, "fp16")
            mean[index] += sent
            v[r][index] -= sent
            u[r][index] = 0.0
        seen.append((mean, [x.clone() for x in v], [x.clone() for x in u]))
    return seen


def check_steps_are_those_of_the_algorithm() -> None:
    with Group.open() as group:
        for settings in (TopK(0.02), TopK(0.1, momentum=0.9), TopK(0.01, momentum=0.5, warmup_steps=3)):
            model = Bare()
            with GradAggregator(model, group=group, codec="topk", topk=settings, bucket_bytes=1 << 20) as aggregator:
                order = [n for n, _ in model.named_parameters()]
                want = None
                for step in range(4):
                    backward(model, group.rank, step)
                    aggregator.wait()
                    # The first step's bucket is in reverse order of registration; what is chosen does not depend on it.
                    want = want or by_hand(settings, group.world_size, 4, order)
                    mean, residuals, velocities = want[step]
                    got = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
                    near = {"rtol": 2.0**-10, "atol": 1e-6}  # the order of values decides which share an exponent
                    assert torch.allclose(got, mean, **near), (settings, step)
                    kept = aggregator.state_dict()["tensors"]
                    for kind, every in (("residual", residuals), ("velocity", velocities)):
                        if kind == "residual" or settings.momentum:
                            mine = torch.cat([kept[f"{kind}.{name}"].reshape(-1) for name in order])
                            scale = float(every[group.rank].abs().max())
                            assert (mine - every[group.rank]).abs().max() <= 2.0**-10 * scale, (settings, step, kind)
                    assert_same_bits(grads(model), group)
                    model.zero_grad()


def check_nothing_is_lost_but_delayed() -> None:
    """What was sent and what is kept add up to all gradients, to fp32 rounding."""
    with Group.open() as group:
        R, steps, model = group.world_size, 12, Bare()
        sent = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters()}
        with GradAggregator(model, group=group, codec="topk", bucket_bytes=4000) as aggregator:
            for step in range(steps):
                backward(model, group.rank, step)
                aggregator.wait()
                for name, p in model.named_parameters():
                    sent[name] += p.grad.double()
                    p.grad = None
            kept = aggregator.state_dict()["tensors"]
            for name, p in model.named_parameters():
                owed = ops.all_reduce(kept[f"residual.{name}"].double(), group=group)
                exact = sum(gradient(name, p.shape, r, s).float().double() for r in range(R) for s in range(steps)) / R
                assert ((sent[name] + owed - exact).abs() <= 1e-5 * (1 + exact.abs())).all(), name


def check_the_largest_changes_of_local_steps_travel() -> None:
    """Mode local: anchor -= mean of what is sent; what is not sent is added to the next difference."""
    with Group.open() as group:
        R, settings, model = group.world_size, TopK(0.05), Bare()
        options = {"mode": "local", "local_steps": 2, "outer": OuterSGD(1.0, 0.0), "bucket_bytes": 1 << 20}
        shapes = {name: p.shape for name, p in model.named_parameters()}
        anchor = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        owed = [torch.zeros_like(anchor) for _ in range(R)]
        with GradAggregator(model, group=group, codec="topk", topk=settings, **options) as aggregator:
            for step in range(6):
                for name, p in model.named_parameters():
                    p.data -= 0.1 * gradient(name, p.shape, group.rank, step)
                assert aggregator.after_step() == (step % 2 == 1)
                if step % 2 == 0:
                    continue
                mean = torch.zeros_like(anchor)
                for r in range(R):
                    moved = [sum(gradient(n, shapes[n], r, s) for s in (step - 1, step)).reshape(-1) for n in shapes]
                    owed[r] += 0.1 * torch.cat(moved) / R
                    index = owed[r].abs().topk(settings.count(anchor.numel(), 0)).indices
                    mean[index] += owed[r][index]
                    owed[r][index] = 0.0
                anchor -= mean
                got = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
                assert torch.allclose(got, anchor, rtol=2.0**-10, atol=1e-3 * float(mean.abs().max())), step
                assert_same_bits({n: p.detach() for n, p in model.named_parameters()}, group)
            sent = aggregator.stats()["by_op"]["all_gather"]["wire_bytes"]
            assert sent < 3 * (R - 1) * (settings.message_bytes(anchor.numel(), 0) + 64), "a message a round"


def check_bytes_are_those_of_the_formula() -> None:
    with Group.open() as group:
        model, settings = Bare(shapes={"w": (300, 100), "v": (50, 10)}), TopK(0.01, warmup_steps=2)
        with GradAggregator(model, group=group, codec="topk", topk=settings, bucket_bytes=4000) as aggregator:
            for step in range(3):
                sizes = [bucket.numel for bucket in aggregator._traffic.buckets]
                aggregator.reset_stats()
                backward(model, group.rank, step)
                aggregator.wait()
                model.zero_grad()
                sent = aggregator.stats()["by_op"]["all_gather"]["wire_bytes"]
                agreement = 4 * 2 * (group.world_size - 1) if step == 0 else 0  # on the order of the buckets
                want = (group.world_size - 1) * sum(settings.message_bytes(n, step) for n in sizes) + agreement
                assert sent == want, (step, sent, want)
            assert sent < 0.03 * 4 * sum(sizes) * (group.world_size - 1)


@R_RANKS
@pytest.mark.parametrize(
    "check",
    [
        check_steps_are_those_of_the_algorithm,
        check_nothing_is_lost_but_delayed,
        check_the_largest_changes_of_local_steps_travel,
        check_bytes_are_those_of_the_formula,
    ],
    ids=lambda check: check.__name__.removeprefix("check_"),
)
def test_the_largest_gradients_travel(check: Callable[[], None], R: int) -> None:
    run_ranks(check, R)


@pytest.mark.parametrize("n", [1, 7, 5000, 300_001])
@pytest.mark.parametrize("kind", ["normal", "wide", "equal", "mostly zero", "large ones between the samples"])
def test_exactly_the_k_largest_are_chosen(n: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, generator=generator)
    if kind == "wide":
        x = x * 10 ** (3 * torch.randn(n, generator=generator))
    elif kind == "equal":
        x = torch.ones(n)
    elif kind == "mostly zero":
        x[: n - n // 500] = 0.0
    elif kind == "large ones between the samples":
        x[1 :: max(2, n // (1 << 14))] *= 100.0
    for k in sorted({1, max(1, n // 1000), max(1, n // 100), max(1, n // 3), n}):
        index = largest(x, k)
        assert index.unique().numel() == k
        rest = torch.ones(n, dtype=torch.bool)
        rest[index] = False
        assert not rest.any() or float(x[index].abs().min()) >= float(x[rest].abs().max())


def test_the_share_falls_from_a_quarter_to_the_ratio() -> None:
    counts = [TopK(0.01, warmup_steps=4).count(100_000, step) for step in range(6)]
    assert counts[0] == 25_000
    assert counts[4:] == [1000, 1000]
    ratios = [a / b for a, b in pairwise(counts[:5])]
    assert max(ratios) - min(ratios) < 0.01, "exponentially"
    assert TopK(0.001).count(10, 0) == 1
    assert TopK(0.5, warmup_steps=4).count(10, 0) == 5


def test_settings_say_what_came() -> None:
    for settings, text in (
        ({"ratio": 0.0}, r"ratio must be in \(0, 1\], got 0.0"),
        ({"ratio": 1.5}, r"ratio must be in \(0, 1\], got 1.5"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"warmup_steps": -1}, "warmup_steps must be a whole number, 0 or more, got -1"),
    ):
        with pytest.raises(ValueError, match=text):
            TopK(**settings)
