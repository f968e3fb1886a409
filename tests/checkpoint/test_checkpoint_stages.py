"""Checkpoints of pipeline stages: each parameter once, bit for bit in any other shape, and exact resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.harness.pipelines import Divided, Shape, tiny_llama
from tpkernels import checkpoint
from tpkernels.comm.group import Group
from tpkernels.comm.mesh import Mesh
from tpkernels.errors import CheckpointError
from tpkernels.testing import run_ranks


def saved_by(shape: Shape, folder: Path, source: Path | None) -> None:
    """Load a checkpoint into a shape, or train there for two steps, and save."""
    with Mesh.open(tp=shape.tp, dp=shape.dp, pp=shape.pp) as mesh:
        divided = Divided(shape, mesh, seed=0 if source is None else 1)
        if source is not None:
            checkpoint.load(divided.model, source, optimizer=divided.optimizer, **divided.groups)
        divided.begin()
        for step in range(2 if source is None else 0):
            divided.step(step)
        checkpoint.save(divided.model, folder, optimizer=divided.optimizer, step=2, extra={"a": 1}, **divided.groups)
        divided.close()


def uncut(folder: Path) -> tuple[nn.Module, dict[str, Tensor]]:
    """The whole model and the state of its optimizer, of a checkpoint of any shape."""
    model = tiny_llama(seed=5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    with Group.open() as world:
        loaded = checkpoint.load(model, folder, group=world, optimizer=optimizer)
    assert (loaded.step, loaded.extra, loaded.missing, loaded.unexpected) == (2, {"a": 1}, (), ())
    return model, {n: optimizer.state[p]["momentum_buffer"] for n, p in model.named_parameters()}


def check_any_shape_reads_any_other(folder: str) -> None:
    root = Path(folder)
    names = {f"model/{name}" for name, _ in tiny_llama().named_parameters()}
    first: tuple[nn.Module, dict[str, Tensor]] | None = None
    before = None
    shapes = (
        Shape(tp=2, pp=2), Shape(pp=4), Shape(pp=2, dp=2, zero=1), Shape(tp=2, dp=2), Shape(tp=2, dp=2, zero=2),
        Shape(dp=4, zero=1), Shape(pp=2, dp=2), Shape(tp=4),
    )  # fmt: skip
    for number, shape in enumerate(shapes):
        here = root / str(number)
        saved_by(shape, here, before)
        manifest = checkpoint.peek(here)
        assert {name for name in manifest["tensors"] if name.startswith("model/")} == names
        assert manifest["layout"].get("pp", 1) == shape.pp
        assert manifest["aliases"] == {"lm_head.weight": "model.embed_tokens.weight"}
        assert {e.get("stage", 0) for e in manifest["tensors"].values()} == set(range(shape.pp))
        params = [name for group in manifest["optimizer"]["groups"] for name in group["params"]]
        assert sorted(params) == sorted(name.removeprefix("model/") for name in names)
        model, momentum = uncut(here)
        first = first or (model, momentum)
        for (name, p), (_, q) in zip(model.named_parameters(), first[0].named_parameters(), strict=True):
            assert torch.equal(p, q), f"{shape.id}: {name}"
            assert torch.equal(momentum[name], first[1][name]), f"{shape.id}: momentum of {name}"
        before = here
    with Group.open() as world:
        if world.rank == 0:
            checkpoint.reshard(root / "1", root / "joined", tp=2, pp=1)
            with pytest.raises(CheckpointError, match="pp must be 1 or that of the checkpoint, 4, got 3"):
                checkpoint.reshard(root / "1", root / "bad", pp=3)
        world.barrier()
    assert checkpoint.peek(root / "joined")["layout"] == {"tp": 2, "dp": 1}
    assert first is not None
    joined = uncut(root / "joined")[0]
    assert all(torch.equal(p, q) for p, q in zip(joined.parameters(), first[0].parameters(), strict=True))


def check_resume_with_residuals(folder: str) -> None:
    """Stages of replicas whose gradients are packed: four steps, or two and two from the checkpoint."""
    shape, ends = Shape(pp=2, dp=2, codec="fp16"), []
    with Mesh.open(tp=1, dp=2, pp=2) as mesh:
        for resumed in (False, True):
            divided = Divided(shape, mesh, seed=int(resumed))
            divided.begin()
            both = {"optimizer": divided.optimizer, "aggregator": divided.aggregator, **divided.groups}
            if resumed:
                checkpoint.load(divided.model, Path(folder, "two"), **both)
            for step in range(2 if resumed else 0, 4):
                if step == 2 and not resumed:
                    checkpoint.save(divided.model, Path(folder, "two"), step=2, **both)
                divided.step(step)
            ends.append([p.detach().clone() for p in divided.model.parameters()])
            divided.close()
        assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def check_a_missing_stage_is_named(folder: str) -> None:
    source = Path(folder, "1")
    with Group.open() as world:
        if world.rank == 0:
            name = "rank-0-of-1-stage-2-of-4.safetensors"
            (source / name).unlink()
        world.barrier()
        model = tiny_llama(seed=5)
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(CheckpointError, match="rank-0-of-1-stage-2-of-4"):
            checkpoint.load(model, source, group=world)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def check_stages_on_four_ranks(folder: str) -> None:
    torch.set_num_threads(1)
    check_any_shape_reads_any_other(folder)
    check_resume_with_residuals(folder)
    check_a_missing_stage_is_named(folder)


def test_stages_are_saved_once_and_load_into_any_other_shape(tmp_path: Path) -> None:
    run_ranks(check_stages_on_four_ranks, 4, str(tmp_path))


def test_a_model_with_some_stages_is_not_exported(tmp_path: Path) -> None:
    from tpkernels.pipeline import split_by_layer, take_stages

    model = tiny_llama(2)
    take_stages(model, split_by_layer(model, 2), 0)
    with pytest.raises(CheckpointError, match=r"has pipeline stages \[0\] only"):
        checkpoint.export_hf(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()
