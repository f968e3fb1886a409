"""Steps of the main job on this machine, to hold the planner against: `python -m bench.planner.measure OUT.jsonl`.

Each recipe is a run of `tpkernels train` of twelve steps over shared memory; the median of the last eight counts.
A recipe that OUT has already is not run again.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from bench.rows import circumstances

STEPS, COUNTED = 12, 8
# d_model, layers, heads, context, batch
SIZES = ((256, 4, 4, 128, 8), (512, 4, 8, 128, 8), (128, 4, 4, 128, 16), (256, 8, 4, 128, 8), (384, 6, 6, 256, 4))
OPTIONS = {"steps": STEPS, "parity_steps": 0, "eval_every": 1000, "checkpoint_every": 1000, "sample_bytes": 0}


def recipes() -> Iterator[dict[str, Any]]:
    """The settings of every run."""
    for d_model, layers, heads, context, batch in SIZES:
        size = {"d_model": d_model, "layers": layers, "heads": heads, "context": context, "batch": batch}
        for tp, dp in ((1, 1), (2, 1), (1, 2)):
            yield size | {"tp": tp, "dp": dp}
        if layers == 4 and d_model >= 256:
            yield size | {"tp": 2, "dp": 1, "codec": "bf16"}
            yield size | {"tp": 2, "dp": 1, "sequence_parallel": True}
            yield size | {"tp": 1, "dp": 2, "grad_codec": "int8"}


def seconds(recipe: dict[str, Any]) -> float:
    """The median of the last steps of a run."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "tpkernels", "train", "--folder", folder]
        for name, value in (OPTIONS | recipe).items():
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        lines = Path(folder, "log.jsonl").read_text().splitlines()
    steps = [row["seconds"] for row in map(json.loads, lines) if "seconds" in row]
    if len(steps) < COUNTED:
        raise RuntimeError(f"expected {STEPS} steps, got {len(steps)}")
    return median(steps[-COUNTED:])


def main(out: Path, most: Annotated[int, typer.Option(help="Runs of this call.")] = 100) -> None:
    """Measure the recipes that OUT lacks."""
    kept = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    done = [row["recipe"] for row in kept]
    for recipe in [r for r in recipes() if r not in done][:most]:
        row = {"recipe": recipe, "seconds": seconds(recipe), **circumstances(pinned=False)}
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(recipe, f"{1e3 * row['seconds']:.1f} ms")


if __name__ == "__main__":
    typer.run(main)
