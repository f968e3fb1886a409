"""Measured GEMM engines: measured when asked, agreed over the ranks, kept in a file, and each group's own."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

import tpkernels as tpk
from tpkernels._native import _C
from tpkernels.comm import engines
from tpkernels.comm.group import Group
from tpkernels.testing import run_ranks

MEASURED = "measured on this machine"
SHAPE = ("float32", 5, 6, 7)


def chosen(group: Group, dtype: str, M: int, N: int, K: int) -> tuple[str, str]:
    return _C.choose_engine(group._communicator, dtype, M, N, K)


def _tuned(folder: str) -> tuple[dict[str, float], str, list[object]]:
    os.environ["XDG_CACHE_HOME"] = folder
    with Group.open() as group:
        explained = group.explain("gemm_all_reduce", M=32, N=24, K=16, dtype=torch.float32, tune=True)
        engine = chosen(group, "float32", 32, 24, 16)[0]
        kept = json.loads(engines.engines_file().read_text())
    return explained.measured, engine, kept


def test_ranks_agree_on_the_engine_that_was_measured_faster_and_keep_it(tmp_path: Path) -> None:
    results = run_ranks(_tuned, 2, str(tmp_path))
    measured, engine, kept = results[0]
    assert results[1] == results[0]
    assert set(measured) == {"aten", "onednn"} and all(us > 0 for us in measured.values())
    assert engine == min(measured, key=lambda name: measured[name])
    assert kept == [["float32", 32, 24, 16, engine]]


@pytest.fixture
def file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    engines.engines_file().parent.mkdir(parents=True)
    return engines.engines_file()


def test_a_group_that_opens_later_takes_the_kept_engine(file: Path) -> None:
    for engine in ("onednn", "aten"):
        file.write_text(json.dumps([[*SHAPE, engine]]))
        with Group.open() as group:
            assert chosen(group, *SHAPE) == (engine, MEASURED)


@pytest.mark.parametrize("text", ["", "{", "[[1, 2]]", '[["int8", 1, 1, 1, "aten"]]'])
def test_a_damaged_file_counts_as_none(file: Path, text: str) -> None:
    file.write_text(text)
    with Group.open() as group:
        assert chosen(group, *SHAPE)[1] != MEASURED


def test_nothing_is_measured_unless_asked() -> None:
    with Group.open() as group:
        assert group.explain("gemm_all_reduce", M=8, N=8, K=8, dtype=torch.float32).measured == {}


def test_tuning_one_group_changes_no_engine_and_no_bit_of_another(file: Path) -> None:
    M, N, K = 9, 130, 515
    x, w = torch.randn(M, K, requires_grad=True), torch.randn(N, K, requires_grad=True)
    with Group.open() as first, Group.open() as second:

        def results(group: Group) -> list[torch.Tensor]:
            y = tpk.ops.gemm_all_reduce(x, w, group=group)
            return [y.detach(), *torch.autograd.grad(y.square().sum(), (x, w))]

        bits, rule = results(first), chosen(first, "float32", M, N, K)
        for engine in ("aten", "onednn"):  # one of them is not the rule's
            for shape in ((M, N, K), (M, K, N)):  # forward, gradient of x
                second._communicator.set_measured_engine("float32", *shape, engine)
            assert chosen(second, "float32", M, N, K) == (engine, MEASURED)
            results(second)
            assert chosen(first, "float32", M, N, K) == rule
            assert all(map(torch.equal, results(first), bits))
        second.explain("gemm_all_reduce", M=M, N=N, K=K, tune=True)
        assert chosen(second, "float32", M, N, K)[1] == MEASURED
        assert chosen(first, "float32", M, N, K) == rule and all(map(torch.equal, results(first), bits))
