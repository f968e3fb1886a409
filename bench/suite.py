"""Take all kept measurements anew: `python -m bench.suite` (about 25 minutes on two cores, longer if they are busy).

Each run waits until the machine is quiet, because gloo sleeps where this library spins: on a loaded machine gloo looks
ten times worse than it is. Where the cores were is not ours to choose; repeat until goals list near and far.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from bench.rows import RESULTS

QUIET = 0.05  # of all cores, over WATCH_S
WATCH_S = 5.0

# Arguments of `python -m bench.run`; the first word is the op and names the file.
RUNS = [
    "all_reduce",
    "all_reduce --dtype bf16",
    "all_reduce --ranks 4 --sizes 4KiB,64KiB,1MiB,16MiB",
    "reduce_scatter",
    "all_gather",
    "gemm_all_reduce",
    "gemm_all_reduce --dtype bf16 --sizes 1,16,128,512",
    "gemm_reduce_scatter",
    "all_gather_gemm",
    "vocab_embedding",
    "vocab_cross_entropy",
    "codecs",
    "codecs_group",
    "dispatch",
]


def jiffies() -> tuple[int, int]:
    """Idle and all time of all cores so far."""
    values = [int(v) for v in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return values[3] + values[4], sum(values)


def busy(seconds: float) -> float:
    """The part of all cores that something used, over the next so many seconds."""
    idle, total = jiffies()
    time.sleep(seconds)
    idle_now, total_now = jiffies()
    return 1 - (idle_now - idle) / max(1, total_now - total)


def wait_until_quiet(patience_s: float) -> None:
    """Return when nothing else runs.

    Raises:
        TimeoutError: it did not become quiet in time.
    """
    deadline = time.monotonic() + patience_s
    while (used := busy(WATCH_S)) > QUIET:
        if time.monotonic() > deadline:
            raise TimeoutError(f"bench: the cores were still {100 * used:.0f} % busy after {patience_s:.0f} s")


def chosen(ops: Sequence[str]) -> list[str]:
    """The runs of these ops, or all."""
    return [run for run in RUNS if not ops or run.split()[0] in ops]


def main(
    ops: Annotated[list[str] | None, typer.Argument(help="Ops to measure; default all.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of JSON lines, one file an op.")] = RESULTS,
    patience_s: Annotated[float, typer.Option(help="How long to wait for a quiet machine before each run.")] = 3600.0,
    repeat: Annotated[int, typer.Option(help="How often to go through the list.")] = 1,
) -> None:
    """Run the list, each run when the machine is quiet; stop at the first that finds a wrong result."""
    for run in chosen(ops or []) * repeat:
        wait_until_quiet(patience_s)
        words = run.split()
        print(f"\n# {run}", flush=True)
        command = [sys.executable, "-m", "bench.run", *words, "--out", str(out / f"{words[0]}.jsonl")]
        if code := subprocess.run(command).returncode:
            sys.exit(code)


if __name__ == "__main__":
    typer.run(main)
