"""What befalls a save or a checkpoint: kills at every step, full disks, files that are not what was written."""

from __future__ import annotations

import json
import pickle
import resource
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from tests.harness.checkpoints import adamw, learn, small_gpt
from tpkernels import checkpoint
from tpkernels.checkpoint.files import digest_of, read_manifest, write_manifest
from tpkernels.comm.group import Group, resolve
from tpkernels.errors import CheckpointError, PeerLostError
from tpkernels.testing import faults, run_ranks, run_ranks_outcomes

KILLS = [  # (rank, function, which call, step that is the last good one then)
    (1, "os.write", 3, 1), (1, "os.fsync", 1, 1), (1, "tpkernels.checkpoint.manifest.describe", 1, 1),
    (0, "os.write", 3, 1), (0, "tpkernels.checkpoint.api.write_manifest", 1, 1), (0, "os.fsync", 2, 1),
    (0, "os.fsync", 3, 1), (0, "pathlib.Path.rename", 1, 1), (0, "os.fsync", 4, 2),
]  # fmt: skip


def save_and_die(folder: str, rank: int, target: str, call: int) -> str:
    with Group.open() as group:
        model = small_gpt(group)
        optimizer = adamw(model)
        checkpoint.save(model, Path(folder, "step-1"), group=group, optimizer=optimizer, step=1)
        learn(model, optimizer, range(1))
        planted = faults.at_call(target, call, faults.kill_myself) if group.rank == rank else nullcontext()
        with planted, pytest.raises(PeerLostError, match="one of them died or left"):
            checkpoint.save(model, Path(folder, "step-2"), group=group, optimizer=optimizer, step=2)
        return "raised"


@pytest.mark.parametrize(("rank", "target", "call", "good"), KILLS, ids=lambda value: str(value).rpartition(".")[2])
def test_a_rank_killed_at_any_moment_of_a_save_leaves_the_last_good_checkpoint(
    tmp_path: Path, rank: int, target: str, call: int, good: int
) -> None:
    outcomes = run_ranks_outcomes(save_and_die, 2, str(tmp_path), rank, target, call)
    assert outcomes[rank].exitcode == -signal.SIGKILL
    assert outcomes[1 - rank].value == "raised", outcomes[1 - rank].error
    last = checkpoint.latest(tmp_path)
    assert last == tmp_path / f"step-{good}"
    model = small_gpt(resolve(None), seed=5)
    optimizer = adamw(model)
    assert checkpoint.load(model, last, optimizer=optimizer).step == good
    checkpoint.save(model, tmp_path / "step-3")
    assert not list(tmp_path.glob(".saving-*")), "what the killed save left is removed"


def fail_to_write(folder: str) -> None:
    with Group.open() as group:
        model, root = small_gpt(group), Path(folder)
        checkpoint.save(model, root / "step-1", group=group, step=1)
        for rank, call in ((1, 1), (1, 4), (0, 2)):
            planted = faults.at_call("os.write", call, faults.full_disk) if group.rank == rank else nullcontext()
            with planted, pytest.raises(CheckpointError, match=rf"rank {rank}: .*No space left on device"):
                checkpoint.save(model, root / "step-2", group=group, step=2)
        check_a_limit_of_the_kernel(group, model, root)
        for call in (2, 3):  # syncing the manifest and the folder
            planted = faults.at_call("os.fsync", call, faults.full_disk) if group.rank == 0 else nullcontext()
            with planted, pytest.raises(CheckpointError, match=r"rank 0: .*No space left on device"):
                checkpoint.save(model, root / "step-2", group=group, step=2)
        with faults.short_writes(7):
            checkpoint.save(model, root / "short", group=group, step=3)
        assert checkpoint.load(model, root / "short", group=group).step == 3
        handle = failing_in_the_background(group, model, root)
        for _ in range(2):
            with pytest.raises(CheckpointError, match=r"rank 1: .*No space left on device"):
                handle.wait()
        failing_in_the_background(group, model, root)  # nobody waits: the next save tells
        with pytest.raises(CheckpointError, match=r"step-4: rank 1: .*No space left on device"):
            checkpoint.save(model, root / "step-5", group=group)
        checkpoint.save(model, root / "step-5", group=group)
        assert sorted(p.name for p in root.iterdir()) == ["short", "step-1", "step-5"]


def check_a_limit_of_the_kernel(group: Group, model: nn.Module, root: Path) -> None:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    if group.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, old[1]))
    try:
        with pytest.raises(CheckpointError, match=r"rank 1: .*File too large"):
            checkpoint.save(model, root / "step-2", group=group, step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def failing_in_the_background(group: Group, model: nn.Module, root: Path) -> checkpoint.SaveHandle:
    planted = faults.at_call("os.write", 2, faults.full_disk) if group.rank == 1 else nullcontext()
    with planted:
        handle = checkpoint.save_async(model, root / "step-4", group=group)
        while not handle.done():
            handle._thread.join()
    return handle


def test_a_full_disk_is_an_error_on_all_ranks_whenever_it_fills_up(tmp_path: Path) -> None:
    run_ranks(fail_to_write, 2, str(tmp_path))


@pytest.fixture
def saved(tmp_path: Path) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 5))
    return model, checkpoint.save(model, tmp_path / "x")


FILE = "rank-0-of-1.safetensors"


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest as somebody would who knows how its digest is made."""
    manifest = read_manifest(folder)
    change(manifest)
    (folder / "manifest.json").unlink()
    write_manifest(folder, manifest)


def forge(folder: Path, data: bytes) -> None:
    """Put another file in the place of a rank's, with its digest in the manifest."""
    (folder / FILE).write_bytes(data)
    rewrite(folder, lambda manifest: manifest["files"].update({FILE: digest_of(folder / FILE)}))


def header_of(folder: Path) -> tuple[dict[str, Any], bytes]:
    data = (folder / FILE).read_bytes()
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def with_header(header: dict[str, Any], rest: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + rest


def test_files_that_are_not_those_of_the_save_are_named(saved: tuple[nn.Module, Path]) -> None:
    model, folder = saved
    data = (folder / FILE).read_bytes()
    (folder / "rank-1-of-1.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"rank-1-of-1\.safetensors does not belong to the checkpoint: move it"):
        checkpoint.load(model, folder)
    (folder / "rank-1-of-1.safetensors").unlink()
    for damaged in (data[:-1], data[:100], b"", data + b"x"):
        (folder / FILE).write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"rank-0-of-1\.safetensors is damaged"):
            checkpoint.load(model, folder)
        with pytest.raises(CheckpointError, match=r"rank-0-of-1\.safetensors is damaged"):
            checkpoint.reshard(folder, folder.parent / "y", tp=2)
    (folder / FILE).write_bytes(data)
    checkpoint.load(model, folder)


def test_headers_that_lie_are_refused_even_with_the_right_digest(saved: tuple[nn.Module, Path]) -> None:
    model, folder = saved
    before = [p.clone() for p in model.parameters()]
    header, rest = header_of(folder)
    names = [name for name in header if name.startswith("model/")]
    overlapping = header | {names[1]: header[names[1]] | {"data_offsets": header[names[0]]["data_offsets"]}}
    other = {("model/other" if name == names[0] else name): entry for name, entry in header.items()}
    wide = header | {names[0]: header[names[0]] | {"shape": header[names[0]]["shape"][::-1]}}
    cases = {
        "overlap": with_header(overlapping, rest),
        "a huge header": (1 << 60).to_bytes(8, "little") + with_header(header, rest)[8:],
        "a hole": with_header(header, rest + b"x" * 8),
        "no JSON": (5).to_bytes(8, "little") + b"hello" + rest,
        "another name": with_header(other, rest),
        "another shape": with_header(wide, rest),
        "a pickle": pickle.dumps({"model/0.weight": torch.zeros(3, 5)}),
    }
    for what, data in cases.items():
        forge(folder, data)
        with pytest.raises(CheckpointError, match=r"rank-0-of-1\.safetensors is damaged"):
            checkpoint.load(model, folder)
            pytest.fail(what)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_a_manifest_that_does_not_fit_its_files_is_refused(saved: tuple[nn.Module, Path]) -> None:
    model, folder = saved
    good = (folder / "manifest.json").read_text()
    cases: list[tuple[Callable[[dict[str, Any]], None], str]] = [
        (lambda m: m["layout"].update(tp=2), r"2 ranks of 1 replicas wrote it, and lists rank-0-of-1"),
        (lambda m: m["layout"].update(dp=2), r"1 ranks of 2 replicas wrote it"),
        (lambda m: m["layout"].pop("dp"), r"layout\['dp'\] must be a whole number of 1 or more, got None"),
        (lambda m: m["tensors"]["model/0.weight"].pop("runs"), r"entry of model/0\.weight makes no sense"),
        *((lambda m, v=v: m.update(version=v), rf"has format version {v} and this tpkernels reads 2") for v in (1, 9)),
        (lambda m: m.update(version=2.0), r"has format version 2\.0 and this tpkernels reads 2"),
        (lambda m: m["tensors"]["model/0.weight"].update(dim=7), r"entry of model/0\.weight makes no sense"),
        (lambda m: m["tensors"]["model/0.weight"].update(dim=0, runs=[[[0, 2]]]), r"is damaged|no rank holds index 2"),
        (lambda m: m["tensors"]["model/0.weight"].update(dtype="load"), r"makes no sense"),
        (lambda m: m["tensors"].pop("model/0.weight"), r"lacks 0\.weight"),
        (lambda m: m["files"].update({"../x": "0"}), r"lists \.\./x"),
    ]
    for change, message in cases:
        rewrite(folder, change)
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load(model, folder)
        (folder / "manifest.json").write_text(good)
    checkpoint.load(model, folder)


def test_nothing_is_unpickled_on_load(saved: tuple[nn.Module, Path]) -> None:
    model, folder = saved
    traps = ("pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load")
    with mock.patch.multiple("torch", load=mock.Mock(side_effect=AssertionError)):
        patches = [mock.patch(trap, side_effect=AssertionError(trap)) for trap in traps[:3]]
        for patch in patches:
            patch.start()
        try:
            checkpoint.load(model, folder)
            checkpoint.reshard(folder, folder.parent / "y", tp=2)
            checkpoint.load(model, folder.parent / "y")
        finally:
            for patch in patches:
                patch.stop()


def test_what_a_checkpoint_cannot_hold_is_said_before_anything_is_written(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="extra must be what JSON holds"):
        checkpoint.save(model, tmp_path / "x", extra={"a": torch.zeros(1)})
    stranger = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(CheckpointError, match="the optimizer has parameters that the model does not have"):
        checkpoint.save(model, tmp_path / "x", optimizer=stranger)
    model.register_buffer("bad", torch.zeros(1, dtype=torch.complex64))
    with pytest.raises(CheckpointError, match=r"model/bad is torch\.complex64"):
        checkpoint.save(model, tmp_path / "x")
    assert checkpoint.latest(tmp_path) is None


def test_fields_that_a_manifest_need_not_have_are_ignored(saved: tuple[nn.Module, Path]) -> None:
    model, folder = saved

    def add(manifest: dict[str, Any]) -> None:
        manifest["world_size"], manifest["layout"]["pp"] = 1, 1
        for entry in manifest["tensors"].values():
            entry["stage"] = 0

    rewrite(folder, add)
    other = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 5))
    checkpoint.load(other, folder)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_optimizers_keep_numbers_missing_state_and_their_groups(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    sgd = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.5), momentum=0.9)
    model[0](torch.ones(1, 2)).sum().backward()
    sgd.step()
    sgd.state[model[0].weight]["note"] = 3
    checkpoint.save(model, tmp_path / "x", optimizer=sgd)
    other = torch.optim.SGD(model.parameters(), lr=torch.tensor(1.0), momentum=0.0)
    checkpoint.load(model, tmp_path / "x", optimizer=other)
    assert torch.equal(other.param_groups[0]["lr"], torch.tensor(0.5))
    assert other.state[model[0].weight]["note"] == 3
    assert torch.equal(other.state[model[0].weight]["momentum_buffer"], sgd.state[model[0].weight]["momentum_buffer"])
    assert not other.state.get(model[1].weight)
    swapped = torch.optim.SGD(reversed(list(model.parameters())), lr=1.0, momentum=0.9)
    checkpoint.load(model, tmp_path / "x", optimizer=swapped)  # state belongs to names, not to places in a group
    for parameter in model.parameters():
        assert swapped.state.get(parameter, {}).keys() == sgd.state.get(parameter, {}).keys()
        for field, value in sgd.state.get(parameter, {}).items():
            torch.testing.assert_close(swapped.state[parameter][field], value, rtol=0, atol=0)
    parted = [{"params": [*model[1].parameters()]}, {"params": [*model[0].parameters()]}]
    with pytest.raises(CheckpointError, match=r"other parameter groups .* 1\.weight in place of 0\.weight"):
        checkpoint.load(model, tmp_path / "x", optimizer=torch.optim.SGD(parted, lr=1.0, momentum=0.9))
