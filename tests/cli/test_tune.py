"""`tpkernels tune`: what it measures, what it keeps, and the line in which a command reports the engines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

from tpkernels.cli import app
from tpkernels.cli.tune import products_of
from tpkernels.comm import profile
from tpkernels.comm.group import Group
from tpkernels.comm.profile import Product, Profile
from tpkernels.layers import ColumnParallelLinear, RowParallelLinear
from tpkernels.layers.engines import engines_line

GPT2 = '{"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 64}'


def tune(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["tune", *arguments], env={"COLUMNS": "120"})


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The file of the profile of one rank; a profile has one point."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TPKERNELS_PROFILE")
    monkeypatch.setattr(profile, "points", lambda: iter([Product("bfloat16", 2, 64, 64)]))
    yield profile.profile_file("local")


@pytest.fixture
def model(tmp_path: Path) -> str:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(GPT2)
    return str(tmp_path)


def test_points_and_the_shapes_of_a_model_are_measured_and_kept(kept: Path, model: str) -> None:
    first = tune("--tp", "1")
    assert first.exit_code == 0 and str(kept) in first.output.replace("\n", "")
    assert Profile.parse(kept.read_text()).shapes == {}
    second = tune("--tp", "1", "--model", model, "--rows", "2", "--dtype", "bf16")
    assert second.exit_code == 0, second.output
    found = Profile.parse(kept.read_text())
    assert list(found.points) == [Product("bfloat16", 2, 64, 64)]
    assert set(found.shapes) == set(products_of(model, 1, [2], ["bfloat16"]))
    with Group.open() as group:
        explained = group.explain("replicated_gemm", M=2, N=96, K=32, dtype=torch.bfloat16)
        assert "measured at 2x96x32" in explained.reason and explained.profile == str(kept)


def test_products_are_those_of_the_fullest_rank(model: str) -> None:
    forward = {(p.N, p.K) for p in products_of(model, 2, [4], ["bfloat16"])}
    # c_attn cut along its outputs, c_proj along its inputs, the same of the MLP; Conv1D keeps its weights transposed.
    assert {(48, 32), (32, 16), (64, 32), (32, 64)} <= forward
    both = products_of(model, 2, [16], ["float32"])
    assert {(p.K, p.N) for p in both} == {(p.N, p.K) for p in both}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--rows 1,x", "--rows must be numbers of 1 or more with commas between them, got '1,x'"),
        ("--rows 0", "--rows must be numbers of 1 or more"),
        ("--dtype fp8", "--dtype is one or more of fp32, bf16, fp16, with commas between them, got 'fp8'"),
        ("--model no-such-type", "the model must be a folder with config.json, a config file or a model type, got"),
    ],
)
def test_wrong_arguments_are_named(kept: Path, arguments: str, says: str) -> None:
    result = tune("--tp", "1", *arguments.split())
    assert result.exit_code != 0 and says in " ".join(result.output.split()), result.output
    assert not kept.exists()


def test_a_profile_that_is_switched_off_is_not_measured(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPKERNELS_PROFILE", "off")
    result = tune("--tp", "1")
    assert result.exit_code != 0 and "TPKERNELS_PROFILE is 'off'" in " ".join(result.output.split())


def test_one_line_counts_the_engines_of_a_model(kept: Path) -> None:
    with Group.open() as group:
        model = nn.Sequential(
            ColumnParallelLinear(16, 32, group=group),
            nn.ReLU(),
            RowParallelLinear(32, 16, group=group),
            nn.Linear(16, 4),
        )
        assert engines_line(model, 2) == "linears of 2 rows: 2 by gemv, chosen by the rule of sizes"
        assert engines_line(nn.Linear(2, 2), 2) == ""
    profile.write(Profile({Product("float32", 2, 16, 16): {"aten": 1.0, "gemv": 2.0}}), "local")
    with Group.open() as group:
        line = engines_line(ColumnParallelLinear(16, 32, group=group), 2)
        assert line == f"linears of 2 rows: 1 by aten, chosen by the machine's profile {kept}"


def test_points_are_measured_once_on_a_new_machine(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with profile.switched_off():
        assert profile.mode() == "off" and not profile._can_measure(cores=2, ranks=2, transport="shm")
        assert profile.read("local") is None
    assert profile.mode() == "auto" and profile._can_measure(cores=2, ranks=2, transport="shm")
    monkeypatch.setenv("TPKERNELS_PROFILE", "a/path")
    with profile.switched_off():
        assert profile.mode() == "off"
    assert profile.mode() == "a/path"
