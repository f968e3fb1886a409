"""Optimizers cut over the replicas: the bits of those that are not, the norm over all parts, and what is refused."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.harness.aggregators import SHAPES, Bare, average, backward, bound_of, gradient
from tests.harness.ops import assert_within
from tpkernels.comm.group import Group
from tpkernels.data_parallel import GradAggregator, clip_grad_norm_, replicas_agree, unscale_, zero_optimizer
from tpkernels.data_parallel.clip import _Gradient
from tpkernels.data_parallel.flat import FlatShard, flat_shard, stepped
from tpkernels.shard import ShardInfo
from tpkernels.testing import run_ranks

STEPS = 4
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW, fused": partial(torch.optim.AdamW, fused=True),
    "AdamW, foreach": partial(torch.optim.AdamW, foreach=True, amsgrad=True),
    "SGD": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "Adagrad": torch.optim.Adagrad,
    "RAdam": torch.optim.RAdam,
}


class Mixed(Bare):
    """Of three dtypes; a frozen parameter, one that is not contiguous, one without values, and one smaller than R."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(self.bias.detach().bfloat16())
        self.last = nn.Parameter(self.last.detach().double())
        self.register_parameter("turned", nn.Parameter(torch.arange(35.0).view(5, 7).t()))
        self.register_parameter("empty", nn.Parameter(torch.zeros(0, 3)))
        self.register_parameter("frozen", nn.Parameter(torch.ones(4), requires_grad=False))


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    every = dict(model.named_parameters())
    first = [every.pop("table"), every.pop("frozen"), every.pop("scalar")]
    return [{"params": first, "lr": 0.03}, {"params": list(every.values()), "weight_decay": 0.2}]


def trained(zero: int, kind: Callable[..., Any], group: Group, bucket_bytes: int, wide: bool) -> list[list[Tensor]]:
    """The parameters after each step; with accumulation, a schedule, clipping, and gradients that only some have."""
    model = Mixed()
    dtype = torch.float32 if wide and kind is OPTIMIZERS["SGD"] else None
    with GradAggregator(
        model, group=group, codec="none", bucket_bytes=bucket_bytes, zero=zero, gradient_dtype=dtype
    ) as aggregator:
        made = zero_optimizer(kind, aggregator, groups_of(model), lr=0.01) if zero else kind(groups_of(model), lr=0.01)
        schedule = torch.optim.lr_scheduler.StepLR(made, 2, 0.5)
        after = []
        for step in range(STEPS):
            with aggregator.no_sync():
                backward(model, group.rank, 100 + step)
            only = (lambda name: name != "table") if step == 1 else (lambda name: name != "inner" or group.rank == 0)
            backward(model, group.rank, step, only)
            aggregator.wait()
            clip_grad_norm_(model, 3.0, groups=group)
            made.step()
            made.zero_grad()
            schedule.step()
            assert all(p.grad is None for p in model.parameters())
            assert replicas_agree(model, group=group)
            after.append([p.detach().clone() for p in model.parameters()])
        if zero:
            sizes = [flat.range[1] - flat.range[0] for p in model.parameters() if (flat := flat_shard(p)) is not None]
            state = [v.numel() for fields in made.state.values() for v in fields.values() if v.dim()]
            spare = 64 * (len(sizes) + len(aggregator._traffic.buckets))
            assert (
                group.world_size * sum(sizes) <= sum(p.numel() for p in model.parameters()) + group.world_size * spare
            )
            assert sum(state) <= 3 * sum(sizes)
    return after


def check_bits(bucket_bytes: int) -> None:
    torch.set_num_threads(1)
    with Group.open() as group:
        for name, kind in OPTIMIZERS.items():
            want = trained(0, kind, group, bucket_bytes, wide=True)
            assert any(not torch.equal(a, b) for a, b in zip(want[0], want[1], strict=True))
            for zero in (1, 2):
                got = trained(zero, kind, group, bucket_bytes, wide=True)
                for step in range(STEPS):
                    for p, a, b in zip(Mixed().named_parameters(), got[step], want[step], strict=True):
                        assert torch.equal(a, b), f"{name}, zero={zero}: {p[0]} after step {step}"


@pytest.mark.parametrize(("ranks", "bucket_bytes"), [(2, 1 << 20), (3, 1000)])
def test_parameters_are_bit_for_bit_those_of_a_whole_optimizer(ranks: int, bucket_bytes: int) -> None:
    run_ranks(check_bits, ranks, bucket_bytes)


def check_codecs() -> None:
    """Parts of the average, within what a codec may be off; errors of a step are added to the next."""
    with Group.open() as group:
        for codec in ("fp16", "int8"):
            model = Bare()
            with GradAggregator(model, group=group, codec=codec, zero=1, bucket_bytes=3000) as aggregator:
                totals = {name: torch.zeros_like(stepped(p).double()) for name, p in model.named_parameters()}
                for step in range(3):
                    backward(model, group.rank, step)
                    aggregator.wait()
                    for name, p in model.named_parameters():
                        totals[name] += stepped(p).grad.double()
                largest = max(
                    float(average(n, p, group.world_size, [s]).abs().max())
                    for n, p in model.named_parameters() for s in range(3)
                )  # fmt: skip
                for name, p in model.named_parameters():
                    flat = flat_shard(p)
                    assert flat is not None
                    want = sum(average(name, p, group.world_size, [s]) for s in range(3))
                    every = [gradient(name, p.shape, r, s).abs() for r in range(group.world_size) for s in range(3)]
                    size = torch.stack(every).sum(0) / group.world_size
                    bound = bound_of(size, group.world_size, codec, largest, torch.float32, 2)
                    assert_within(totals[name], flat.part(want), flat.part(bound), f"{codec}: {name}")
                assert aggregator.state_dict()["numbers"]["order"] == list(reversed(SHAPES))


def check_memory() -> None:
    """zero=2 has neither gradients nor messages when the backward pass has ended."""
    with Group.open() as group:
        for zero in (1, 2):
            model = Bare()
            with GradAggregator(model, group=group, codec="none", zero=zero, bucket_bytes=1) as aggregator:
                backward(model, group.rank, 0)
                assert all((p.grad is None) == (zero == 2) for p in model.parameters())
                assert bool(aggregator._traffic._flats[0]) == (zero == 1)
                aggregator.wait()
                assert all(p.grad is None for p in model.parameters())
                with pytest.raises(ValueError, match=r"take tpkernels\.data_parallel\.clip_grad_norm_"):
                    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                assert float(clip_grad_norm_(model, 1.0, groups=group)) > 0.0


def check_overflow() -> None:
    """An infinity is in the part of one rank only; all skip the step."""
    with Group.open() as group:
        for by_torch in (True, False):
            model = Bare()
            before = [p.detach().clone() for p in model.parameters()]
            with GradAggregator(model, group=group, codec="fp16", zero=1) as aggregator:
                optimizer = zero_optimizer(torch.optim.SGD, aggregator, lr=0.1)
                scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
                for bad in ("table", ""):
                    backward(model, group.rank, 0, scaler=scaler, bad=bad if group.rank == 1 else "")
                    aggregator.wait()
                    if by_torch:
                        scaler.unscale_(optimizer)
                    else:
                        assert bool(unscale_(scaler, optimizer, groups=group)) == bool(bad)
                    scaler.step(optimizer)
                    scaler.update()
                    same = all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
                    assert same == bool(bad)
                    assert replicas_agree(model, group=group)


class Reader(nn.Module):
    """Attention of torch, which reads parameters of its output projection, tied tables, and a layer that rests."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(23, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm, self.resting = nn.LayerNorm(16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 23, bias=False)
        self.head.weight = self.table.weight
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        out: Tensor = self.head(self.norm(self.attention(x, x, x)[0] * self.scale))
        return out


def trained_reader(gather: str, group: Group, bucket_bytes: int) -> list[Tensor]:
    """The parameters after some steps, and the loss of each."""
    torch.manual_seed(0)
    model, found = Reader(), []
    with GradAggregator(
        model, group=group, codec="none", zero=1, bucket_bytes=bucket_bytes, gather=gather
    ) as aggregator:
        optimizer = zero_optimizer(torch.optim.AdamW, aggregator, lr=0.05)
        random = torch.Generator().manual_seed(group.rank)
        for step in range(STEPS):
            ids = torch.randint(23, (3, 5), generator=random)
            loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
            loss.backward()
            aggregator.wait()
            optimizer.step()
            optimizer.zero_grad()
            late = model.table.weight.isnan().any() and model.resting.weight.isnan().any()
            assert bool(late) == (gather == "forward"), "what is under way is not read as if it were there"
            if step == 1:
                aggregator.wait_for_parameters()
                assert not model.table.weight.isnan().any()
            if step == 2:
                state = copy.deepcopy(model.state_dict())
                model.load_state_dict({name: x + 1.0 for name, x in state.items()})
                model.load_state_dict(state)
                assert replicas_agree(model, group=group)
            found.append(loss.detach())
        torch.save(model, io.BytesIO())
    assert all(not module._forward_pre_hooks for module in model.modules())
    return [*found, *(p.detach() for p in model.parameters())]


def check_late_parameters() -> None:
    with Group.open() as group:
        for bucket_bytes in (1, 2000, 1 << 20):
            pair = [trained_reader(gather, group, bucket_bytes) for gather in ("step", "forward")]
            assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(*pair, strict=True))


def test_parameters_that_arrive_beside_the_forward_pass_have_the_same_bits() -> None:
    run_ranks(check_late_parameters, 3)


def check_refusals() -> None:
    with Group.open() as group:
        model = nn.Linear(6, 4)
        for bad, match in (
            ({"zero": 3}, "zero must be one of 0, 1, 2, got 3"),
            ({"zero": 1, "mode": "local"}, "mode must be 'sync'"),
            ({"zero": 2, "codec": "topk"}, "not 'topk'"),
            ({"zero": group.rank}, "zero must be the same on all ranks"),
            ({"gather": "forward"}, "gather must be 'step', or 'forward' with zero=1 or 2, got 'forward' with zero=0"),
            ({"zero": 1, "gather": "never"}, "got 'never' with zero=1"),
        ):
            with pytest.raises(ValueError, match=match):
                GradAggregator(model, group=group, sync_parameters=True, **bad)
        with (
            GradAggregator(model, group=group, sync_parameters=True) as aggregator,
            pytest.raises(ValueError, match="must have zero=1 or 2"),
        ):
            zero_optimizer(torch.optim.SGD, aggregator, lr=0.1)
        before = torch.optim.SGD(model.parameters(), lr=0.1)
        with GradAggregator(model, group=group, zero=1) as aggregator:
            late = zero_optimizer(torch.optim.SGD, aggregator, [model.weight], lr=0.1)
            late.add_param_group({"params": [model.bias]})
            for optimizer in (before, late):
                model(torch.ones(2, 6)).sum().backward()
                aggregator.wait()
                with pytest.raises(ValueError, match=r"SGD\.step: a parameter of shape .* zero_optimizer\("):
                    optimizer.step()
            with pytest.raises(ValueError, match="parameters of the aggregator's model, got one of shape"):
                zero_optimizer(torch.optim.SGD, aggregator, nn.Linear(2, 2).parameters(), lr=0.1)
            with pytest.raises(ValueError, match="treats every value by itself, got Adafactor"):
                zero_optimizer(torch.optim.Adafactor, aggregator)
            whole = copy.deepcopy(model)
            assert all(flat_shard(p) is None for p in whole.parameters())
            torch.save(model, saved := io.BytesIO())
            saved.seek(0)
            assert all(flat_shard(p) is None for p in torch.load(saved, weights_only=False).parameters())
            named = zero_optimizer(torch.optim.SGD, aggregator, model.named_parameters(), lr=0.1)
            assert named.param_groups[0]["param_names"] == ["weight", "bias"]
        assert all(flat_shard(p) is None for p in model.parameters())
        before.step()


def check_all_else() -> None:
    torch.set_num_threads(1)
    check_codecs()
    check_memory()
    check_overflow()
    check_refusals()


def test_codecs_memory_loss_scaling_and_refusals() -> None:
    run_ranks(check_all_else, 2)


def test_values_that_several_shards_hold_count_once_in_the_parts_of_replicas() -> None:
    """Three heads of two rows over two ranks, of which the middle one is on both."""
    full = torch.arange(18.0).view(6, 3)
    runs = (((0, 4),), ((2, 4),))
    counted = list[Tensor]()
    for rank in range(2):
        info = ShardInfo(0, 6, 2, rank, runs=runs)
        shard = info.part(full)
        for replica, bounds in enumerate([(0, 5, 12)] * 2):
            group: Any = type("G", (), {"rank": replica, "world_size": 2, "name": ""})()
            flat = FlatShard(nn.Parameter(shard.reshape(-1)[slice(*bounds[replica : replica + 2])]), bounds, group)
            counted += _Gradient(flat.part(shard), info, flat, shard.shape).owned()
    assert sorted(torch.cat(counted).tolist()) == full.view(-1).tolist()
