"""An error on one rank, of whatever kind, is an error on all ranks; so is what the ranks do not say alike."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.harness.checkpoints import adamw, learn, small_gpt
from tpkernels import checkpoint
from tpkernels.comm.group import Group, resolve
from tpkernels.errors import CheckpointError
from tpkernels.testing import faults, run_ranks

ERRORS: list[BaseException] = [MemoryError("no room"), RuntimeError("a hook"), KeyError("name"), AssertionError("odd")]
MOMENTS = [  # of a save: (rank, function)
    (1, "tpkernels.checkpoint.api.take"), (1, "tpkernels.checkpoint.api.write_tensors"),
    (0, "tpkernels.checkpoint.manifest.describe"), (0, "tpkernels.checkpoint.api.StagingFolder"),
    (0, "tpkernels.checkpoint.api.write_manifest"), (0, "pathlib.Path.rename"),
    (1, "threading.Thread.start"),
]  # fmt: skip


def planted(group: Group, rank: int, target: str, error: BaseException) -> AbstractContextManager[None]:
    def fail() -> None:
        raise error

    return faults.at_call(target, 1, fail) if group.rank == rank else nullcontext()


def fail_to_save(folder: str) -> None:
    root = Path(folder)
    with Group.open() as group:
        model = small_gpt(group)
        checkpoint.save_async(model, root / "begin", group=group).wait()
        for number, (rank, target) in enumerate(MOMENTS):
            error = ERRORS[number % len(ERRORS)]
            text = rf"step-2: rank {rank}: {type(error).__name__}: .*{error.args[0]}"
            if "Thread" not in target:
                with planted(group, rank, target, error), pytest.raises(CheckpointError, match=text) as caught:
                    checkpoint.save(model, root / "step-2", group=group)
                assert group.rank != rank or caught.value.__cause__ is error, "its trace is there where it happened"
            with planted(group, rank, target, error), pytest.raises(CheckpointError, match=text):
                checkpoint.save_async(model, root / "step-2", group=group).wait()
        with planted(group, 1, "tpkernels.checkpoint.api.write_tensors", KeyboardInterrupt()):
            kind, text = (KeyboardInterrupt, None) if group.rank == 1 else (CheckpointError, "1: KeyboardInterrupt")
            with pytest.raises(kind, match=text):
                checkpoint.save(model, root / "step-2", group=group)
        assert group.rank != 0 or sorted(p.name for p in root.iterdir()) == ["begin"]
        checkpoint.save(model, root / "step-2", group=group)
        check_waiting_on_one_rank(group, model, root)
        fail_to_load(group, root / "step-2")


def check_waiting_on_one_rank(group: Group, model: nn.Module, root: Path) -> None:
    """A rank that knows of a failed save does not continue without those that do not."""
    with planted(group, 1, "tpkernels.checkpoint.api.write_tensors", MemoryError()):
        handle = checkpoint.save_async(model, root / "step-3", group=group)
        while not handle.done():
            handle._thread.join()
    if group.rank == 0:
        with pytest.raises(CheckpointError):
            handle.wait()
    with pytest.raises(CheckpointError, match=r"rank 1: .*rank 1: MemoryError"):
        checkpoint.save(model, root / "step-3", group=group)
    checkpoint.save(model, root / "step-3", group=group)


def fail_to_load(group: Group, folder: Path) -> None:
    model = small_gpt(group, seed=7)
    for target in (
        "tpkernels.checkpoint.restore.read",
        "tpkernels.checkpoint.restore._targets",
        "tpkernels.checkpoint.restore._fill",
    ):
        raised_on_all = pytest.raises(CheckpointError, match=r"step-2.*: rank 1: MemoryError: no room")
        with planted(group, 1, target, MemoryError("no room")), raised_on_all:
            checkpoint.load(model, folder, group=group)
    checkpoint.load(model, folder, group=group)
    want = small_gpt(group)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), want.parameters(), strict=True))


def test_an_error_of_any_kind_on_one_rank_is_told_to_all(tmp_path: Path) -> None:
    run_ranks(fail_to_save, 2, str(tmp_path), timeout=60.0)


def export(folder: str) -> None:
    import transformers

    import tpkernels as tpk

    root = Path(folder)
    config = transformers.LlamaConfig(
        vocab_size=12, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    with Group.open() as group:
        torch.manual_seed(0)
        model = tpk.parallelize(transformers.LlamaForCausalLM(config), group=group)
        for rank, target in (
            (0, "tpkernels.checkpoint.export._as_in_files"),
            (1, "tpkernels.checkpoint.export.units_of"),
        ):
            with planted(group, rank, target, MemoryError("no room")), pytest.raises(CheckpointError, match="no room"):
                checkpoint.export_hf(model, root / "out", group=group)
        real = torch.empty

        def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
            if kwargs.get("device") == torch.device("cpu"):
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            return real(*args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            if group.rank == 0:
                patch.setattr(torch, "empty", empty)
            with pytest.raises(CheckpointError, match=r"rank 0: .*can't allocate memory"):
                checkpoint.export_hf(model, root / "out", group=group)
        raised_on_all = pytest.raises(CheckpointError, match="rank 0: MemoryError: no room")
        with planted(group, 0, "transformers.LlamaForCausalLM.save_pretrained", MemoryError("no room")), raised_on_all:
            model.save_pretrained(root / "out")
        assert group.rank != 0 or not list(root.iterdir())
        checkpoint.export_hf(model, root / "out", group=group)
        model.save_pretrained(root / "again")
        assert sorted(p.name for p in root.iterdir()) == ["again", "out"]


def test_an_error_of_any_kind_in_an_export_is_told_to_all(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    run_ranks(export, 2, str(tmp_path), timeout=60.0)


def disagree(folder: str) -> None:
    root = Path(folder)
    with Group.open() as group:
        model, mine = small_gpt(group), group.rank
        optimizer = adamw(model)
        learn(model, optimizer, range(1))
        other = small_gpt(group, dtype=torch.bfloat16 if mine else torch.float32)
        cases: list[tuple[str, dict[str, Any]]] = [
            (r"about step: 0 on rank 0, 1 on rank 1", {"step": mine}),
            (r"about extra\['note'\]: 0 on rank 0, 1 on rank 1", {"extra": {"note": mine}}),
            (r"about extra\['note'\]: null on rank 0", {"extra": {"note": 1} if mine else None}),
            (r"about folder", {"folder": root / f"at-{mine}"}),
            (r"about optimizer: null on rank 0", {"optimizer": optimizer if mine else None}),
            (r"about tensors\['model/blocks.*'dtype'\]: .float32. on rank 0, .bfloat16. on rank 1", {"model": other}),
            (r"about tensors\['model/extra'\]: .*int64", {"model": with_buffer(small_gpt(group), mine)}),
        ]
        for text, change in cases:
            for save in (checkpoint.save, checkpoint.save_async):
                with pytest.raises(CheckpointError, match=f"ranks disagree {text}"):
                    save(**{"model": model, "folder": root / "x", "group": group} | change)
                assert not os.listdir(root), "nothing was written"
        nan = float("nan")
        checkpoint.save(model, root / "x", group=group, extra={"loss": nan})  # equal to itself here


def with_buffer(model: nn.Module, mine: int) -> nn.Module:
    if mine == 0:
        model.register_buffer("extra", torch.zeros(1, dtype=torch.int64))
    return model


def test_ranks_that_would_save_different_things_are_told_before_anything_is_written(tmp_path: Path) -> None:
    run_ranks(disagree, 2, str(tmp_path), timeout=60.0)


def test_a_tensor_that_a_file_cannot_hold_is_named_before_anything_is_written(tmp_path: Path) -> None:
    class Scaled(torch.Tensor):
        """A tensor whose values are not what its memory holds."""

    quantised = torch.zeros(2).as_subclass(Scaled)
    odd: dict[str, Any] = {
        r"model/odd is on the meta device and has no values": torch.zeros(2, device="meta"),
        r"model/odd has layout torch\.sparse_coo": torch.eye(2).to_sparse(),
        r"model/odd is a Scaled, which": quantised,
        r"model/odd is torch\.complex64, which": torch.zeros(2, dtype=torch.complex64),
    }
    for text, tensor in odd.items():
        model = nn.Linear(2, 2)
        model.register_buffer("odd", tensor)
        for save in (checkpoint.save, checkpoint.save_async):
            with pytest.raises(CheckpointError, match=text):
                save(model, tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"model/weight is a UninitializedParameter: run the model once"):
        checkpoint.save(nn.LazyLinear(2), tmp_path / "x")
    model = nn.Linear(2, 2)
    model.weight.quant_state = object()  # type: ignore[assignment]
    with pytest.raises(CheckpointError, match=r"model/weight is quantised"):
        checkpoint.save(model, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def save_fsdp(folder: str) -> None:
    from torch.distributed.fsdp import fully_shard

    model = nn.Linear(4, 4)
    fully_shard(model)
    needs = r"weight is cut over 2 ranks of group .* pass these ranks as dp_group"
    with Group.open() as group, pytest.raises(CheckpointError, match=needs):
        checkpoint.save(model, folder, group=group)
    with pytest.raises(CheckpointError, match=needs):
        checkpoint.save(model, folder, group=resolve(None))


def test_parameters_of_fsdp_need_their_ranks(tmp_path: Path) -> None:
    run_ranks(save_fsdp, 2, str(tmp_path / "x"), timeout=60.0)
    assert not list(tmp_path.iterdir())
