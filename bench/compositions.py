"""Train a small model in every composition of cuts: `python -m bench.compositions`, with --keep for the documents.

Each composition trains for some steps, writes a checkpoint, and another one of as many ranks reads it and goes on. Kept
is how far losses and parameters are from those of the uncut model in one process.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from typing import Annotated

import torch
import typer

from bench import rows as kept
from bench.readme import compositions
from bench.rows import Row
from tests.harness.pipelines import EVERY, STEPS, check_shape, other_of
from tpkernels.comm.group import Group
from tpkernels.comm.objects import gather
from tpkernels.testing import run_ranks


def measure(folder: str, ranks: int) -> list[Row]:
    """A row for each composition of so many ranks."""
    torch.set_num_threads(1)
    found = []
    with Group.open() as world:
        for shape in (one for one in EVERY if one.ranks == ranks and one.accumulate == 2):
            other = other_of(shape)
            off = gather(check_shape(shape, other, folder), world)
            loss, parameters = (max(each) for each in zip(*off, strict=True))
            found.append({
                "kind": "composition", "layout": shape.id, "method": other.id, "steps": 2 * STEPS, "ranks": ranks,
                "shape": asdict(shape), "loss": loss, "parameters": parameters,
            })  # fmt: skip
    return found


def main(keep: Annotated[bool, typer.Option("--keep", help=kept.KEEP_HELP)] = False) -> None:
    """Train in every composition of up to eight ranks; an assertion says which is not the uncut model."""
    said = kept.circumstances(False)
    where = {key: said[key] for key in ("machine", "torch", "commit", "date")}
    every: list[Row] = []
    file = kept.destination(kept.COMPOSITIONS, keep)
    for ranks in (1, 2, 4, 8):
        with tempfile.TemporaryDirectory() as folder:
            every += [row | where for row in run_ranks(measure, ranks, folder, ranks, timeout=1800.0)[0]]
        kept.save(file, every)
    print(compositions(every))


if __name__ == "__main__":
    typer.run(main)
