"""Programs of torch.distributed, with gloo and with tpk: nothing but the name differs, and the numbers agree."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.join import Join
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from tests.harness.backends import BACKEND, REFERENCE, needs_backend, on_backend

pytestmark = needs_backend
Values = dict[str, Tensor]
WIDTH, ROWS, STEPS = 24, 8, 4


class Block(nn.Module):
    """A residual MLP with a norm."""

    def __init__(self, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.norm, self.up, self.down = norm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(F.gelu(self.up(self.norm(x))))
        return y


def blocks(norm: type[nn.Module] = nn.LayerNorm, count: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(norm) for _ in range(count)))


def batch(step: int, rank: int, rows: int = ROWS) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(100 * step + rank))


def whole(values: dict[str, Any]) -> Values:
    """Of a state dict, every tensor in full."""
    return {
        name: (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()
        for name, x in values.items()
        if isinstance(x, Tensor)
    }


def trained(model: nn.Module, rank: int, steps: int = STEPS, learning_rate: float = 0.1) -> Values:
    """The losses of every step, the average over the ranks, and the parameters after them."""
    optimizer = torch.optim.SGD(model.parameters(), learning_rate, momentum=0.9)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(batch(step, rank)).float().square().mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        average = loss.detach().clone()
        dist.all_reduce(average, dist.ReduceOp.SUM)
        losses += [average / dist.get_world_size(), norm.full_tensor() if isinstance(norm, DTensor) else norm]
    return {"losses": torch.stack(losses), **whole(model.state_dict())}


def ddp() -> Values:
    """Small buckets, views of them as gradients, and buffers that rank 0 sends."""
    model = blocks(nn.BatchNorm1d)
    wrapped = DistributedDataParallel(model, bucket_cap_mb=0.002, gradient_as_bucket_view=True)
    found = trained(wrapped, dist.get_rank())
    for name, buffer in wrapped.named_buffers():  # every rank has those of its own last batch
        dist.broadcast(found[name], 0)
        assert dist.get_rank() or torch.equal(found[name], buffer)
    return found


def ddp_packed() -> Values:
    """Gradients travel as fp16."""
    wrapped = DistributedDataParallel(blocks(), bucket_cap_mb=0.002)
    wrapped.register_comm_hook(None, default_hooks.fp16_compress_hook)
    return trained(wrapped, dist.get_rank())


def ddp_uneven() -> Values:
    """Rank r has r + 1 batches: those that are through answer the collectives of the others."""
    wrapped = DistributedDataParallel(blocks(), bucket_cap_mb=0.002)
    optimizer = torch.optim.SGD(wrapped.parameters(), 0.1)
    with Join([wrapped]):
        for step in range(dist.get_rank() + 1):
            optimizer.zero_grad()
            wrapped(batch(step, dist.get_rank())).square().mean().backward()
            optimizer.step()
    return whole(wrapped.state_dict())


def fsdp() -> Values:
    """Every block is a unit, reshards after forward, and the next one is fetched ahead."""
    model = blocks()
    for block in model:
        fully_shard(block)
    fully_shard(model)
    model[0].set_modules_to_forward_prefetch([model[1]])
    return trained(model, dist.get_rank())


def fsdp_bf16() -> Values:
    """Parameters are gathered in bf16, gradients are summed in fp32."""
    model, policy = blocks(), MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    for block in model:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    return trained(model, dist.get_rank())


def fsdp_replicas() -> Values:
    """A mesh of two dimensions: parameters are sharded in one and replicated in the other."""
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    model = blocks()
    for block in model:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return trained(model, dist.get_rank())


def tensor_parallel() -> Values:
    """Columns and rows, the norms on shards of the sequence; every rank has the same batch."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = blocks()
    plan = {
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1)),
    }
    for block in model:
        parallelize_module(block, mesh, plan)
    x = torch.stack([batch(step, 0) for step in range(2)])
    y = model(x.chunk(dist.get_world_size(), 1)[dist.get_rank()])
    y = DTensor.from_local(y, mesh, [Shard(1)]).full_tensor()
    y.square().mean().backward()
    return {"y": y.detach(), **whole({name: p.grad for name, p in model.named_parameters()})}


def cut_logits() -> Values:
    """The loss of logits that no rank has whole."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    head = parallelize_module(nn.Sequential(nn.Linear(WIDTH, 32)), mesh, {"0": ColwiseParallel(use_local_output=False)})
    with loss_parallel():
        loss = F.cross_entropy(head(batch(0, 0)), torch.arange(ROWS))
        loss.backward()
    loss = loss.full_tensor() if isinstance(loss, DTensor) else loss
    return {"loss": loss.detach(), **whole({name: p.grad for name, p in head.named_parameters()})}


def tensor_parallel_and_fsdp() -> Values:
    """A mesh of two dimensions: tensor parallel in one, FSDP in the other."""
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("dp", "tp"))
    model = blocks()
    for block in model:
        parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.1), []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model(batch(step, mesh["dp"].get_local_rank())).square().mean()
        loss.backward()
        optimizer.step()
        dist.all_reduce(loss.detach(), group=mesh["dp"].get_group())
        losses.append(loss.detach())
    return {"losses": torch.stack(losses), **whole(model.state_dict())}


def pipeline() -> Values:
    """1F1B: micro-batches go forward and their gradients back, one stage a rank."""
    rank, stages = dist.get_rank(), dist.get_world_size()
    layers = blocks(count=stages)
    stage = PipelineStage(layers[rank], rank, stages, torch.device("cpu"))

    def loss_fn(y: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(y, target)

    schedule, losses = Schedule1F1B(stage, n_microbatches=4, loss_fn=loss_fn), []
    optimizer = torch.optim.SGD(layers[rank].parameters(), 0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        found: list[Tensor] = []
        if rank == 0:
            schedule.step(batch(step, 0))
        elif rank == stages - 1:
            schedule.step(target=batch(step, 1), losses=found)
        else:
            schedule.step()
        optimizer.step()
        loss = torch.stack(found).mean() if found else torch.zeros(())
        dist.broadcast(loss, stages - 1)
        losses.append(loss.detach())
    parts: list[Any] = [None] * stages
    dist.all_gather_object(parts, whole(layers[rank].state_dict()))
    return {"losses": torch.stack(losses), **{f"{r}.{name}": x for r in range(stages) for name, x in parts[r].items()}}


def checkpoint(folder: str) -> Values:
    """A save in the background while training goes on; what is loaded is what was saved."""
    model = blocks()
    for block in model:
        fully_shard(block)
    fully_shard(model)
    state = {"model": get_model_state_dict(model)}
    before = whole(state["model"])
    saving = dcp.async_save(state, checkpoint_id=folder, process_group=dist.new_group())
    trained(model, dist.get_rank())
    saving.result()
    loaded = {"model": get_model_state_dict(model)}
    dcp.load(loaded, checkpoint_id=folder)
    after = whole(loaded["model"])
    assert all(torch.equal(before[name], after[name]) for name in before)
    return after


def functional() -> Values:
    """A compiled function with collectives of DeviceMesh."""
    import torch.distributed._functional_collectives as funcol

    R, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh("cpu", (R,))

    @torch.compile(backend="aot_eager", fullgraph=True)
    def program(x: Tensor) -> tuple[Tensor, ...]:
        y = funcol.all_reduce(x * 2, "sum", mesh)
        z = funcol.all_gather_tensor(y[:3] + rank, 0, mesh)
        w = funcol.reduce_scatter_tensor(z, "avg", 0, mesh)
        return y, z, w, funcol.all_to_all_single(z, None, None, mesh)

    y, z, w, v = program(batch(0, rank))
    parts: list[Any] = [None] * R
    dist.all_gather_object(parts, (w, v))
    return {
        "y": y.clone(),
        "z": z.clone(),
        "w": torch.cat([p[0] for p in parts]),
        "v": torch.cat([p[1] for p in parts]),
    }


PROGRAMS: list[tuple[Callable[..., Values], int]] = [
    (ddp, 2), (ddp, 3), (ddp_packed, 2), (ddp_uneven, 3), (fsdp, 2), (fsdp, 3), (fsdp_bf16, 2), (fsdp_replicas, 4),
    (tensor_parallel, 2), (tensor_parallel, 4), (cut_logits, 2), (tensor_parallel_and_fsdp, 4), (pipeline, 2),
    (pipeline, 3), (functional, 2),
]  # fmt: skip


def assert_agree(program: Callable[..., Values], ranks: int, *args: Any) -> None:
    """Every rank of tpk has the same values, and they are those of gloo, but for the order of sums."""
    want = on_backend(REFERENCE, program, ranks, *args)
    got = on_backend(BACKEND, program, ranks, *args)
    for name, value in want[0].items():
        assert value.isfinite().all()
        for rank in range(ranks):
            assert torch.equal(got[rank][name], got[0][name]), f"{name}: rank {rank} differs from rank 0"
        # Sums of the ranks in another order, carried on by STEPS steps.
        torch.testing.assert_close(got[0][name], value, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("program, ranks", PROGRAMS, ids=[f"{program.__name__}-{ranks}" for program, ranks in PROGRAMS])
def test_a_program_has_the_numbers_that_it_has_with_gloo(program: Callable[..., Values], ranks: int) -> None:
    assert_agree(program, ranks)


def test_a_checkpoint_saved_in_the_background_is_the_model_of_that_moment(tmp_path: Path) -> None:
    got = on_backend(BACKEND, checkpoint, 2, str(tmp_path))
    want = blocks().state_dict()
    assert got[0].keys() == want.keys()
    assert all(torch.equal(values[name], want[name]) for values in got for name in want)
