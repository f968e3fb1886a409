"""Checkpoints: what goes in comes out, damage is named, a crash leaves the last good one."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
import textwrap
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tpkernels import checkpoint, layers
from tpkernels.comm.group import Group, resolve
from tpkernels.errors import CheckpointError
from tpkernels.shard import join, shard_info
from tpkernels.testing import run_ranks


class Small(nn.Module):
    """One layer of each style, cut unevenly by 2 ranks, and a buffer."""

    def __init__(self, group: Group, width: int = 7) -> None:
        super().__init__()
        self.embedding = layers.VocabParallelEmbedding(5, width, group=group)
        self.up = layers.ColumnParallelLinear(width, 9, group=group, unit=3)
        self.norm = layers.RMSNorm(width, group=group)
        self.down = layers.RowParallelLinear(9, width, group=group, unit=3)
        self.register_buffer("seen", torch.zeros(3, dtype=torch.int64))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(self.norm(self.embedding(ids))))


def trained(group: Group, steps: int = 2) -> tuple[Small, torch.optim.Optimizer]:
    torch.manual_seed(1)
    model = Small(group)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.8, 0.95))
    for _ in range(steps):
        model(torch.arange(5)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        model.seen += 1
    return model, optimizer


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    inner = [v for p in model.parameters() for _, v in sorted(optimizer.state[p].items())]
    return [t.clone() for t in (*model.state_dict().values(), *inner, torch.get_rng_state())]


def one_process(tmp_path: Path, **options: object) -> tuple[Small, Path]:
    group = resolve(None)
    model, optimizer = trained(group)
    return model, checkpoint.save(model, tmp_path / "step-1", group=group, optimizer=optimizer, **options)  # type: ignore[arg-type]


def flip(path: Path, where: int) -> None:
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)


def check_round_trip(folder: str) -> None:
    with Group.open() as group:
        model, optimizer = trained(group)
        torch.rand(group.rank + 1)  # ranks whose random numbers differ must each get their own back
        want = state(model, optimizer)
        checkpoint.save(model, Path(folder, "a"), group=group, optimizer=optimizer, step=2, extra={"note": [1, "x"]})
        other, blank = trained(group, steps=1)
        loaded = checkpoint.load(other, Path(folder, "a"), group=group, optimizer=blank)
        assert (loaded.step, loaded.extra) == (2, {"note": [1, "x"]})
        assert all(torch.equal(a, b) for a, b in zip(state(other, blank), want, strict=True))
        assert blank.param_groups[0]["betas"] == (0.8, 0.95)
        pairs = zip(model.parameters(), other.parameters(), strict=True)
        assert all(shard_info(a) == shard_info(b) for a, b in pairs)
        check_manifest(model, Path(folder, "a"), group)


def check_manifest(model: nn.Module, folder: Path, group: Group) -> None:
    """The manifest is enough to put full tensors together from the files."""
    files = [load_file(folder / f"rank-{r}-of-{group.world_size}.safetensors") for r in range(group.world_size)]
    entry = checkpoint.peek(folder)["tensors"]
    for name, module in model.named_modules():
        if hasattr(module, "full_weight"):
            key = f"model/{name}.weight"
            cut = entry[key]
            whole = join([f[key] for f in files], cut["dim"], cut["unit"])
            assert torch.equal(whole, module.full_weight()), key
            assert list(whole.shape) == cut["shape"]
            assert entry[f"optimizer/{name}.weight/exp_avg"]["dim"] == cut["dim"]
    assert [entry[f"model/{n}.weight"]["style"] for n in ("embedding", "up", "norm", "down")] == [
        "vocab", "column", "replicate", "row",
    ]  # fmt: skip


def check_a_full_disk(folder: str) -> None:
    with Group.open() as group:
        model, optimizer = trained(group)
        checkpoint.save(model, Path(folder, "step-1"), group=group, optimizer=optimizer, step=1)
        full = OSError(errno.ENOSPC, "No space left on device")
        broken = mock.patch.object(checkpoint.api, "write_tensors", side_effect=full)
        with (
            broken if group.rank == 1 else nullcontext(),
            pytest.raises(CheckpointError, match=r"rank 1: .*No space left on device"),
        ):
            checkpoint.save(model, Path(folder, "step-2"), group=group, optimizer=optimizer, step=2)
        assert checkpoint.latest(folder) == Path(folder, "step-1")
        assert checkpoint.load(model, Path(folder, "step-1"), group=group).step == 1


def test_two_ranks_get_everything_back_bit_for_bit(tmp_path: Path) -> None:
    run_ranks(check_round_trip, 2, str(tmp_path))


def test_a_full_disk_on_one_rank_fails_on_all_and_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    run_ranks(check_a_full_disk, 2, str(tmp_path))


def test_a_flipped_bit_is_named_with_its_file(tmp_path: Path) -> None:
    model, folder = one_process(tmp_path)
    path = folder / "rank-0-of-1.safetensors"
    before = [p.clone() for p in model.parameters()]
    for where in (3, path.stat().st_size // 2, path.stat().st_size - 1):
        flip(path, where)
        with pytest.raises(CheckpointError, match=r"rank-0-of-1\.safetensors is damaged .* load an earlier checkpoint"):
            checkpoint.load(model, folder)
        flip(path, where)
    checkpoint.load(model, folder)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_any_flipped_bit_of_the_manifest_is_noticed(tmp_path: Path) -> None:
    _, folder = one_process(tmp_path, extra={"loss": 1.25})
    path = folder / "manifest.json"
    for where in range(0, path.stat().st_size, 97):
        flip(path, where)
        if json_or_none(path) != json_or_none_flipped_back(path, where):  # whitespace says nothing
            with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
                checkpoint.peek(folder)
        flip(path, where)
    checkpoint.peek(folder)


def json_or_none(path: Path) -> object:
    try:
        return json.loads(path.read_text())
    except ValueError:
        return None


def json_or_none_flipped_back(path: Path, where: int) -> object:
    flip(path, where)
    try:
        return json_or_none(path)
    finally:
        flip(path, where)


def test_a_missing_file_and_a_missing_checkpoint_are_named(tmp_path: Path) -> None:
    model, folder = one_process(tmp_path)
    (folder / "rank-0-of-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"rank-0-of-1\.safetensors is missing"):
        checkpoint.load(model, folder)
    with pytest.raises(CheckpointError, match=r"nowhere is not a checkpoint"):
        checkpoint.load(model, tmp_path / "nowhere")


def test_a_model_of_other_sizes_or_names_is_told_which(tmp_path: Path) -> None:
    group = resolve(None)
    _, folder = one_process(tmp_path)
    with pytest.raises(CheckpointError, match=r"embedding\.weight is torch\.float32 \[5, 7\] in it and .* \[5, 8\]"):
        checkpoint.load(Small(group, width=8), folder)
    with pytest.raises(CheckpointError, match=r"it lacks bias, weight: build the model that was saved"):
        checkpoint.load(nn.Linear(2, 2), folder)
    with pytest.raises(CheckpointError, match=r"the model lacks, down\.bias, down\.weight, embedding\.weight and 4"):
        checkpoint.load(nn.Identity(), folder)
    with pytest.raises(CheckpointError, match=r"holds the state of AdamW: load it into that, not into SGD"):
        other = Small(group)
        checkpoint.load(other, folder, optimizer=torch.optim.SGD(other.parameters(), lr=1.0))


def test_tied_weights_are_saved_once_and_stay_tied(tmp_path: Path) -> None:
    def tied() -> nn.ModuleDict:
        torch.manual_seed(4)
        model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
        model["b"].weight = model["a"].weight
        return model

    model = tied()
    folder = checkpoint.save(model, tmp_path / "x")
    assert "model/b.weight" not in load_file(folder / "rank-0-of-1.safetensors")
    other = tied()
    nn.init.zeros_(other["a"].weight)
    checkpoint.load(other, folder)
    assert other["b"].weight is other["a"].weight
    assert torch.equal(other["b"].weight, model["a"].weight)


def test_a_checkpoint_is_never_overwritten(tmp_path: Path) -> None:
    model, folder = one_process(tmp_path)
    with pytest.raises(CheckpointError, match=r"exists already"):
        checkpoint.save(model, folder)


@pytest.mark.parametrize("what", ["expanded", "inference"])
def test_a_model_that_cannot_be_filled_is_left_as_it_was(tmp_path: Path, what: str) -> None:
    def model() -> nn.Module:
        made = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        if what == "expanded":
            made[1].weight = nn.Parameter(torch.ones(1, 4).expand(4, 4))
        else:
            with torch.inference_mode():
                made[1].weight = nn.Parameter(torch.ones(4, 4), requires_grad=False)
        return made

    checkpoint.save(model(), tmp_path / "saved")
    other = model()
    before = [value.clone() for value in other.state_dict().values()]
    reason = {"expanded": "share memory", "inference": "inference mode"}[what]
    with pytest.raises(CheckpointError, match=rf"1\.weight of the model cannot be filled: .*{reason}"):
        checkpoint.load(other, tmp_path / "saved")
    assert all(map(torch.equal, before, other.state_dict().values()))


def test_only_complete_checkpoints_count_and_old_ones_go(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    for step in (1, 2, 10):
        checkpoint.save(model, tmp_path / f"step-{step:04d}", step=step)
    (tmp_path / "step-9999").mkdir()
    assert checkpoint.latest(tmp_path) == tmp_path / "step-0010"
    checkpoint.prune(tmp_path, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-0002", "step-0010", "step-9999"]
    assert checkpoint.latest(tmp_path / "none") is None
    for keep, stay in ((3, ["0002", "0010", "0011"]), (2, ["0002", "0011"]), (1, ["0002", "0011"])):
        checkpoint.save(model, tmp_path / "step-0011", step=11) if keep == 3 else None
        checkpoint.prune(tmp_path, keep, spare=tmp_path / "step-0002")
        assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-{n}" for n in (*stay, "9999")], keep
    checkpoint.prune(tmp_path, keep=1, spare=tmp_path / "step-0011")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-0011", "step-9999"]


def test_what_is_spared_may_be_named_in_any_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent, model = tmp_path / "all", nn.Linear(2, 2)
    for step in (1, 2, 3):
        checkpoint.save(model, parent / f"step-{step}", step=step)
    (tmp_path / "other").symlink_to(parent)
    (tmp_path / "best").symlink_to(parent / "step-1")
    monkeypatch.chdir(tmp_path)
    for named in (parent, "all", "other"):
        for spare in (parent / "step-1", "all/step-1", "other/../all/step-1/", "other/step-1", "best"):
            checkpoint.prune(named, keep=1, spare=spare)
            assert sorted(p.name for p in parent.iterdir()) == ["step-1", "step-3"], (named, spare)


def test_links_in_the_folder_of_checkpoints_are_neither_removed_nor_counted(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    for step in (1, 2, 3):
        checkpoint.save(model, tmp_path / f"at-{step}", step=step)
    (tmp_path / "best").symlink_to("at-1")
    (tmp_path / "newest").symlink_to("at-3")
    checkpoint.prune(tmp_path, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["at-2", "at-3", "best", "newest"]
    assert checkpoint.peek(tmp_path / "newest")["step"] == 3


@pytest.mark.parametrize("moment", ["os.fsync", "pathlib.Path.rename", "tpkernels.checkpoint.api.write_manifest"])
def test_a_process_killed_while_saving_leaves_the_last_good_checkpoint(tmp_path: Path, moment: str) -> None:
    module, _, name = moment.rpartition(".")
    code = f"""
        import os, pathlib, signal, torch, tpkernels.checkpoint
        from torch import nn
        model = nn.Linear(2, 2)
        nn.init.ones_(model.weight)
        tpkernels.checkpoint.save(model, "step-1", step=1)
        nn.init.zeros_(model.weight)
        {module}.{name} = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
        tpkernels.checkpoint.save(model, "step-2", step=2)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, check=False)
    assert done.returncode == -signal.SIGKILL
    assert checkpoint.latest(tmp_path) == tmp_path / "step-1"
    model = nn.Linear(2, 2)
    assert checkpoint.load(model, tmp_path / "step-1").step == 1
    assert torch.equal(model.weight, torch.ones(2, 2))
    checkpoint.save(model, tmp_path / "step-2", step=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-1", "step-2"], "what the killed save left is removed"
