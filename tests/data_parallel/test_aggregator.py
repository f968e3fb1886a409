"""Gradients averaged over the ranks beside the backward pass: values, bits, bytes, and every kind of parameter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.harness.aggregators import (
    Bare,
    assert_averaged,
    assert_same_bits,
    average,
    backward,
    events_of,
    gradient,
    grads,
)
from tests.harness.ranks import Run, on_processes, on_ranks
from tpkernels import ops
from tpkernels.comm.group import Group
from tpkernels.compress import CODECS, wire_bytes
from tpkernels.data_parallel import GradAggregator, TopK, clip_grad_norm_, unscale_
from tpkernels.layers import ColumnParallelLinear, RowParallelLinear
from tpkernels.shard import shard_info
from tpkernels.testing import run_ranks

F32 = torch.float32
SMALL = 4000  # bytes of a bucket, so that there are several


@on_ranks(2, 3)
def check_averages_are_within_the_bound_of_the_codec_and_the_same_bits(group: Group) -> None:
    for codec in CODECS:
        for dtype, feedback in ((F32, True), (F32, False), (torch.bfloat16, True), (torch.float16, False)):
            model = Bare(dtype)
            options = {"codec": codec, "error_feedback": feedback, "bucket_bytes": SMALL}
            with GradAggregator(model, group=group, **options) as aggregator:
                backward(model, group.rank, 0)
                assert aggregator.wait()
                assert_averaged(model, group.world_size, codec)
                assert_same_bits(grads(model), group)


@on_ranks(2, 3)
def check_fp64_is_averaged_in_fp64(group: Group) -> None:
    model = Bare(torch.float64)
    with GradAggregator(model, group=group, codec="none") as aggregator:
        backward(model, group.rank, 0)
        aggregator.wait()
        for name, p in model.named_parameters():
            want = sum(gradient(name, p.shape, r, 0) for r in range(group.world_size)) / group.world_size
            assert torch.equal(p.grad, want), name


@on_ranks(2, 3)
def check_what_packing_loses_comes_later(group: Group) -> None:
    """The sum of twenty averages is that of the gradients to one message's loss, not to twenty."""
    R, steps = group.world_size, 20
    for codec in [c for c in CODECS if c != "none"]:
        off = {}
        for feedback in (True, False):
            model, total = Bare(), {}
            with GradAggregator(model, group=group, codec=codec, error_feedback=feedback) as aggregator:
                for _ in range(steps):
                    backward(model, group.rank, 0)  # the same gradient again: losses of one sign add up
                    aggregator.wait()
                    for name, p in model.named_parameters():
                        total[name] = total.get(name, 0) + p.grad.double()
                        p.grad = None
            off[feedback] = sum(
                float((total[name] - steps * average(name, p, R, [0])).norm() ** 2)
                for name, p in model.named_parameters()
            )
        assert off[True] < 0.5 * off[False], (codec, off)


@on_ranks(2, 3)
def check_bytes_on_the_wire_are_those_of_the_formula(group: Group) -> None:
    shapes = {"large": (300, 700), "small": (100, 500)}
    R, sent = group.world_size, {}
    for codec in CODECS:
        model = Bare(shapes=shapes)
        with GradAggregator(model, group=group, codec=codec, bucket_bytes=200_000) as aggregator:
            sizes = [bucket.numel for bucket in aggregator._traffic.buckets]
            assert sorted(sizes) == [50_000, 210_000]
            backward(model, group.rank, 0)
            aggregator.wait()
            sent[codec] = aggregator.stats()["wire_bytes"]
            # To each owner its part, from each owner the sum; parts are whole blocks, so a rank's share varies.
            least = 2 * (R - 1) / R * sum(wire_bytes(codec, n) for n in sizes)
            assert 0.99 * least <= sent[codec] <= 1.03 * least + 4096, (codec, sent[codec], least)
    assert sent["fp16"] < 0.52 * sent["none"]


@on_ranks(1, 2, 3)
def check_passes_under_no_sync_add_up(group: Group) -> None:
    model = Bare()
    with GradAggregator(model, group=group, codec="fp16", bucket_bytes=SMALL) as aggregator:
        for again in (False, True):
            aggregator.reset_stats()
            with aggregator.no_sync():
                backward(model, group.rank, 0)
                backward(model, group.rank, 1)
            assert aggregator.stats()["calls"] == 0
            backward(model, group.rank, 2)
            aggregator.wait()
            assert_averaged(model, group.world_size, "fp16", steps=3, carried=again)
            model.zero_grad()
    with GradAggregator(model, group=group, codec="none") as aggregator:
        with aggregator.no_sync():
            backward(model, group.rank, 0)
        aggregator.wait()  # sends what came under no_sync alone, too
        assert_averaged(model, group.world_size, "none")


@on_ranks(2, 3)
def check_parameters_without_a_gradient(group: Group) -> None:
    """None where no rank has one; zeros count where some ranks have none; the same set on all ranks."""
    R = group.world_size
    model = Bare()
    with GradAggregator(model, group=group, codec="none", bucket_bytes=SMALL) as aggregator:
        for step in range(3):
            unused = ["inner", "last"][step % 2]
            backward(model, group.rank, step, lambda n, u=unused: n != u and (n != "bias" or group.rank == 1))  # type: ignore[misc]
            aggregator.wait()
            for name, p in model.named_parameters():
                if name == unused:
                    assert p.grad is None, name
                else:
                    want = average(name, p, R, [step], ranks=[1] if name == "bias" else None)
                    assert (p.grad.double() - want).abs().max() <= 1e-6 * (1 + want.abs().max()), name
            assert_same_bits(grads(model), group)
            model.zero_grad()


@on_ranks(2, 3)
def check_frozen_and_tied_parameters(group: Group) -> None:
    model = Bare()
    model.again = model.inner  # tied: one parameter under two names
    model.table.requires_grad_(False)
    with GradAggregator(model, group=group, codec="none") as aggregator:
        backward(model, group.rank, 0)
        aggregator.wait()
        assert model.table.grad is None
        want = average("inner", model.inner, group.world_size, [0])
        assert (model.inner.grad.double() - want).abs().max() <= 1e-5 * want.abs().max()
        assert sum(bucket.numel for bucket in aggregator._traffic.buckets) == sum(
            p.numel() for p in model.parameters() if p.requires_grad
        )


@on_ranks(2, 3)
def check_bf16_parameters_with_fp32_gradients(group: Group) -> None:
    """Passes and ranks are summed in fp32: small gradients that bf16 sums would swallow arrive."""
    model = Bare(torch.bfloat16)
    with GradAggregator(model, group=group, codec="none", gradient_dtype=torch.float32) as aggregator:
        with aggregator.no_sync():
            for _ in range(64):
                (model.bias * 2.0**-8).sum().backward()
        (model.bias * (1.0 + group.rank)).sum().backward()
        assert model.bias.grad.dtype == torch.float32
        aggregator.wait()
        want = 64 * 2.0**-8 + (group.world_size + 1) / 2
        assert torch.equal(model.bias.grad, torch.full((50,), want))


@on_ranks(2, 3)
def check_a_loss_scaler_skips_on_all_ranks(group: Group) -> None:
    """One rank's overflow: all skip the step and halve the scale, and the next step is as if nothing had been."""
    for codec in (*CODECS, "topk"):
        model = Bare()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=100)
        with GradAggregator(model, group=group, codec=codec, topk=TopK(0.5), bucket_bytes=SMALL) as aggregator:
            for step in range(4):
                before = {name: p.detach().clone() for name, p in model.named_parameters()}
                kept = aggregator.state_dict()["tensors"]
                bad = "inner" if step == 1 and group.rank == group.world_size - 1 else ""
                backward(model, group.rank, step, scaler=scaler, bad=bad)
                assert aggregator.wait()
                scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                assert scaler.get_scale() == (4.0 if step == 0 else 2.0), (codec, step)
                same = {name: torch.equal(before[name], p) for name, p in model.named_parameters()}
                assert all(same.values()) if step == 1 else not same["inner"], (codec, step, same)
                if bad and codec != "none":
                    now = aggregator.state_dict()["tensors"]["residual.inner"]
                    assert now.isfinite().all()
                    if codec == "topk":  # this rank sent nothing of it
                        assert torch.equal(now, kept["residual.inner"])
            assert_same_bits(dict(model.named_parameters()), group)


def check_a_cut_model_agrees_about_an_overflow_of_one_part() -> None:
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    with Group.open((mesh, "dp")) as dp, Group.open((mesh, "tp")) as tp:
        model = Bare()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        with GradAggregator(model, group=dp, bucket_bytes=SMALL) as aggregator:
            bad = "inner" if dist.get_rank() == 3 else ""  # on tp rank 1 of one replica: tp rank 0 has no such part
            backward(model, dp.rank, 0, scaler=scaler, bad=bad)
            aggregator.wait()
            assert model.inner.grad.isfinite().all() == (tp.rank == 0)
            found = unscale_(scaler, optimizer, groups=tp)
            before = model.inner.detach().clone()
            scaler.step(optimizer)
            scaler.update()
            assert (float(found), scaler.get_scale()) == (1.0, 2.0)
            assert torch.equal(before, model.inner)


class Block(nn.Module):
    """A norm and two linears, cut over the ranks of a group or whole."""

    def __init__(self, tp: Group | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, up, down = nn.LayerNorm(12), nn.Linear(12, 20), nn.Linear(20, 12)
        self.up: nn.Module = up if tp is None else ColumnParallelLinear.from_linear(up, group=tp)
        self.down: nn.Module = down if tp is None else RowParallelLinear.from_linear(down, group=tp)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


def check_tensor_parallel_replicas_equal_the_whole_model_on_the_whole_batch() -> None:
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    with Group.open((mesh, "dp")) as dp, Group.open((mesh, "tp")) as tp:
        whole, mine = (nn.Sequential(Block(g), Block(g)).double() for g in (None, tp))
        optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (whole, mine)]
        with GradAggregator(mine, group=dp, codec="none", bucket_bytes=500) as aggregator:
            assert len(aggregator._traffic.buckets) > 3
            for step in range(3):
                batch = torch.randn(8, 12, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
                whole(batch).pow(2).mean().backward()
                mine(batch.chunk(2)[dp.rank]).pow(2).mean().backward()
                assert aggregator.wait()
                want = nn.utils.clip_grad_norm_(whole.parameters(), 0.5)
                norm = clip_grad_norm_(mine, 0.5, groups=tp)
                assert abs(float(norm) - float(want)) <= 1e-12 * float(want)
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
            others = dict(whole.named_parameters())
            for name, p in mine.named_parameters():
                info = shard_info(p)
                want = others[name] if info is None else info.part(others[name])
                assert (p - want).abs().max() < 1e-13, name
            assert_same_bits(dict(mine.named_parameters()), dp)


@on_ranks(2, 3)
def check_messages_leave_while_the_backward_pass_runs(group: Group) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(30, 30) for _ in range(6)))
    with GradAggregator(model, group=group, bucket_bytes=3700) as aggregator:
        for step in range(3):
            events = events_of(aggregator)
            model(torch.randn(4, 30)).sum().backward()
            last = max(i for i, (what, _) in enumerate(events) if what == "ready")
            early = [k for i, (what, k) in enumerate(events) if what == "launch" and i < last]
            assert early == [0, 1, 2, 3, 4], (step, events)
            assert [k for what, k in events if what == "launch"] == [0, 1, 2, 3, 4, 5]
            aggregator.wait()


@on_ranks(2, 3)
def check_buckets_take_the_order_of_use_and_stay_in_step(group: Group) -> None:
    """Layers used in another order than they were registered, and in yet another one on the last rank."""

    class Shuffled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(30, 30) for _ in range(4))
            self.order = [2, 0, 3, 1]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for i in self.order:
                x = self.layers[i](x)
            return x

    torch.manual_seed(0)
    model = Shuffled()
    with GradAggregator(model, group=group, codec="none", bucket_bytes=3000) as aggregator:
        for step in range(4):
            if step == 2 and group.rank == group.world_size - 1:
                model.order = [0, 1, 2, 3]
            events = events_of(aggregator)
            model(torch.randn(4, 30)).sum().backward()
            aggregator.wait()
            assert_same_bits(grads(model), group)
            assert [k for what, k in events if what == "launch"] == [0, 1, 2, 3], "in order, whatever came first"
            model.zero_grad()
        used = [bucket.members[0].name.split(".")[1] for bucket in aggregator._traffic.buckets]
        assert used == ["1", "3", "0", "2"]


@on_ranks(2, 3)
def check_several_aggregators_beside_collectives_of_the_trainer(group: Group) -> None:
    """Two models over one group, one of them over gloo, with the trainer's own calls on the group in between."""
    with Group.open(transport="group") as other:
        R = group.world_size
        first, second = Bare(), Bare()
        with (
            GradAggregator(first, group=group, codec="fp16", bucket_bytes=SMALL) as one,
            GradAggregator(second, group=other, codec="bf16", bucket_bytes=SMALL) as two,
        ):
            for _ in range(3):
                backward(first, group.rank, 0)
                total = ops.all_reduce(torch.ones(3), group=group)
                backward(second, group.rank, 0)
                total += ops.all_reduce(torch.ones(3), group=other)
                assert total.tolist() == [2.0 * R] * 3
                two.wait()
                one.wait()
                assert_averaged(first, R, "fp16", carried=True)
                assert_averaged(second, R, "bf16", carried=True)
                first.zero_grad()
                second.zero_grad()


@on_processes(globals())
def test_gradients_are_averaged(run: Run) -> None:
    run()


@pytest.mark.parametrize(
    "check",
    [
        check_tensor_parallel_replicas_equal_the_whole_model_on_the_whole_batch,
        check_a_cut_model_agrees_about_an_overflow_of_one_part,
    ],
    ids=lambda check: check.__name__.removeprefix("check_"),
)
def test_cut_models_are_averaged_over_replicas(check: Callable[[], None]) -> None:
    run_ranks(check, 4)
