"""Measured GEMM engines: asked for, agreed, kept; and never measured unasked."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

import tpkernels as tpk
from tpkernels._native import _C
from tpkernels.comm import engines
from tpkernels.testing import run_ranks


def _tuned(folder: str) -> tuple[dict[str, float], str, list[object]]:
    os.environ["XDG_CACHE_HOME"] = folder
    with tpk.Group.open() as group:
        found = group.explain("gemm_all_reduce", M=32, N=24, K=16, dtype=torch.float32, tune=True)
        engine = _C.choose_engine("float32", 32, 24, 16)[0]
        kept = json.loads(engines.plan_file().read_text())
    _C.forget_measured_engines()
    return found.measured, engine, kept


def test_ranks_agree_on_the_engine_that_was_measured_faster_and_keep_it(tmp_path: Path) -> None:
    results = run_ranks(_tuned, 2, str(tmp_path))
    measured, engine, kept = results[0]
    assert results[1] == results[0]
    assert set(measured) == {"aten", "onednn"} and all(us > 0 for us in measured.values())
    assert engine == min(measured, key=lambda name: measured[name])
    assert kept == [["float32", 32, 24, 16, engine]]


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(engines, "_loaded", False)
    engines.plan_file().parent.mkdir(parents=True)
    return engines.plan_file()


def test_a_later_process_takes_the_kept_engine(fresh: Path) -> None:
    for engine in ("onednn", "aten"):
        fresh.write_text(json.dumps([["float32", 5, 6, 7, engine]]))
        engines._loaded = False
        engines.load()
        assert _C.choose_engine("float32", 5, 6, 7) == (engine, "measured on this machine")
    _C.forget_measured_engines()


@pytest.mark.parametrize("text", ["", "{", "[[1, 2]]", '[["int8", 1, 1, 1, "aten"]]'])
def test_a_damaged_file_is_as_good_as_none(fresh: Path, text: str) -> None:
    fresh.write_text(text)
    engines.load()
    assert _C.choose_engine("float32", 5, 6, 7)[1] != "measured on this machine"


def test_nothing_is_measured_unless_asked() -> None:
    with tpk.Group.open() as group:
        assert group.explain("gemm_all_reduce", M=8, N=8, K=8, dtype=torch.float32).measured == {}
