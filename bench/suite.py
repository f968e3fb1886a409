"""Measure what the documents show, print the goals, draw the picture: `make bench`, or `python -m bench.suite`.

Ten minutes on two cores, and not more: a run that has not ended by then is ended, and what is left is named. Each size
waits a little for a quiet machine, and collectives of one host run at real-time priority where this user may (root),
because gloo sleeps where this library spins: at normal priority, or beside other programs, gloo takes ten times as
long, and the ratios would flatter. Programs that overlap communication and computing, or share cores with a client,
run at normal priority: of two real-time threads of a core one waits until the other has had its time slice. The
placement of the cores cannot be chosen; repeat until goals list near and far.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from bench import goals
from bench.rows import KEEP_HELP, PICTURE, destination
from bench.study import links

# Arguments of `python -m bench.run`, where the first word is the op, or of a program of its own. It names the file.
PROGRAMS = ("generate", "serve", "train_step")
PRIORITY = 10
# First what README shows, then the other tables of docs/benchmarks.md.
RUNS = [
    "all_reduce --rounds 9",
    "gemm_all_reduce --rounds 5",
    "gemm_all_reduce --rounds 3 --hosts 2 --link 1gbit --sizes 512",
    "gemm_all_reduce --rounds 3 --hosts 2 --link 1gbit --sizes 512 --codec fp16",
    "gemm_all_reduce --rounds 3 --hosts 2 --link 1gbit --sizes 512 --codec int8",
    "gemm_reduce_scatter --rounds 3 --hosts 2 --link 1gbit --sizes 512",
    "all_gather_gemm --rounds 3 --hosts 2 --link 1gbit --sizes 512",
    "train_step --rounds 9",
    "serve --clients 1,8",
    "generate --dtype fp32,bf16",
    "reduce_scatter --rounds 9",
    "all_gather --rounds 9",
    "gemm_all_reduce --rounds 5 --dtype bf16",
    "codec_moves --rounds 9 --ranks 1",
    "codecs --rounds 9 --sizes 64KiB,1MiB,16MiB",
    "few_rows --rounds 9 --ranks 1",
    "few_rows --rounds 9 --ranks 1 --dtype bf16",
    "few_rows --rounds 9 --ranks 1 --dtype fp16",
    "all_reduce --rounds 9 --ranks 4 --sizes 4KiB,64KiB,1MiB,16MiB",
]
# Ops that no document shows; --all.
OTHERS = [
    "all_reduce --dtype bf16",
    "gemm_reduce_scatter",
    "all_gather_gemm",
    "all_reduce_add_rms_norm",
    "vocab_embedding",
    "vocab_cross_entropy",
    "codecs_group",
    "few_rows_cached --ranks 1",
    "few_rows_cached --ranks 1 --dtype bf16",
    *(f"ddp_step --rounds 5 --hosts 2 --link {link} --sizes 40MiB" for link in ("1gbit", "10gbit")),
    "dispatch",
    "overheads",
    "overheads --dtype bf16",
    "overheads_training",
    "overheads_training --dtype bf16",
]


def chosen(ops: Sequence[str], everything: bool = False) -> list[str]:
    """The runs of these ops; of none, those of the documents, or everything."""
    return [run for run in (RUNS + OTHERS if ops or everything else RUNS) if not ops or run.split()[0] in ops]


def command(run: str, folder: Path, wait: float) -> list[str]:
    """The program that makes a run, with the file of its rows."""
    name, *words = run.split()
    program = [f"bench.{name}", *words] if name in PROGRAMS else ["bench.run", name, *words]
    waiting = ["--wait", str(wait)] if name not in ("generate", "serve") else []
    return [sys.executable, "-m", *program, "--out", str(folder / f"{name}.jsonl"), *waiting]


def spins(run: str) -> bool:
    """Whether the run compares programs that spin with programs that sleep, and its ranks have one thread each."""
    return run.split()[0] not in ("generate", "serve") and "--link" not in run


@contextlib.contextmanager
def real_time() -> Iterator[None]:
    """The scheduler of programs started inside, where this user may."""
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(PRIORITY))
    try:
        yield
    finally:
        os.sched_setscheduler(0, *before)


def ended(words: Sequence[str], seconds: float, first: bool = False) -> int | None:
    """The exit code of a program; None if it had not ended by then, and was killed with its ranks.

    Args:
        first: at real-time priority, where this user may.
    """
    with real_time() if first else contextlib.nullcontext():
        program = subprocess.Popen(words, start_new_session=True)
    with program:
        try:
            return program.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if program.returncode is None:
                os.killpg(program.pid, signal.SIGKILL)


def made(runs: Sequence[str], folder: Path, wait: float, until: float) -> Iterator[str]:
    """Make the runs; yield those for which there was no time or no link.

    Raises:
        SystemExit: a run found a wrong result, or failed.
    """
    obstacle = links.obstacle() if any("--link" in run for run in runs) else None
    if obstacle is not None:
        print(f"no links between network namespaces here, and no row of them: {obstacle}")
    for run in runs:
        left = until - time.monotonic()
        if "--link" in run and obstacle is not None:
            continue
        if left <= 0:
            yield run
            continue
        print(f"\n# {run}", flush=True)
        code = ended(command(run, folder, wait), left, spins(run))
        if code is None:
            yield run
        elif code:
            sys.exit(code)


def draw(results: Path, path: Path) -> None:
    """Draw the picture, where matplotlib is installed."""
    try:
        from bench import picture
    except ImportError:
        print("no picture: matplotlib is missing (pip install 'tpkernels[bench]')")
        return
    if picture.draw(results, path):
        print(f"picture: {path}")


def main(
    ops: Annotated[list[str] | None, typer.Argument(help="Ops to measure; default: those of the documents.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Also the ops that no document shows.")] = False,
    minutes: Annotated[float, typer.Option(help="After which nothing more is measured.")] = 10.0,
    wait: Annotated[float, typer.Option(help="Seconds to wait for a quiet machine in each run.")] = 10.0,
    keep: Annotated[bool, typer.Option("--keep", help=KEEP_HELP)] = False,
    out: Annotated[Path | None, typer.Option(help="Folder of JSON lines, one file an op; default runs/bench.")] = None,
) -> None:
    """Make each run when the machine is quiet; stop at the first that finds a wrong result."""
    folder = destination("", keep, out)
    left = list(made(chosen(ops or [], everything), folder, wait, time.monotonic() + 60 * minutes))
    goals.main(folder, strict=False)
    for run in left:
        print(f"not measured within {minutes:g} minutes: {run}")
    draw(folder, PICTURE if keep else folder / "bench.png")


if __name__ == "__main__":
    typer.run(main)
