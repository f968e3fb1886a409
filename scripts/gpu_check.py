"""Build and check the CUDA half of tpkernels on a machine with one GPU: `python scripts/gpu_check.py --out FOLDER`.

Needs that machine's own python with torch and pytest, nvcc, cmake and ninja; no network, no virtual environment. Every
step has a time limit. A step that fails does not keep the next from running, unless it is the build. Exit code 1 when
one failed. After each step FOLDER holds, and nothing else:

    steps.jsonl    how each went
    summary.txt    what is proven, what failed with the first lines that say why, and the goals of the bench
    logs.tar.gz    the output of every step; a run that is cut off leaves those of the steps before
    gpu.jsonl      the rows of the bench

--dry does what needs no GPU: every test, file and command that a step names must be there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from gpu_steps import PYTEST, STEPS, TOTAL_S, Step, is_hopper

ROOT = Path(__file__).resolve().parent.parent
GRACE_S = 3.0  # between asking a step to end and ending it


@dataclass(frozen=True)
class Result:
    """How a step went. detail: one line."""

    step: str
    ok: bool
    seconds: float
    detail: str


def run_within(command: Sequence[str], log: Path, limit_s: float, environment: dict[str, str]) -> int | None:
    """Run a command with everything that it starts; its exit code, None when it was ended at its limit.

    127 where there is no such program, as a shell has it.
    """
    with open(log, "w", encoding="utf-8") as stdout:
        stdout.write(f"$ {' '.join([*(f'{k}={v}' for k, v in environment.items()), *command])}\n")
        stdout.flush()
        try:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            stdout.write(f"{error}\n")
            return 127
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None
        finally:  # also what outlives the step, and all of it when this program is ended
            end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all of its group. One that hangs in the driver outlives SIGKILL, and is left behind."""
    for kind, patience in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, GRACE_S)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, kind)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)


def last_line(log: Path) -> str:
    """The last line that says something, without the frame that pytest draws around it."""
    lines = [line.strip("= \n") for line in log.read_text(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "no output")[:160]


def reasons(log: Path) -> list[str]:
    """The first lines in which pytest, or first light, says why something failed: the values that differ."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return [line[1:].strip()[:160] for line in lines if line.startswith("E ")][:2]


def pack(logs: Path, out: Path) -> None:
    """Put the logs into one file; who is ended meanwhile leaves the one before."""
    part = out / "logs.tar.gz.part"
    with tarfile.open(part, "w:gz") as archive:
        archive.add(logs, arcname="logs")
    part.replace(out / "logs.tar.gz")


def summary(results: Sequence[Result], logs: Path, out: Path) -> list[str]:
    """What is proven and what failed, in 30 lines at most."""
    lines = [f"proven   {r.step}: {r.detail}" for r in results if r.ok]
    for r in results:
        if not r.ok:
            lines += [f"FAILED   {r.step}: {r.detail}", *(f"         {why}" for why in reasons(logs / f"{r.step}.log"))]
    if (out / "gpu.jsonl").exists():
        goals = (sys.executable, "-m", "bench.gpu", "--goals", "--out", str(out / "gpu.jsonl"))
        run_within(goals, logs / "goals.log", 60.0, {})
        lines += (logs / "goals.log").read_text(errors="replace").splitlines()[1:]
    return lines[:30]


def run_step(step: Step, out: Path, logs: Path, limit_s: float) -> tuple[bool, str]:
    """Whether the step went well, and what to say of it."""
    if step.tool is not None and shutil.which(step.tool) is None:
        return True, f"left out: no {step.tool} here"
    if step.hopper and not is_hopper():
        return True, "left out: it needs a GPU of compute capability 9.0"
    log = logs / f"{step.name}.log"
    command = [part.replace("{out}", str(out)) for part in (*step.command, *step.tests)]
    code = run_within(command, log, limit_s, step.environment)
    last = last_line(log)
    if code is None:
        return False, f"ended at its limit of {limit_s:.0f} s; last: {last}"
    if code != 0:
        return False, f"exit code {code}; {last}"
    if step.tests and not re.search(r"\b[1-9]\d* passed", log.read_text(errors="replace")):
        return False, f"no test ran; {last}"
    return True, last


def collected(steps: Sequence[Step], logs: Path, limit_s: float) -> list[str]:
    """The ids of all tests that pytest finds where the steps say they are; those of no file when one fails to load."""
    names = sorted({test.split("::")[0] for step in steps for test in step.tests})
    there = [name for name in names if (ROOT / name).exists()]
    log = logs / "collect.log"
    if there:
        run_within([*PYTEST, "--collect-only", "-q", *there], log, limit_s, {})
    lines = log.read_text(errors="replace").splitlines() if there else []
    return [line for line in lines if "::" in line and not line.startswith(("$", "ERROR"))]


def look_at(step: Step, logs: Path, limit_s: float, ids: Sequence[str]) -> tuple[bool, str]:
    """The verdict on a step without a GPU."""
    missing = [name for name in step.files if not (ROOT / name).exists()]
    count = 0
    for test in step.tests:
        found = sum(i == test or i.startswith((f"{test}::", f"{test}[")) for i in ids)
        count += found
        missing += [] if found else [test]
    if missing:
        return False, f"dry: not there, or does not load: {', '.join(missing)}"
    if step.dry is not None:
        log = logs / f"{step.name}.log"
        code = run_within(step.dry, log, limit_s, step.environment)
        return code == 0, f"dry: {last_line(log)}" if code == 0 else f"dry: exit code {code}; {last_line(log)}"
    return True, f"dry: {count} tests" if step.tests else "dry: its files are there"


def check(steps: Sequence[Step], out: Path, logs: Path, dry: bool, total_s: float = TOTAL_S) -> Iterator[Result]:
    """Run the steps one after the other, as long as there is time; `out` for results, `logs` for output."""
    begin, broken = time.monotonic(), None
    ids = collected(steps, logs, total_s) if dry else []
    for step in steps:
        start = time.monotonic()
        limit = min(step.limit_s, total_s - (start - begin))
        if broken is not None:
            yield Result(step.name, False, 0.0, f"not run: {broken} failed")
        elif limit <= 0:
            yield Result(step.name, False, 0.0, f"not run: all {total_s:.0f} s are spent")
        else:
            ok, detail = look_at(step, logs, limit, ids) if dry else run_step(step, out, logs, limit)
            broken = step.name if step.opens and not ok else None
            yield Result(step.name, ok, round(time.monotonic() - start, 1), detail)


def show(results: Sequence[Result]) -> None:
    """A table, by rich where it is installed."""
    rows = [(r.step, "ok" if r.ok else "FAILED", f"{r.seconds:.1f}", r.detail) for r in results]
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        for name, ok, seconds, detail in rows:
            print(f"{name:<18}{ok:<8}{seconds:>7}  {detail}")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("step", "", "seconds", "detail"):
        table.add_column(column, justify="right" if column == "seconds" else "left")
    for row in rows:
        table.add_row(*map(Text, row), style="bold red" if row[1] == "FAILED" else None)
    console = Console()
    Console(width=max(120, console.width)).print(table)


def main(arguments: Sequence[str] | None = None, steps: Sequence[Step] = STEPS) -> int:
    """Check everything and return the exit code."""
    parser = argparse.ArgumentParser(description="Build and check the CUDA half of tpkernels on one GPU.")
    parser.add_argument("--out", type=Path, required=True, help="folder for logs and results")
    parser.add_argument("--dry", action="store_true", help="only check that everything is there that a step names")
    parser.add_argument("--only", help="names of steps, with commas")
    options = parser.parse_args(arguments)
    if options.only:
        names = options.only.split(",")
        unknown = set(names) - {step.name for step in steps}
        if unknown:
            parser.error(f"--only: no step {', '.join(sorted(unknown))}; there are {', '.join(s.name for s in steps)}")
        steps = [step for step in steps if step.name in names]
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    logs = out.with_name(f"{out.name}-logs")
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir()
    (ROOT / "build").mkdir(exist_ok=True)
    results: list[Result] = []
    with open(out / "steps.jsonl", "w", encoding="utf-8") as file:
        for result in check(steps, out, logs, options.dry):
            results.append(result)
            file.write(json.dumps(asdict(result)) + "\n")
            file.flush()
            print(f"{result.step}: {'ok' if result.ok else 'FAILED'}, {result.detail}", flush=True)
            pack(logs, out)
            (out / "summary.txt").write_text("\n".join(summary(results, logs, out)) + "\n")
    show(results)
    if not options.dry:
        print(f"\n{(out / 'summary.txt').read_text()}", end="")
    return 0 if all(result.ok for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
