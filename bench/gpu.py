"""Measure the CUDA half on one GPU: `python -m bench.gpu --out gpu.jsonl`.

The protocol is that of bench/timing.py on the device's clock (bench/gpu_timing.py). Several ranks are streams of this
one GPU, so that numbers between ranks are those of the kernels and its memory, not of links. Each family of
cells runs in a process of its own: a kernel that fails takes the others of its process along.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import rows as kept
from bench.gpu_cells import Cell, cells
from bench.gpu_ranks import ENVIRONMENT
from bench.rows import Row

FAMILY_S = 28.0
NO_GPU = 2


@dataclass(frozen=True)
class Goal:
    """What was to be reached: the worst of the rows that it is about must be `at_least`.

    Args:
        found: the ratio of a row.
    """

    title: str
    fits: Callable[[Row], bool]
    found: Callable[[Row], float | None]
    at_least: float

    def verdict(self, rows: Sequence[Row]) -> str:
        """One line."""
        values = [self.found(row) for row in rows if self.fits(row) and row["verified"]]
        known = [value for value in values if value is not None and not math.isnan(value)]
        if not known:
            return f"{self.title}: at least {self.at_least:.3g}, not measured"
        worst, best = min(known), max(known)
        word = "reached" if worst >= self.at_least else "MISSED"
        return f"{self.title}: at least {self.at_least:.3g}, found {worst:.3g} to {best:.3g}, {word}"


GOALS = [
    *(Goal(f"{name} over the speed of a copy", lambda r, n=name: r["family"] == "codec" and r["variant"] == n,
           lambda r: r["share"], 0.9) for name in ("encode", "decode")),
    Goal("GEMM in parts over the product alone, M >= 4096",
         lambda r: r["family"] == "gemm" and r["variant"].startswith("parts_") and r["M"] >= 4096,
         lambda r: r["ratio"], 0.97),
    Goal("add and norm in one op over all_reduce, add, F.rms_norm, M <= 64",
         lambda r: r["family"] == "norm" and r["variant"] == "fused" and r["M"] <= 64, lambda r: r["ratio"], 2.0),
    Goal("CuPy's NCCL over our all_reduce, a world of one",
         lambda r: r["family"] == "nccl" and r["variant"] == "tpkernels", lambda r: r["ratio"], 1.0),
]  # fmt: skip


def families(found: Sequence[Cell]) -> list[str]:
    """Names, in the order of the cells."""
    return list(dict.fromkeys(cell.family for cell in found))


def measure_family(family: str, out: Path) -> int:
    """Measure the cells of one family in this process; the error of a cell is printed, and the next one measured."""
    from bench.gpu_timing import copy_bytes_per_s, rows_of

    failed, copy_speed = 0, copy_bytes_per_s()
    for cell in (cell for cell in cells() if cell.family == family):
        try:
            with cell.make() as made:
                if isinstance(made, str):
                    print(f"{cell.name}: left out, {made}", flush=True)
                    continue
                found = rows_of(made, copy_speed)
        except Exception:  # whatever it is, the other cells have a right to be measured
            traceback.print_exc()
            print(f"{cell.name}: failed", flush=True)
            failed = 1
            continue
        kept.save(out, found)
        for row in found:
            print(line(row), flush=True)
        failed |= not all(row["verified"] for row in found)
    return failed


def line(row: Row) -> str:
    """A row to read."""
    size = f"{row['M']} rows" if row["M"] else f"{row['bytes'] >> 20} MiB"
    share = f", {row['share']:.0%} of its floor" if row["share"] else ""
    ratio = f", {row['ratio']:.3g}x {row['baseline']}" if row["ratio"] and row["variant"] != row["baseline"] else ""
    took = (
        "wrong, not timed" if not row["verified"] else f"{row['median_us']:,} us (p90 {row['p90_us']:,}){share}{ratio}"
    )
    return f"{row['op']} {row['variant']} {row['codec']} R={row['R']} {size}: {took}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure everything; the exit code is 1 when a cell failed or a result was wrong, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, help="add the rows to this file; default runs/bench/gpu.jsonl")
    parser.add_argument("--keep", action="store_true", help=kept.KEEP_HELP)
    parser.add_argument("--list", action="store_true", help="only list the cells")
    parser.add_argument("--family", choices=families(cells()), help="measure these cells, in this process")
    parser.add_argument("--goals", action="store_true", help="only print which goals the file reaches")
    options = parser.parse_args(arguments)
    out = kept.destination("gpu.jsonl", options.keep, options.out)
    if options.list:
        print("\n".join(cell.name for cell in cells()))
        print(f"{len(cells())} cells, {len(GOALS)} goals")
        return 0
    if not options.goals:
        os.environ |= ENVIRONMENT
        if not torch.cuda.is_available():
            print("bench.gpu needs a CUDA GPU, and this process sees none.")
            return NO_GPU
        if options.family:
            return measure_family(options.family, out)
    failed = 0 if options.goals else measure_all(out)
    measured = kept.load(out)
    for goal in GOALS:
        print(goal.verdict(measured))
    return failed


def measure_all(out: Path) -> int:
    """Every family in a process of its own."""
    failed = 0
    for family in families(cells()):
        command = [sys.executable, "-m", "bench.gpu", "--family", family, "--out", str(out)]
        try:
            code = subprocess.run(command, check=False, timeout=FAMILY_S).returncode
        except subprocess.TimeoutExpired:
            print(f"{family}: ended after {FAMILY_S:.0f} s", flush=True)
            code = 1
        failed |= code != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
