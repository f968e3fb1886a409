"""A manifest that somebody changed changes nothing in the model; models that are not what was saved."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.harness.checkpoints import adamw, learn, small_gpt
from tpkernels import checkpoint
from tpkernels.checkpoint.files import read_manifest, write_manifest
from tpkernels.comm.group import Group, resolve
from tpkernels.errors import CheckpointError
from tpkernels.testing import run_ranks

ODD: list[Any] = [None, -1, 0, 7, 2**70, 1.5, float("nan"), "x", "", True, [], [-1, 2], [[0, 1]], {}, {"x": 1}]
KEPT = ("model/blocks.0.up.weight", "model/norm.weight", "optimizer/blocks.0.down.weight/exp_avg")


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every field of a JSON value, by the keys that lead to it."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        if not (path == ("tensors",) and key not in KEPT):
            yield (*path, key)
            yield from places(inner, (*path, key))


def changed(manifest: dict[str, Any], path: tuple[Any, ...], odd: Any) -> dict[str, Any]:
    """The manifest with a field removed (...), there twice, or of another type or value."""
    made = copy.deepcopy(manifest)
    holder = made
    for key in path[:-1]:
        holder = holder[key]
    if odd is ...:
        del holder[path[-1]]
    elif odd == "twice" and isinstance(holder, list):
        holder.append(holder[path[-1]])
    elif odd == "twice":
        holder["x" + path[-1]] = holder[path[-1]]
    else:
        holder[path[-1]] = odd
    return made


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
    inner = [v for p in model.parameters() for _, v in sorted(optimizer.state[p].items())]
    options = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    return [*model.state_dict().values(), *inner, torch.get_rng_state(), str(options)]


def same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("tp", [1, 2])
def test_a_changed_manifest_is_a_clear_error_and_changes_nothing(tmp_path: Path, tp: int) -> None:
    model = small_gpt(resolve(None))
    optimizer = adamw(model)
    learn(model, optimizer, range(1))
    folder = checkpoint.save(model, tmp_path / "one", optimizer=optimizer, step=1, extra={"note": [1]})
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    folder = folder if tp == 1 else checkpoint.reshard(folder, tmp_path / "two", tp=2)
    learn(model, optimizer, range(1))
    before, manifest = [copy.deepcopy(v) for v in state_of(model, optimizer)], read_manifest(folder)
    changes = [(path, odd) for path in places(manifest) for odd in (..., "twice", *ODD)]
    refused = 0
    for path, odd in random.Random(tp).sample(changes, 250):
        (folder / "manifest.json").unlink()
        write_manifest(folder, changed(manifest, path, odd))
        try:
            checkpoint.load(model, folder, optimizer=optimizer)
        except CheckpointError:
            refused += 1
            assert same(state_of(model, optimizer), before), "an error leaves everything as it was"
        else:  # what was changed is of no account, or an option or a number of another value: the tensors are right
            model, optimizer = small_gpt(resolve(None)), adamw(model)
            checkpoint.load(model, folder)
            for name, value in model.state_dict().items():
                assert torch.equal(value, saved[name]), name
            optimizer = adamw(model)
            learn(model, optimizer, range(1))
            learn(model, optimizer, range(1))
            before = [copy.deepcopy(v) for v in state_of(model, optimizer)]
    assert refused > 120


def test_a_manifest_with_a_field_twice_or_nested_without_end_is_damaged(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    folder = checkpoint.save(model, tmp_path / "x")
    text = (folder / "manifest.json").read_text()
    for bad in (text.replace('"step": 0', '"step": 0, "step": 0'), "[" * 100_000, "[]", "1", '"x"', "null"):
        (folder / "manifest.json").write_text(bad)
        with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
            checkpoint.load(model, folder)
    assert json.loads(text)["step"] == 0


def partly(folder: str) -> None:
    with Group.open() as group:
        model = small_gpt(group)
        checkpoint.save(model, folder, group=group, step=3)
        other = small_gpt(group, seed=2)
        other.extra = nn.Linear(2, 2)
        del other.norm
        before = other.extra.weight.clone()
        with pytest.raises(CheckpointError, match=r"it lacks extra\.bias, extra\.weight: .* or pass strict=False"):
            checkpoint.load(other, folder, group=group)
        loaded = checkpoint.load(other, folder, group=group, strict=False)
        assert (loaded.step, loaded.missing) == (3, ("extra.bias", "extra.weight"))
        assert loaded.unexpected == tuple(f"norm.{name}" for name, _ in sorted(model.norm.named_parameters()))
        assert torch.equal(other.extra.weight, before)
        there = dict(other.named_parameters())
        assert all(torch.equal(there[name], p) for name, p in model.named_parameters() if not name.startswith("norm."))
        assert (checkpoint.load(model, folder, group=group).missing) == ()


def test_what_both_have_is_loaded_and_the_rest_is_named_where_it_is_asked_for(tmp_path: Path) -> None:
    run_ranks(partly, 2, str(tmp_path / "x"))


def converted(folder: str) -> None:
    root = Path(folder)
    with Group.open() as group:
        for was, now in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
            saved = small_gpt(group, dtype=was)
            optimizer = adamw(saved)
            learn(saved, optimizer, range(1))
            checkpoint.save(saved, root / str(was), group=group, optimizer=optimizer)
            model = small_gpt(group, seed=2, dtype=now)
            with pytest.raises(CheckpointError, match=r"build the model that was saved, or pass convert_dtype=True"):
                checkpoint.load(model, root / str(was), group=group)
            mine = adamw(model)
            checkpoint.load(model, root / str(was), group=group, optimizer=mine, convert_dtype=True)
            want = small_gpt(group, seed=3, dtype=now)
            want.load_state_dict(saved.state_dict())  # torch's own conversion
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), want.parameters(), strict=True))
            torchs = adamw(want)
            torchs.load_state_dict(optimizer.state_dict())
            for p, q in zip(model.parameters(), want.parameters(), strict=True):
                for field, value in torchs.state[q].items():
                    assert mine.state[p][field].dtype == value.dtype
                    assert torch.equal(mine.state[p][field], value), field
            learn(model, mine, range(1, 2))


def test_a_checkpoint_of_another_dtype_is_converted_as_torch_does_where_it_is_asked_for(tmp_path: Path) -> None:
    run_ranks(converted, 2, str(tmp_path))
