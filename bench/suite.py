"""Take all measurements anew: `python -m bench.suite --keep` (about 25 minutes on two cores, longer if they are busy).

Each size waits until the machine is quiet, because gloo sleeps where this library spins: on a loaded machine gloo is
measured ten times slower than it is. The placement of the cores cannot be chosen; repeat until goals list near and far.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from bench.rows import KEEP_HELP, destination

# Arguments of `python -m bench.run`; the first word is the op and names the file. The training step is its own program.
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
    "all_reduce_add_rms_norm",
    "vocab_embedding",
    "vocab_cross_entropy",
    "codecs",
    "codecs_group",
    "codec_moves --ranks 1",
    "few_rows --ranks 1",
    "few_rows --ranks 1 --dtype bf16",
    "few_rows --ranks 1 --dtype fp16",
    "dispatch",
    "overheads",
    "overheads --dtype bf16",
    "overheads_training",
    "overheads_training --dtype bf16",
    "train_step",
]


def chosen(ops: Sequence[str]) -> list[str]:
    """The runs of these ops, or all."""
    return [run for run in RUNS if not ops or run.split()[0] in ops]


def main(
    ops: Annotated[list[str] | None, typer.Argument(help="Ops to measure; default all.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help=KEEP_HELP)] = False,
    out: Annotated[Path | None, typer.Option(help="Folder of JSON lines, one file an op; default runs/bench.")] = None,
    wait: Annotated[float, typer.Option(help="Seconds to wait for a quiet machine in each run.")] = 3600.0,
    repeat: Annotated[int, typer.Option(help="How often to go through the list.")] = 1,
) -> None:
    """Run the list, each run when the machine is quiet; stop at the first that finds a wrong result."""
    for run in chosen(ops or []) * repeat:
        words = run.split()
        print(f"\n# {run}", flush=True)
        to = ["--out", str(destination("", keep, out) / f"{words[0]}.jsonl"), "--wait", str(wait)]
        program = ["bench.train_step", *words[1:]] if words[0] == "train_step" else ["bench.run", *words]
        command = [sys.executable, "-m", *program, *to]
        if code := subprocess.run(command).returncode:
            sys.exit(code)


if __name__ == "__main__":
    typer.run(main)
