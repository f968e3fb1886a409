"""The bench of torch.distributed's calls and programs: every cell at a tiny size, on gloo and on tpk."""

from __future__ import annotations

import math

import pytest

from bench import c10d, rows
from bench import run as bench_run
from tests.harness.backends import needs_backend
from tests.harness.bench import where
from tests.harness.ranks import nightly

TINY = {name: 4096 if name in c10d.SIZED else 14 << 20 if name == "c10d_decode" else 64 << 10 for name in c10d.BENCHES}


@needs_backend
@pytest.mark.parametrize("R", [3, *nightly(2)])
def test_every_call_and_program_is_right_on_all_back_ends(R: int) -> None:
    jobs = tuple((name, size) for name, size in TINY.items() if R == 2 or name in c10d.SIZED)
    spec = bench_run.Spec(jobs, {"only": (c10d.GLOO, c10d.OURS)}, 2, 1e-4, math.inf, where(), benches=c10d.BENCHES)
    cells = list(bench_run.run(spec, R, pin=False))
    assert not [cell for cell in cells if isinstance(cell, str)]
    assert [cell[0]["op"] for cell in cells] == [name for name, _ in jobs]
    for cell in cells:
        assert [row["variant"] for row in cell] == [c10d.GLOO, c10d.OURS]
        for row in cell:
            assert tuple(row) == rows.FIELDS
            assert row["verified"], (row["op"], row["variant"], row["error"])


def test_programs_are_refused_in_a_dtype_that_they_do_not_have() -> None:
    jobs = (("c10d_ddp", 64 << 10),)
    spec = bench_run.Spec(jobs, {"dtype_name": "bf16"}, 1, 1e-4, math.inf, where(), benches=c10d.BENCHES)
    assert list(bench_run.run(spec, 1, pin=False)) == ["left out: programs of c10d are measured in fp32, got bf16"]
