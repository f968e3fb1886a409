"""torch's fully_shard over the replicas of a model that is cut: steps, norms and checkpoints of the uncut model.

So is its hybrid form, in which a mesh of two dims has parts in one and whole copies of them in the other.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.harness.parallelize import part_of
from tests.harness.pipelines import CLIP, ROWS, STEPS, Divided, Shape, Uncut, batch_of, tiny_llama
from tests.harness.ranks import nightly
from tpkernels import checkpoint, parallelize
from tpkernels.comm.group import Group
from tpkernels.comm.mesh import Mesh, rows_of
from tpkernels.data_parallel import clip_grad_norm_, comm_hook
from tpkernels.errors import CheckpointError
from tpkernels.pipeline.batches import labels_that_count
from tpkernels.testing import run_ranks


def whole(parameter: Tensor) -> Tensor:
    assert isinstance(parameter, DTensor)
    return parameter.full_tensor().detach()


class Sharded:
    """A model cut over tp ranks, and each part over the replicas."""

    def __init__(self, mesh: Mesh, seed: int, codec: str = "none", *, hybrid: bool = False) -> None:
        assert mesh.dp is not None
        self.mesh, self.model = mesh, tiny_llama(seed=seed)
        parallelize(self.model, group=mesh.tp)
        over = hybrid_of(mesh) if hybrid else DeviceMesh.from_group(mesh.dp.process_group, "cpu")
        for layer in self.model.model.layers:
            fully_shard(layer, mesh=over)
        fully_shard(self.model, mesh=over)
        self.hook = None if codec == "none" else comm_hook(codec, group=mesh.dp)
        if self.hook is not None:
            self.hook.register(self.model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.5, momentum=0.9)
        self.groups = {"group": mesh.tp, "dp_group": mesh.dp}

    def step(self, number: int, *, by_torch: bool) -> tuple[float, float]:
        """The share of this rank in the loss, and the norm of the gradients."""
        assert self.mesh.dp is not None
        batch, rows = batch_of(number), rows_of(ROWS, self.mesh.dp)
        mine = {name: x[rows.start : rows.stop] for name, x in batch.items()}
        share = labels_that_count(self.model, mine) / labels_that_count(self.model, batch) * self.mesh.replicas
        loss = self.model(**mine).loss * share
        loss.backward()
        if by_torch:
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        else:
            norm = clip_grad_norm_(self.model, CLIP, groups=self.mesh.tp)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss), float(norm)


def hybrid_of(mesh: Mesh) -> DeviceMesh:
    """The four replicas of a mesh as two copies of two parts."""
    whole = init_device_mesh("cpu", (2, 2, mesh.tp.world_size), mesh_dim_names=("copy", "part", "tp"))
    return whole["copy", "part"]


def norms_of(uncut: Uncut, number: int) -> tuple[float, float]:
    """The loss and the norm of the gradients of a step of the uncut model."""
    uncut.model.zero_grad()
    loss = uncut.model(**batch_of(number)).loss
    loss.backward()
    norm = float(nn.utils.clip_grad_norm_(uncut.model.parameters(), CLIP))
    uncut.optimizer.step()
    uncut.optimizer.zero_grad()
    return float(loss), norm


def check_steps(mesh: Mesh, *, hybrid: bool = False) -> None:
    """The bounds are those of `check_shape`."""
    for codec, tolerance in (("none", 1e-4), ("fp16", 2e-2))[: 1 if hybrid else 2]:
        sharded, uncut = Sharded(mesh, 0, codec, hybrid=hybrid), Uncut()
        for number in range(STEPS):
            loss, norm = sharded.step(number, by_torch=number % 2 == 1)
            want_loss, want_norm = norms_of(uncut, number)
            total = torch.tensor(loss)
            torch.distributed.all_reduce(total, group=sharded.groups["dp_group"].process_group)
            assert abs(float(total) / mesh.replicas - want_loss) <= tolerance * want_loss
            assert abs(norm - want_norm) <= tolerance * want_norm, (codec, number, norm, want_norm)
        wholes, starts = (dict(m.named_parameters()) for m in (uncut.model, uncut.start))
        for name, p in sharded.model.named_parameters():
            change = float((wholes[name] - starts[name]).abs().max())
            error = float((whole(p) - part_of(p, wholes[name].detach())).abs().max())
            rounding = 4 * STEPS * 2.0**-24 * float(wholes[name].abs().max())
            assert error <= tolerance * change + rounding, (codec, name, error, change)
        if sharded.hook is not None:
            sharded.hook.close()


def check_checkpoints(mesh: Mesh, folder: str, *, hybrid: bool = False) -> None:
    """Of fully_shard, read by one process's model, by zero=1 with other cuts, and by fully_shard again."""
    first = Sharded(mesh, 0, hybrid=hybrid)
    for number in range(2):
        first.step(number, by_torch=False)
    checkpoint.save(first.model, f"{folder}/0", optimizer=first.optimizer, **first.groups)
    uncut = Uncut()
    with Group.open() as world:
        checkpoint.load(uncut.model, f"{folder}/0", group=world, optimizer=uncut.optimizer)
    wholes = dict(uncut.model.named_parameters())
    for name, p in first.model.named_parameters():
        assert torch.equal(whole(p), part_of(p, wholes[name].detach())), name
        momentum = whole(first.optimizer.state[p]["momentum_buffer"])
        assert torch.equal(momentum, part_of(p, uncut.optimizer.state[wholes[name]]["momentum_buffer"])), name
    shape = Shape(tp=mesh.world.world_size // 4, pp=2, dp=2, zero=1)
    with Mesh.open(tp=shape.tp, dp=2, pp=2) as other:
        divided = Divided(shape, other, seed=1)
        checkpoint.load(divided.model, f"{folder}/0", optimizer=divided.optimizer, **divided.groups)
        checkpoint.save(divided.model, f"{folder}/1", optimizer=divided.optimizer, **divided.groups)
        divided.close()
    again = Sharded(mesh, 2, hybrid=hybrid)
    checkpoint.load(again.model, f"{folder}/1", optimizer=again.optimizer, **again.groups)
    for (name, p), q in zip(again.model.named_parameters(), first.model.parameters(), strict=True):
        assert torch.equal(whole(p), whole(q)), name
        one, two = again.optimizer.state[p]["momentum_buffer"], first.optimizer.state[q]["momentum_buffer"]
        assert torch.equal(whole(one), whole(two)), name
    want, got = first.step(2, by_torch=False), again.step(2, by_torch=False)
    assert want == got


def check_everything(folder: str) -> None:
    torch.set_num_threads(1)
    with Mesh.open(tp=2, dp=2) as mesh:
        check_steps(mesh)
        check_checkpoints(mesh, folder)


def check_hybrid(folder: str, tp: int) -> None:
    torch.set_num_threads(1)
    with Mesh.open(tp=tp, dp=4) as mesh:
        check_steps(mesh, hybrid=True)
        check_checkpoints(mesh, folder, hybrid=True)
        model = Sharded(mesh, 0, hybrid=True)
        with (
            Group.open(hybrid_of(mesh)["part"].get_group()) as parts,
            pytest.raises(CheckpointError, match=r"in 2 copies, .* pass these ranks as dp_group, copy by copy"),
        ):
            checkpoint.save(model.model, f"{folder}/2", **(model.groups | {"dp_group": parts}))


@pytest.mark.parametrize("tp", [1, *nightly(2)])
def test_copies_of_parts_are_saved_once_and_load_into_other_shapes(tmp_path: Path, tp: int) -> None:
    run_ranks(check_hybrid, 4 * tp, str(tmp_path), tp)


def test_fully_shard_over_a_cut_model_is_the_uncut_model(tmp_path: Path) -> None:
    run_ranks(check_everything, 4, str(tmp_path))
