"""Peak memory of a rank of the main job, to hold the planner against: `python -m bench.planner.memory`.

Each row is a run of `tpkernels train` of a few steps over shared memory: what its ranks have had resident at most.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from bench.planner.cuts import machine_of, recipe_of
from bench.rows import append, circumstances
from tpkernels.planner.memory import memory_of
from tpkernels.train.planned import job_of
from tpkernels.train.settings import Settings

ROWS = Path(__file__).with_name("memory.jsonl")
ARENA_MIB = 16
OPTIONS = {"steps": 4, "parity_steps": 0, "eval_every": 1000, "checkpoint_every": 1000, "sample_bytes": 0}
MAIN = {"layers": 4, "d_model": 256, "heads": 4, "context": 128, "batch": 8}
WIDE = {"layers": 4, "d_model": 640, "heads": 10, "context": 128, "batch": 4}
CUTS: tuple[dict[str, Any], ...] = (
    {"tp": 2}, {"tp": 2, "sequence_parallel": True}, {"tp": 1, "dp": 2}, {"tp": 1, "dp": 2, "zero": 1},
    {"tp": 1, "dp": 2, "zero": 2}, {"tp": 1, "pp": 2},
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A row of the file."""

    row: dict[str, Any]

    @property
    def settings(self) -> Settings:
        return Settings(**self.row["settings"])

    @property
    def name(self) -> str:
        s = self.settings
        return f"{s.layers} layers, {s.d_model} wide, {s.batch} x {s.context}: {recipe_of(s).text()}"

    @property
    def mib(self) -> float:
        """Of the rank that needed most."""
        return float(max(self.row["peak_bytes"])) / 2**20

    @property
    def predicted(self) -> float:
        machine = machine_of(None)
        need = memory_of(machine, job_of(self.settings), recipe_of(self.settings), ARENA_MIB << 20)
        return (machine.device.reserved + need.total) / 2**20


def peaks(settings: dict[str, Any]) -> list[int]:
    """Run it; the most that each rank has had resident."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "tpkernels", "train", "--folder", folder, "--arena-mib", str(ARENA_MIB)]
        for name, value in (OPTIONS | settings).items():
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        return [rank["peak_bytes"] for rank in json.loads(Path(folder, "summary.json").read_text())["ranks"]]


def read() -> list[Row]:
    """All rows."""
    return [Row(json.loads(line)) for line in ROWS.read_text().splitlines()]


def main() -> None:
    """Measure what the file lacks."""
    done = [row.row["settings"] for row in (read() if ROWS.exists() else ())]
    for settings in (size | cut for size in (MAIN, WIDE) for cut in CUTS):
        if settings not in done:
            row = Row({"settings": settings, "peak_bytes": peaks(settings), **circumstances(pinned=False)})
            append(ROWS, row.row)
            print(f"{row.name}: {row.mib:.0f} MiB, predicted {row.predicted:.0f}", flush=True)


if __name__ == "__main__":
    typer.run(main)
