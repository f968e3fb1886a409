"""comm_hook under torch's DistributedDataParallel and fully_shard: values, bits, bytes, state, trouble."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tests.harness.ops import raised
from tests.harness.ranks import Run, on_processes, on_ranks
from tpkernels import ops
from tpkernels.comm.group import Group
from tpkernels.compress import CODECS, wire_bytes
from tpkernels.data_parallel import comm_hook, replicas_agree
from tpkernels.data_parallel.hooks import CommHook
from tpkernels.testing import run_ranks
from tpkernels.testing.case import CODEC_FLOOR, CODEC_ROUNDING

LOST = {codec: CODEC_ROUNDING[codec] + CODEC_FLOOR[codec] for codec in CODECS}
"""What packing loses of the largest value of a block, as a share of it."""
SMALL_MB = 1e-4  # of a bucket: several for a tiny model


class Net(nn.Module):
    """Three layers; `forward` returns a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 24), nn.Linear(24, 20), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        loss: Tensor = self.third(torch.tanh(self.second(torch.tanh(self.first(x))))).square().mean()
        return loss


class Values(nn.Module):
    """A loss whose gradient is what the rank says."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, gradient: Tensor) -> Tensor:
        return (self.weight * gradient).sum()


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def data(step: int, rank: int) -> Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(100 * step + rank))


def true_average(model: nn.Module, step: int, R: int) -> tuple[dict[str, Tensor], float]:
    """The average of the gradients of all ranks, in fp64, and the largest gradient of any."""
    wide = Net().double()
    wide.load_state_dict(model.state_dict())
    total, largest = {name: torch.zeros_like(p) for name, p in wide.named_parameters()}, 0.0
    for rank in range(R):
        grads = torch.autograd.grad(wide(data(step, rank).double()), list(wide.parameters()))
        for part, grad in zip(total.values(), grads, strict=True):
            part += grad.detach() / R
            largest = max(largest, float(grad.abs().max()))
    return {name: value.detach() for name, value in total.items()}, largest


def assert_average(model: nn.Module, want: tuple[dict[str, Tensor], float], codec: str, what: str) -> None:
    """Within the codec's rounding of every contribution, of what was left of the last one, and of the sum; and of fp32.

    Relative to the largest gradient, as the values of a block have one scale.
    """
    averages, largest = want
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        got = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        bound = (4 * LOST[codec] + 64 * torch.finfo(torch.float32).eps) * largest
        error = float((got.double() - averages[name]).abs().max())
        assert error <= bound, f"{what}, {codec}: {name} is off by {error}, bound {bound}"


def wrapped(
    codec: str, error_feedback: bool = True, model: nn.Module | None = None
) -> tuple[DistributedDataParallel, CommHook]:
    ddp = DistributedDataParallel(model or net(), bucket_cap_mb=SMALL_MB)
    hook = comm_hook(codec, error_feedback)
    hook.register(ddp)
    return ddp, hook


@on_ranks(2, 3)
def check_ddp_averages(group: Group) -> None:
    R, rank = group.world_size, group.rank
    plain = DistributedDataParallel(net(), bucket_cap_mb=SMALL_MB)
    for codec, error_feedback in itertools.product(CODECS, (True, False)):
        ddp, hook = wrapped(codec, error_feedback)
        for step in range(3):
            ddp.zero_grad()
            ddp(data(step, rank)).backward()
            assert_average(ddp.module, true_average(ddp.module, step, R), codec, f"step {step}")
            averages = nn.ParameterList([p.grad for p in ddp.parameters() if p.grad is not None])
            assert replicas_agree(averages), "all ranks have the same bits"
            if codec == "none":
                plain.zero_grad()
                plain(data(step, rank)).backward()
                for p, q in zip(ddp.parameters(), plain.parameters(), strict=True):
                    torch.testing.assert_close(p.grad, q.grad)
        hook.close()


@on_ranks(2)
def check_ddp_bytes_and_residuals_by_parameter(group: Group) -> None:
    numels = [p.numel() for p in net().parameters()]
    sent = {}
    for codec in CODECS:
        ddp, hook = wrapped(codec)
        buckets = []
        for step in range(3):
            ddp.zero_grad()
            hook.reset_stats()
            with ddp.no_sync():
                ddp(data(step, group.rank)).backward()
            assert hook.stats()["calls"] == 0, "no_sync sends nothing"
            ddp(data(step, group.rank)).backward()
            buckets.append(hook.stats()["calls"])
            sent[codec] = hook.stats()["wire_bytes"]
        assert buckets[0] != buckets[1], "DDP lays out its buckets anew after the first step"
        assert buckets[1] == buckets[2] > 1
        if codec != "none":
            assert {len(flat) for flat in hook.state._flats.values()} != {sum(numels)}
            assert sum(len(flat) for flat in hook.state._flats.values()) == sum(numels), "old layouts are gone"
        hook.close()
    for codec in CODECS:
        assert sent[codec] == bytes_of_three_layers(codec), f"{codec}: {sent}"
    assert sent["fp16"] < 0.55 * sent["none"]


def bytes_of_three_layers(codec: str) -> int:
    """What one of two ranks sends: messages for each layer, as DDP closes a bucket behind what fills it.

    Of each the other rank's part, and the sum of its own; without a codec the whole at once, which is the same.
    """
    rank, sent = dist.get_rank(), 0
    for numel in (20 * 3 + 3, 24 * 20 + 20, 6 * 24 + 24):
        parts = [numel - numel // 2, numel // 2]
        sent += (
            wire_bytes(codec, numel)
            if codec == "none"
            else wire_bytes(codec, parts[1 - rank]) + wire_bytes(codec, parts[0])
        )
    return sent


def steps(model: nn.Module, gradients: Iterator[Tensor]) -> Tensor:
    """The sum of the averages of some steps, in fp64."""
    total = torch.zeros(1, dtype=torch.float64)
    for gradient in gradients:
        model.zero_grad()
        model(gradient).backward()
        (average,) = (p.grad for p in model.parameters())
        assert average is not None
        total = total + average.double()
    return total


@on_ranks(2, 3)
def check_error_feedback_loses_nothing(group: Group) -> None:
    """A large value in the block hides small ones from codecs of one scale a block, for ever without error feedback."""
    R, count = group.world_size, 64
    gradient = torch.full((32,), 2.0**-27)
    gradient[0] = 1.0
    for codec in CODECS:
        if codec == "none":
            continue
        lost = ops.decompress(ops.compress(gradient, codec), [32], torch.float32, codec)[1] == 0
        for error_feedback in (True, False):
            ddp, hook = wrapped(codec, error_feedback, Values(32))
            # The large value comes with both signs: on average there is only the small one, which must arrive.
            signs = ((-1.0) ** step for step in range(count))
            total = steps(ddp, (torch.cat([gradient[:1] * sign, gradient[1:]]) for sign in signs))
            owed = sum(gathered(hook.state_dict(ddp).get("residual.weight", torch.zeros(32))))
            hook.close()
            if error_feedback:  # what was applied and what is still owed is everything, but for fp32
                error = (total + owed - torch.cat([torch.zeros(1), gradient[1:] * count])).abs()
                assert float(error.max()) <= count * R * 2.0**-24, f"{codec}: {error.max()}"
                small = (total + owed)[1:] / (count * 2.0**-27)
                assert float((small - 1).abs().max()) < 1e-3, f"{codec}: {small}"
            elif lost:
                assert not total[1:].any(), f"{codec}: without error feedback nothing of it arrives"


def gathered(mine: Tensor) -> list[Tensor]:
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(every, mine)
    return [tensor.double() for tensor in every]


@on_ranks(2)
def check_sign_like_compression_learns_only_with_error_feedback(group: Group) -> None:
    """min slope |x_1| behind a noise of both signs on x_0, so large that the packing drops the slope: x_1 stays at 1.

    The counterexample 1 of arXiv:1901.09847, for codecs in the place of the sign.
    """
    slope, alone = 0.01, group.rank == 0  # one rank alone has the slope: half a step of the sum must not vanish
    for codec in [codec for codec in CODECS if CODEC_FLOOR[codec] > 0]:
        moved = {}
        for error_feedback in (True, False):
            model = Values(32)
            nn.init.ones_(model.weight)
            ddp, hook = wrapped(codec, error_feedback, model)
            optimizer = torch.optim.SGD(ddp.parameters(), lr=1.0)
            for step in range(120 * group.world_size):
                gradient = torch.zeros(32)
                gradient[0] = (-1.0) ** step * 4 * slope / CODEC_FLOOR[codec]
                gradient[1] = slope * float(model.weight[1].detach().sign()) if alone else 0.0
                optimizer.zero_grad()
                ddp(gradient).backward()
                optimizer.step()
            moved[error_feedback] = float(model.weight[1].detach())
            hook.close()
        assert moved[False] == 1.0, f"{codec}: {moved}"
        assert abs(moved[True]) < 0.3, f"{codec}: {moved}"


@on_ranks(2, 3)
def check_extreme_values_survive(group: Group) -> None:
    R, rank = group.world_size, group.rank
    for codec, error_feedback in itertools.product(CODECS, (True, False)):
        ddp, hook = wrapped(codec, error_feedback, Values(40))
        for large, small in ((8e4, 0.0), (3e38, 0.0), (1e-7, 1e-7), (1e-30, 1e-30)):
            want = (large + (R - 1) * small) / R
            total = steps(ddp, iter([torch.full((40,), large if rank == 0 else small)]))
            assert float((total - want).abs().max()) <= (1e-6 + 4 * LOST[codec]) * want, (codec, large, total)
            for flat in hook.state._flats.values():
                flat.zero_()
        for value in (math.nan, math.inf):
            gradient = torch.ones(40)
            gradient[3] = value if rank == R - 1 else 1.0
            total = steps(ddp, iter([gradient]))
            assert not bool(total[3].isfinite()), f"{codec}: {value} became {total[3]}"
            total = steps(ddp, iter([torch.ones(40)]))
            assert bool(total.isfinite().all()), f"{codec}: the step after is whole again"
        hook.close()


@on_ranks(2, 3)
def check_state_goes_on_with_the_same_bits(group: Group) -> None:
    rank = group.rank
    first, hook = wrapped("fp16")
    for step in range(2):
        first.zero_grad()
        first(data(step, rank)).backward()
    state = hook.state_dict(first)
    assert set(state) == {f"residual.{name}" for name, _ in net().named_parameters()}
    assert all(bool(residual.any()) for residual in state.values())
    second, other = wrapped("fp16")
    other.load_state_dict(state, second)
    loaded = other.state_dict(second)
    assert all(torch.equal(loaded[name], residual) for name, residual in state.items())
    second(data(0, rank)).backward()  # after a first step DDP has the buckets that it keeps
    other.load_state_dict(state, second)
    for step in (2, 3):
        for ddp in (first, second):
            ddp.zero_grad()
            ddp(data(step, rank)).backward()
    for name, residual in hook.state_dict(first).items():
        assert torch.equal(residual, other.state_dict(second)[name]), name
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert torch.equal(p.grad, q.grad)
    text = raised(lambda: other.load_state_dict({"residual.gone": torch.zeros(2)}, second), ValueError)
    assert "'residual.gone' of shape [2] belongs to nothing in this model" in text
    for used in (hook, other):
        used.close()


@on_ranks(2)
def check_arguments(group: Group) -> None:
    assert "comm_hook: codec must be one of 'none', " in raised(lambda: comm_hook("zip"), ValueError)
    hook = comm_hook("fp16")
    assert "got Linear" in raised(lambda: hook.register(nn.Linear(2, 2)), TypeError)
    wide = DistributedDataParallel(nn.Linear(2, 2).double())
    text = raised(lambda: hook.register(wide), ValueError)
    assert "parameter 'weight': codec 'fp16' needs a dtype of float32" in text
    low = DistributedDataParallel(nn.Linear(2, 2, dtype=torch.bfloat16))
    low.register_comm_hook(None, hook)  # in torch's own words; the state is the hook's
    low(torch.ones(1, 2, dtype=torch.bfloat16)).sum().backward()
    assert torch.equal(low.module.bias.grad, torch.ones(2, dtype=torch.bfloat16))
    alone = dist.new_group([group.rank], use_local_synchronization=True)
    text = raised(lambda: hook.register(DistributedDataParallel(nn.Linear(2, 2), process_group=alone)), ValueError)
    assert text.startswith("comm_hook: group must have the ranks of the model, ["), text
    hook.close()


def check_a_late_rank_is_named() -> None:
    """A rank that skips the backward pass: the others hear of it within the timeout, in this pass and in the next."""
    with Group.open(timeout_s=1.0) as group:
        ddp = DistributedDataParallel(net())
        hook = comm_hook("fp16", group=group)
        hook.register(ddp)
        loss = ddp(data(0, 0))
        if group.rank != 1:
            text = raised(loss.backward, RuntimeError)
            late = r"(ranks \[1\]|rank 1) did not signal within 1 s"  # detected, or reported by a rank that detected it
            assert re.search(late, text), text
            again = raised(lambda: hook.lane().submit(lambda: None), (TimeoutError,))
            assert re.search(late, again), again
        dist.barrier()
        hook.close()


def sharded(codec: str, error_feedback: bool = True) -> tuple[Net, CommHook]:
    model = net()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (model.first, model.second, model):
        fully_shard(module, mesh=mesh)
    hook = comm_hook(codec, error_feedback)
    hook.register(model)
    return model, hook


@on_ranks(2)
def check_fully_sharded_averages(group: Group) -> None:
    R, rank = group.world_size, group.rank
    sent = {}
    for codec, error_feedback in itertools.product(CODECS, (True, False)):
        model, hook = sharded(codec, error_feedback)
        whole = net()
        for step in range(3):
            model.zero_grad()
            hook.reset_stats()
            model(data(step, rank)).backward()
            sent[codec] = hook.stats()["wire_bytes"]
            assert_average(model, true_average(whole, step, R), codec, f"fully_shard, step {step}")
        assert sent[codec] == sum(wire_bytes(codec, n) for n in part_numels(R)) * (R - 1), f"{codec}: {sent}"
        state = hook.state_dict(model)
        if hook.error_feedback:
            assert set(state) == {
                f"residual.{n}:{p * R}" for n, p in zip(("first", "second", ""), part_numels(R), strict=True)
            }
            other, again = sharded(codec)
            again.load_state_dict(state, other)
            for m in (model, other):
                m.zero_grad()
                m(data(9, rank)).backward()
            for name, residual in hook.state_dict(model).items():
                assert torch.equal(residual, again.state_dict(other)[name]), name
            again.close()
        else:
            assert state == {}
        hook.close()


def part_numels(R: int) -> list[int]:
    """Values of a rank's part of each module's message: rows are dealt out in even numbers, filled up with zeros."""
    shapes = {"first": [(24, 6), (24,)], "second": [(20, 24), (20,)], "third": [(3, 20), (3,)]}
    return [sum(-(-s[0] // R) * math.prod(s[1:]) for s in found) for found in shapes.values()]


@on_ranks(2)
def check_fully_sharded_trouble(group: Group) -> None:
    model, hook = sharded("fp16")
    model.set_gradient_divide_factor(3.0)  # type: ignore[operator]
    text = raised(lambda: model(data(0, 0)).backward(), (ValueError, RuntimeError))
    assert "gradients must be averaged or summed (no set_gradient_divide_factor)" in text
    hook.close()


@on_processes(globals())
def test_ranks_average_through_the_hook(run: Run) -> None:
    run()


def test_a_rank_that_skips_backward_is_named() -> None:
    run_ranks(check_a_late_rank_is_named, 3, fresh=True)
