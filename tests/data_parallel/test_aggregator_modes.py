"""Modes delayed and local against the plain programs they are, and what is saved of every mode."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from tests.harness.aggregators import Bare, assert_same_bits, average, backward, grads, values
from tpkernels.comm.group import Group
from tpkernels.data_parallel import AggregatorState, GradAggregator, OuterSGD, TopK, reshard_state
from tpkernels.testing import run_ranks

F64 = torch.float64
SGD = {"lr": 0.05, "momentum": 0.9}


def net(dtype: torch.dtype = F64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 3)).to(dtype)


def loss(model: nn.Module, rank: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * rank + step)
    p = next(model.parameters())
    return (model(torch.randn(5, 12, generator=generator, dtype=F64).to(p.dtype)) - 1.0).pow(2).mean()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), **SGD)


def mean_gradients(model: nn.Module, R: int, step: int) -> list[Tensor]:
    every = [torch.autograd.grad(loss(model, rank, step), list(model.parameters())) for rank in range(R)]
    return [torch.stack(found).sum(0) / R for found in zip(*every, strict=True)]


def apply(model: nn.Module, optimizer: torch.optim.Optimizer, gradients: list[Tensor]) -> None:
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        p.grad = gradient
    optimizer.step()


def delayed_by_hand(R: int, steps: int, warmup: int) -> nn.Module:
    model = net()
    optimizer, pending = optimizer_of(model), None
    for step in range(steps):
        now = mean_gradients(model, R, step)
        if step < warmup:
            apply(model, optimizer, now)
            continue
        if pending is not None:
            apply(model, optimizer, pending)
        pending = now
    if pending is not None:
        apply(model, optimizer, pending)
    return model


def local_by_hand(R: int, steps: int, H: int, outer: OuterSGD) -> list[Tensor]:
    models = [net() for _ in range(R)]
    optimizers = [optimizer_of(model) for model in models]
    anchor = [p.detach().clone() for p in models[0].parameters()]
    momentum = [torch.zeros_like(p) for p in anchor]
    for step in range(steps):
        for rank, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            optimizer.zero_grad()
            loss(model, rank, step).backward()
            optimizer.step()
        if (step + 1) % H == 0 or step + 1 == steps:
            for i, a in enumerate(anchor):
                delta = torch.stack([a - list(m.parameters())[i].detach() for m in models]).sum(0) / R
                momentum[i] = outer.momentum * momentum[i] + delta
                a -= outer.lr * (delta + outer.momentum * momentum[i] if outer.nesterov else momentum[i])
                for m in models:
                    list(m.parameters())[i].data.copy_(a)
    return anchor


def check_delayed_is_the_plain_program_with_a_staleness_of_one() -> None:
    with Group.open() as group:
        for warmup in (0, 1, 3):
            model = net()
            optimizer = optimizer_of(model)
            options = {"codec": "none", "mode": "delayed", "warmup_steps": warmup, "bucket_bytes": 2000}
            with GradAggregator(model, group=group, **options) as aggregator:
                applied = []
                for step in range(7):
                    loss(model, group.rank, step).backward()
                    applied.append(aggregator.step(optimizer))
                assert applied == [step != warmup for step in range(7)]
                assert aggregator.drain()
                optimizer.step()
                assert not aggregator.drain()
            want = dict(delayed_by_hand(group.world_size, 7, warmup).named_parameters())
            for name, p in model.named_parameters():
                assert torch.allclose(p, want[name], rtol=1e-12, atol=1e-14), (warmup, name)
            assert_same_bits(values(model), group)


def check_local_is_the_plain_program_of_an_outer_optimizer() -> None:
    with Group.open() as group:
        for outer in (OuterSGD(1.0, 0.0), OuterSGD(), OuterSGD(0.5, 0.8, nesterov=False)):
            model = net()
            optimizer = optimizer_of(model)
            options = {"codec": "none", "mode": "local", "local_steps": 3, "outer": outer, "bucket_bytes": 2000}
            with GradAggregator(model, group=group, **options) as aggregator:
                averaged = []
                for step in range(7):
                    loss(model, group.rank, step).backward()
                    assert aggregator.wait()
                    optimizer.step()
                    averaged.append(aggregator.after_step())
                    optimizer.zero_grad()
                assert averaged == [False, False, True] * 2 + [False]
                calls = aggregator.stats()["calls"]
                assert not aggregator.drain()
                assert aggregator.stats()["calls"] > calls
            want = local_by_hand(group.world_size, 7, 3, outer)
            for p, wanted in zip(model.parameters(), want, strict=True):
                assert torch.allclose(p, wanted, rtol=1e-11, atol=1e-13), outer
            assert_same_bits(values(model), group)


def check_local_packs_differences_and_keeps_fp32_anchors_of_bf16() -> None:
    with Group.open() as group:
        model = net(torch.bfloat16)
        options = {"codec": "fp16", "mode": "local", "local_steps": 1, "outer": OuterSGD(1.0, 0.0)}
        with GradAggregator(model, group=group, **options) as agg:
            before = values(model)
            with torch.no_grad():
                for p in model.parameters():
                    p += 2.0**-9 * p.abs().max() * (group.rank == 0)
            assert agg.after_step()
            kept = agg.state_dict()["tensors"]
            assert {t.dtype for t in kept.values()} == {torch.float32}
            for name, p in model.named_parameters():
                # What bf16 rounds away of the average stays in the anchor.
                assert torch.equal(p, kept[f"anchor.{name}"].to(torch.bfloat16))
                assert not torch.equal(kept[f"anchor.{name}"], before[name].float())
            least = 2 * (group.world_size - 1) / group.world_size * 2 * sum(p.numel() for p in model.parameters())
            assert agg.stats()["wire_bytes"] < 1.2 * least


def check_a_changed_loss_scale_changes_nothing_else() -> None:
    """Powers of two: the same bits whatever the scale, residuals and the average in flight included."""
    with Group.open() as group:
        ends = []
        for scales in ([1.0] * 5, [4.0, 4.0, 2.0, 64.0, 64.0]):
            model, seen = Bare(), []
            options = {"codec": "topk", "mode": "delayed", "warmup_steps": 1, "topk": TopK(0.1, momentum=0.5)}
            with GradAggregator(model, group=group, **options) as aggregator:
                for step, scale in enumerate(scales):
                    aggregator.set_loss_scale(scale)
                    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
                    backward(model, group.rank, step, scaler=scaler)
                    if aggregator.wait():
                        seen += [p.grad / scale for p in model.parameters()]
                    model.zero_grad()
            ends.append(seen)
        assert len(ends[0]) == 4 * 6
        assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
        with GradAggregator(Bare(), group=group) as aggregator:
            for scale in (0.0, -1.0, math.inf, math.nan):
                with pytest.raises(ValueError, match="set_loss_scale: scale must be finite and above 0, got"):
                    aggregator.set_loss_scale(scale)


WAYS: list[dict[str, Any]] = [
    {"codec": "topk", "mode": "local", "local_steps": 2, "topk": TopK(0.1)},
    {"codec": "none"},
    {"codec": "fp16"},
    {"codec": "topk", "topk": TopK(0.05, momentum=0.9, warmup_steps=4)},
    {"codec": "bf16", "mode": "delayed", "warmup_steps": 1},
    {"codec": "topk", "mode": "delayed", "warmup_steps": 0},
    {"codec": "fp16", "mode": "local", "local_steps": 2},
]


def train(model: nn.Module, aggregator: GradAggregator, optimizer: Any, rank: int, steps: range) -> None:
    for step in steps:
        loss(model, rank, step).backward()
        aggregator.step(optimizer)


def check_a_resumed_run_has_the_same_bits() -> None:
    """Six steps at once, and three, saved as files would hold them, loaded into new objects, and three more."""
    with Group.open() as group:
        for way in WAYS:
            ends = []
            for parts in ([range(6)], [range(3), range(3, 6)]):
                model = net(torch.float32)
                optimizer, saved = optimizer_of(model), None
                for steps in parts:
                    options = way | {"bucket_bytes": 1500, "check_parameters": steps.start == 0}
                    with GradAggregator(model, group=group, **options) as aggregator:
                        if saved is not None:
                            aggregator.load_state_dict(saved)
                        train(model, aggregator, optimizer, group.rank, steps)
                        state = aggregator.state_dict()
                    numbers = json.loads(json.dumps(state["numbers"]))
                    saved = {"tensors": load(save(state["tensors"])), "numbers": numbers}
                    whole = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
                    model = net(torch.float32)
                    model.load_state_dict(whole[0])
                    optimizer = optimizer_of(model)
                    optimizer.load_state_dict(whole[1])
                ends.append((model.state_dict(), saved))
            for name in ends[0][0]:
                assert torch.equal(ends[0][0][name], ends[1][0][name]), (way, name)
            for name in ends[0][1]["tensors"]:
                assert torch.equal(ends[0][1]["tensors"][name], ends[1][1]["tensors"][name]), (way, name)
            assert ends[0][1]["numbers"] == ends[1][1]["numbers"]


def check_what_does_not_fit_is_not_loaded() -> None:
    with Group.open() as group, GradAggregator(net(), group=group, codec="none") as aggregator:
        state = aggregator.state_dict()
        for key, value in (("mode", "local"), ("world_size", 7), ("rank", 6), ("version", 0)):
            with pytest.raises(ValueError, match=f"load_state_dict: {key} must be"):
                aggregator.load_state_dict({**state, "numbers": state["numbers"] | {key: value}})
        lost: AggregatorState = {**state, "tensors": {"residual.0.weight": torch.zeros(20, 12)}}
        with pytest.raises(ValueError, match=r"unknown \['residual.0.weight'\] \(0 and 1 in all\)"):
            aggregator.load_state_dict(lost)
        loss(aggregator._model, group.rank, 0).backward()
        for call in (aggregator.state_dict, aggregator.drain, lambda: aggregator.load_state_dict(state)):
            with pytest.raises(RuntimeError, match="between steps, after wait"):
                call()
        aggregator.wait()


@pytest.mark.parametrize("R", [2, 3])
@pytest.mark.parametrize(
    "check",
    [
        check_delayed_is_the_plain_program_with_a_staleness_of_one,
        check_local_is_the_plain_program_of_an_outer_optimizer,
        check_local_packs_differences_and_keeps_fp32_anchors_of_bf16,
        check_a_changed_loss_scale_changes_nothing_else,
        check_a_resumed_run_has_the_same_bits,
        check_what_does_not_fit_is_not_loaded,
    ],
    ids=lambda check: check.__name__.removeprefix("check_"),
)
def test_modes_and_state(check: Callable[[], None], R: int) -> None:
    run_ranks(check, R)


# --- another number of ranks


def saved_after_a_step(way: dict[str, Any]) -> AggregatorState:
    with Group.open() as group:
        model = Bare()
        with GradAggregator(model, group=group, **way) as aggregator:
            backward(model, group.rank, 0)
            aggregator.wait()
            return aggregator.state_dict()


def owed_and_sent(way: dict[str, Any], states: list[AggregatorState]) -> dict[str, Tensor]:
    """What a step on these ranks sends, and what this rank owes after it."""
    with Group.open() as group:
        model = Bare()
        with GradAggregator(model, group=group, **way) as aggregator:
            aggregator.load_state_dict(states[group.rank])
            backward(model, group.rank, 1)
            aggregator.wait()
            found = {f"sent.{name}": g for name, g in grads(model).items() if g is not None}
            return found | aggregator.state_dict()["tensors"]


@pytest.mark.parametrize(("old", "new"), [(3, 2), (2, 3)])
def test_other_ranks_still_owe_what_was_owed(old: int, new: int) -> None:
    for way in ({"codec": "bf16"}, {"codec": "topk"}):
        states = run_ranks(saved_after_a_step, old, way)
        moved = reshard_state(states, new)
        assert [(s["numbers"]["rank"], s["numbers"]["world_size"]) for s in moved] == [(r, new) for r in range(new)]
        after = run_ranks(owed_and_sent, new, way, moved)
        for name, p in Bare().named_parameters():
            owed = sum(s["tensors"][f"residual.{name}"].double() for s in states)
            exact = owed + average(name, p, new, [1])
            found = after[0][f"sent.{name}"].double() + sum(tensors[f"residual.{name}"].double() for tensors in after)
            bound = 1e-5 * (1 + exact.abs())
            assert bool(((found - exact).abs() <= bound).all()), (way, name)


def state_of(rank: int, R: int, **numbers: Any) -> AggregatorState:
    tensors = {"residual.w": torch.full((2,), 10.0**rank), "anchor.w": torch.arange(2.0)}
    known = {"rank": rank, "world_size": R, "mode": "sync", "step": 3, "local_step": 0, "order": ["w"]}
    return {"tensors": tensors, "numbers": known | numbers}


def test_residuals_are_summed_by_their_rank_modulo_the_new_number_of_ranks() -> None:
    four = [state_of(rank, 4) for rank in range(4)]
    three = reshard_state(four, 3)
    assert [s["tensors"]["residual.w"].tolist() for s in three] == [[1001.0] * 2, [10.0] * 2, [100.0] * 2]
    six = reshard_state(four, 6)
    assert [s["tensors"]["residual.w"][0].item() for s in six] == [1.0, 10.0, 100.0, 1000.0, 0.0, 0.0]
    assert all(torch.equal(s["tensors"]["anchor.w"], torch.arange(2.0)) for s in six)
    assert reshard_state(four, 4)[1] is four[1]
    assert [s["tensors"]["residual.w"][0].item() for s in reshard_state(six, 1)] == [1111.0]


def test_states_that_are_not_of_one_moment_are_refused() -> None:
    four = [state_of(rank, 4) for rank in range(4)]
    for bad, text in (
        ([], "got none"),
        (four[:3], "got that of rank 0 of 4 at place 0 of 3"),
        ([four[1], four[0], *four[2:]], "got that of rank 1 of 4 at place 0 of 4"),
        ([*four[:3], state_of(3, 4, step=4)], "step is 3 on rank 0 and 4 on rank 3"),
        ([state_of(r, 4, mode="local", local_step=1) for r in range(4)], r"1 local steps after one; call drain\(\)"),
    ):
        with pytest.raises(ValueError, match=text):
            reshard_state(bad, 2)
    with pytest.raises(ValueError, match="world_size must be 1 or more, got 0"):
        reshard_state(four, 0)
