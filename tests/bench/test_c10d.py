"""The bench of torch.distributed's calls and programs: every cell at a tiny size, on gloo and on tpk."""

from __future__ import annotations

import math

import pytest
from torch import nn

from bench import c10d, rows
from bench import c10d_programs as programs
from bench import run as bench_run
from bench.cell import Setting
from tests.harness.backends import needs_backend
from tests.harness.bench import where
from tests.harness.ranks import nightly

TINY = {name: 4096 if name in c10d.SIZED else 14 << 20 if name == "c10d_decode" else 64 << 10 for name in c10d.BENCHES}


@needs_backend
@pytest.mark.parametrize("R", [3, *nightly(2)])
def test_every_call_and_program_is_right_on_all_back_ends(R: int) -> None:
    jobs = tuple((name, size) for name, size in TINY.items() if R == 2 or name in c10d.SIZED)
    names = (c10d.GLOO, c10d.OURS, programs.BOUND)
    spec = bench_run.Spec(jobs, {"only": names}, 2, 1e-4, math.inf, where(), benches=c10d.BENCHES)
    cells = list(bench_run.run(spec, R, pin=False))
    assert not [cell for cell in cells if isinstance(cell, str)]
    assert [cell[0]["op"] for cell in cells] == [name for name, _ in jobs]
    for cell in cells:
        is_program = cell[0]["op"].removeprefix("c10d_") in (*c10d.PROGRAMS, "decode")
        assert [row["variant"] for row in cell] == list(names if is_program else names[:2])
        for row in cell:
            assert tuple(row) == rows.FIELDS
            assert row["verified"], (row["op"], row["variant"], row["error"])


@pytest.mark.parametrize("nbytes", [64 << 10, 1 << 20])
def test_the_check_of_a_program_finds_gradients_that_are_not_averaged(nbytes: int) -> None:
    width = programs.width_of(Setting(0, 2), nbytes)
    (alone,), (averaged, _) = programs.expected(width, [0]), programs.expected(width, [0, 1])
    job = programs.Training(nn.Module.train, width, programs.batch(width, 0), averaged)
    job.restart()
    off = abs(alone / averaged - 1) / programs.ALLOWED
    assert off > 2
    assert job.error(job.step()) == pytest.approx(off, rel=0.1)


def test_programs_are_refused_in_a_dtype_that_they_do_not_have() -> None:
    jobs = (("c10d_ddp", 64 << 10),)
    spec = bench_run.Spec(jobs, {"dtype_name": "bf16"}, 1, 1e-4, math.inf, where(), benches=c10d.BENCHES)
    assert list(bench_run.run(spec, 1, pin=False)) == ["left out: programs of c10d are measured in fp32, got bf16"]
