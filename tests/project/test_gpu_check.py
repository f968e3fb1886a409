"""scripts/gpu_check.py and bench/gpu.py as far as they run without a GPU: files are there, failures are reported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import gpu_check  # noqa: E402
from gpu_steps import PYTEST, STEPS, TOTAL_S, Step  # noqa: E402

from bench import gpu  # noqa: E402
from bench.gpu_cells import backward_of_ranks, run_backward  # noqa: E402
from tests.harness.ops import Drawn, run_at  # noqa: E402
from tpkernels.comm.group import Group  # noqa: E402

WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")


def python(code: str) -> tuple[str, ...]:
    """A command that runs this."""
    return (sys.executable, "-c", code)


def run(tmp_path: Path, *steps: Step, dry: bool = False) -> tuple[int, dict[str, dict[str, Any]]]:
    """The exit code, and the rows by step."""
    code = gpu_check.main(["--out", str(tmp_path), *(["--dry"] if dry else [])], steps)
    rows = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [step.name for step in steps]
    assert all(set(row) == {"step", "ok", "seconds", "detail"} for row in rows)
    return code, {row["step"]: row for row in rows}


def log_of(out: Path, step: str) -> str:
    """The output of a step, from the packed file."""
    with tarfile.open(out / "logs.tar.gz") as archive:
        log = archive.extractfile(f"logs/{step}.log")
        assert log is not None
        return log.read().decode()


GOOD = Step("good", python("print('all is well')"), 60.0)
BAD = Step("bad", python("print('a reason'); raise SystemExit(3)"), 60.0)


def test_the_bench_has_time_for_all_of_its_families() -> None:
    (step,) = (step for step in STEPS if step.name == "bench")
    found = gpu.families(gpu.cells())
    assert "backward" in found
    assert len(found) * gpu.FAMILY_S <= step.limit_s < TOTAL_S


def check_backward_cell(group: Group, op: str) -> None:
    drawn = Drawn(group)
    x, w, dy = ((drawn.randint(3, *shape) - 1).bfloat16() for shape in ((12, 24), (48, 24), (12, 48)))  # exact sums
    group._communicator.force(path="fused", blocks=1, grid=4)
    of = backward_of_ranks(op, group.world_size, x, w, dy)[group.rank]
    dx, dw = run_backward(op, of, group)
    assert torch.equal(dx.float(), of.dx) and torch.equal(dw.float(), of.dw)


@pytest.mark.parametrize("op", ["replicated_gemm", "gemm_reduce_scatter", "all_gather_gemm"])
def test_cells_of_backwards_have_the_gradients_of_the_unsharded_program(op: str) -> None:
    run_at("emu", check_backward_cell, 2, op)


@pytest.mark.nightly
def test_dry_everything_that_the_steps_name_is_there(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, rows = run(tmp_path, *STEPS, dry=True)
    assert code == 0, rows
    assert all(row["detail"].startswith("dry: ") for row in rows.values())
    assert all(int(rows[step.name]["detail"].split()[1]) > 0 for step in STEPS if step.tests)
    printed = capfd.readouterr().out
    assert all(step.name in printed.splitlines()[-len(STEPS) + i] for i, step in enumerate(STEPS)), printed
    assert not (tmp_path / "gpu.jsonl").exists()
    assert sum(step.limit_s for step in STEPS if step.name in ("facts", "build", "virtual")) < TOTAL_S < 540


def test_what_is_not_there_is_noticed_dry(tmp_path: Path) -> None:
    code, rows = run(
        tmp_path,
        Step("no file", (), 60.0, files=("scripts/gone.py",)),
        Step("no test", PYTEST, 60.0, tests=("tests/gpu/test_local.py::test_gone",)),
        Step("no test file", PYTEST, 60.0, tests=("tests/gpu/test_gone.py",)),
        Step("fails", (), 60.0, dry=BAD.command),
        dry=True,
    )
    assert code == 1
    assert not any(row["ok"] for row in rows.values())
    assert "scripts/gone.py" in rows["no file"]["detail"]
    assert "test_gone" in rows["no test"]["detail"]
    assert "exit code 3" in rows["fails"]["detail"]


def test_a_step_that_fails_is_told_and_the_next_one_runs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, rows = run(tmp_path, BAD, GOOD)
    assert (code, rows["bad"]["ok"], rows["bad"]["detail"]) == (1, False, "exit code 3; a reason")
    assert (rows["good"]["ok"], rows["good"]["detail"]) == (True, "all is well")
    assert "a reason" in log_of(tmp_path, "bad")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs.tar.gz", "steps.jsonl", "summary.txt"]
    assert "FAILED" in capfd.readouterr().out
    assert run(tmp_path, GOOD)[0] == 0


def test_a_program_that_was_never_built_fails_its_step_alone(tmp_path: Path) -> None:
    code, rows = run(tmp_path, Step("gone", ("build/never-built",), 60.0), GOOD)
    assert (code, rows["good"]["ok"]) == (1, True)
    assert rows["gone"]["detail"].startswith("exit code 127; [Errno 2] No such file or directory")


def test_the_summary_has_what_is_proven_and_the_values_that_differ(tmp_path: Path) -> None:
    differs = tmp_path / "test_differs_here.py"
    differs.write_text("def test_a(): assert [1.0, 2.0] == [1.0, 2.5], 'sums of rank 1'\n")
    out = tmp_path / "out"
    run(out, GOOD, Step("differs", PYTEST, 60.0, tests=(str(differs),)))
    lines = (out / "summary.txt").read_text().splitlines()
    assert lines[0] == "proven   good: all is well"
    assert lines[1].startswith("FAILED   differs: exit code 1; 1 failed")
    assert "sums of rank 1" in lines[2]


def test_the_summary_has_what_first_light_found(tmp_path: Path) -> None:
    said = (
        "print('ok  clock'); print('E   tile: value 3 of row 9 is 5, not 7'); print('9 of 10 do'); raise SystemExit(1)"
    )
    run(tmp_path, Step("first_light", python(said), 60.0), GOOD)
    lines = (tmp_path / "summary.txt").read_text().splitlines()
    assert lines[1:3] == [
        "FAILED   first_light: exit code 1; 9 of 10 do",
        "         tile: value 3 of row 9 is 5, not 7",
    ]


def test_nothing_follows_a_build_that_fails(tmp_path: Path) -> None:
    build = Step("build", BAD.command, 60.0, opens=True)
    code, rows = run(tmp_path, build, GOOD)
    assert code == 1
    assert rows["good"] == {"step": "good", "ok": False, "seconds": 0.0, "detail": "not run: build failed"}


def test_a_step_that_hangs_is_ended_at_its_limit_with_what_it_started(tmp_path: Path) -> None:
    # It ignores the polite signal, and so does its child, whose number it tells.
    code = (
        "import os, signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nchild = os.fork()\n"
        "if child: print(child, flush=True)\nwhile True: time.sleep(60)"
    )
    hangs = Step("hangs", python(code), 2.0)
    code_, rows = run(tmp_path, hangs, GOOD)
    child = int(log_of(tmp_path, "hangs").splitlines()[-1])
    assert code_ == 1
    assert "ended at its limit of 2 s" in rows["hangs"]["detail"]
    assert rows["good"]["ok"]
    deadline = time.monotonic() + 30
    while _lives(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _lives(child)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_tests_that_are_all_skipped_are_a_failure(tmp_path: Path) -> None:
    skipped = tmp_path / "test_skipped_here.py"
    skipped.write_text("import pytest\ndef test_a(): pytest.skip('nothing to see')\n")
    code, rows = run(tmp_path, Step("skips", PYTEST, 60.0, tests=(str(skipped),)))
    assert code == 1
    assert "no test ran" in rows["skips"]["detail"]
    skipped.write_text("def test_a(): pass\n")
    assert run(tmp_path, Step("skips", PYTEST, 60.0, tests=(str(skipped),)))[0] == 0


def test_steps_are_left_out_without_their_tool_their_gpu_and_without_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, rows = run(tmp_path, Step("tool", BAD.command, 60.0, tool="no-such-tool"))
    assert (code, rows["tool"]["detail"]) == (0, "left out: no no-such-tool here")
    for hopper, outcome in ((False, 0), (True, 1)):
        monkeypatch.setattr(gpu_check, "is_hopper", lambda answer=hopper: answer)
        code, rows = run(tmp_path, Step("hopper", BAD.command, 60.0, hopper=True))
        assert (code, "left out" in rows["hopper"]["detail"]) == (outcome, not hopper)
    results = list(gpu_check.check([GOOD], tmp_path, tmp_path, dry=False, total_s=0.0))
    assert [(r.ok, r.detail) for r in results] == [(False, "not run: all 0 s are spent")]


def test_unknown_steps_are_a_usage_error() -> None:
    with pytest.raises(SystemExit) as stopped:
        gpu_check.main(["--out", os.devnull, "--only", "facts,magic"])
    assert stopped.value.code == 2


@pytest.mark.nightly
def test_the_bench_lists_its_cells() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "--list"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    *names, last = done.stdout.splitlines()
    assert names == [cell.name for cell in gpu.cells()]
    assert len(set(names)) == len(names)
    assert last == f"{len(names)} cells, {len(gpu.GOALS)} goals"


@WITHOUT_GPU
def test_the_bench_says_in_a_sentence_that_it_needs_a_gpu(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert gpu.main(["--out", str(tmp_path / "gpu.jsonl")]) == 2
    assert capsys.readouterr().out == "bench.gpu needs a CUDA GPU, and this process sees none.\n"
    assert not list(tmp_path.iterdir())


def row(**changes: Any) -> dict[str, Any]:
    """A row of bench.gpu, as far as goals look at it."""
    return {"family": "codec", "variant": "encode", "verified": True, "share": 0.95, "ratio": 1.0, "M": None} | changes


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "not measured"),
        ([row(verified=False)], "not measured"),
        ([row(family="gemm")], "not measured"),
        ([row()], "found 0.95 to 0.95, reached"),
        ([row(), row(share=0.5)], "found 0.5 to 0.95, MISSED"),
    ],
)
def test_a_goal_is_reached_when_the_worst_of_its_rows_reaches_it(rows: list[dict[str, Any]], says: str) -> None:
    assert gpu.GOALS[0].verdict(rows).endswith(says)
    assert gpu.GOALS[0].verdict(rows).startswith("encode over the speed of a copy: at least 0.9")


@WITHOUT_GPU
def test_the_cupy_example_says_what_it_needs() -> None:
    done = subprocess.run(
        [sys.executable, "examples/cupy_exchange.py"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("This example was left out: ")
