"""Rows of a CSV with the time that each would take, to be held against measurements."""

from __future__ import annotations

import csv
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tpkernels.errors import UserError
from tpkernels.planner.hardware import Cluster, cluster
from tpkernels.planner.recipe import Job, Recipe, refuse, refuse_cut, whole_heads
from tpkernels.planner.shape import Shape
from tpkernels.planner.step import step_s

COLUMNS = ("gpus", "global_batch", "micro_batch", "hidden", "heads", "layers", "seq", "tp", "dp", "pp")
COLUMN = "predicted_ms"
VOCAB = 50257  # of GPT-2, which Megatron's GPTs have
# Machine classes of rows: (device, link between nodes).
MACHINES = {"a100-dgx": ("a100", "hdr100")}


def job_and_recipe(row: Mapping[str, str], ranks_of_node: int, where: str) -> tuple[Job, Recipe]:
    """Return what a row describes: a GPT of Megatron-LM in 16 bits, attention in several kernels, no ZeRO, 1F1B.

    Rows of one node recompute nothing, those of many recompute layers in full: what fits vTrain's rows (MICRO 2024).

    Args:
        row: with `COLUMNS`.
        ranks_of_node: GPUs of a node.
        where: of the row, for errors.

    Raises:
        UserError: a value is no positive integer, or the row describes what cannot run.
    """
    size: dict[str, int] = {}
    for column in COLUMNS:
        text = str(row[column] or "").strip()
        if not text.isdecimal() or int(text) < 1:
            raise UserError(f"plan: {where}: {column}: expected a positive integer, got {text!r}")
        size[column] = int(text)
    if size["hidden"] % size["heads"]:
        raise UserError(f"plan: {where}: hidden {size['hidden']} does not divide into {size['heads']} heads")
    shape = Shape.gpt(size["layers"], size["hidden"], size["heads"], VOCAB)
    job = Job(shape, size["seq"], size["global_batch"], flash=False, overlap=False)
    recompute = "full" if size["gpus"] > ranks_of_node else "none"
    return job, Recipe(size["tp"], size["pp"], size["dp"], size["micro_batch"], recompute=recompute)


def cluster_of(hardware: str, ranks: int) -> Cluster:
    """Return so many GPUs of a machine class.

    Raises:
        UserError: there is no such class.
    """
    if hardware not in MACHINES:
        raise UserError(f"plan: hardware: expected one of {', '.join(MACHINES)}, got {hardware!r}")
    key, between = MACHINES[hardware]
    return cluster(key, ranks, between)


def predicted_ms(row: Mapping[str, str], hardware: str, where: str = "row") -> float:
    """Return the milliseconds of one iteration of a row.

    Raises:
        UserError: as `job_and_recipe`.
    """
    gpus = str(row["gpus"] or "").strip()
    machine = cluster_of(hardware, max(1, int(gpus)) if gpus.isdecimal() else 1)
    job, recipe = job_and_recipe(row, machine.per_node, where)
    cut = (recipe.tp, recipe.pp, recipe.dp)
    if why := refuse_cut(job, machine, *cut, whole_heads(job.shape)) or refuse(job, recipe):
        raise UserError(f"plan: {where}: {why}")
    return 1e3 * step_s(machine, job, recipe).total


def predict(rows: Path, hardware: str, out: Path) -> int:
    """Write the rows of a CSV with one more column, `predicted_ms`; their order and other columns stay.

    Args:
        rows: with a header that has `COLUMNS`.
        hardware: a machine class, such as "a100-dgx".
        out: written whole or not at all; it may be `rows`.

    Returns:
        the number of rows.

    Raises:
        UserError: a file cannot be read or written, a column is missing, or a row is wrong; the text has its line.
    """
    cluster_of(hardware, 1)
    try:
        with rows.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            header = list(reader.fieldnames or [])
            if missing := [column for column in COLUMNS if column not in header]:
                raise UserError(
                    f"plan: {rows}: no column {', '.join(missing)}; there are {', '.join(header) or 'none'}"
                )
            if COLUMN in header or len(set(header)) < len(header):
                raise UserError(f"plan: {rows}: expected columns of different names and none of {COLUMN}, got {header}")
            found = []
            for row in reader:
                where = f"{rows}, line {reader.line_num}"
                if None in row or None in row.values():
                    raise UserError(f"plan: {where}: expected {len(header)} values")
                found.append({**row, COLUMN: f"{predicted_ms(row, hardware, where):.4f}"})
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"plan: {rows} cannot be read: {error}") from None
    _write(out, [*header, COLUMN], found)
    return len(found)


def _write(out: Path, header: list[str], rows: list[dict[str, str]]) -> None:
    part = None
    try:
        with tempfile.NamedTemporaryFile("w", dir=out.parent, delete=False, newline="", encoding="utf-8") as file:
            part = Path(file.name)
            writer = csv.DictWriter(file, header, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        part.chmod(0o644)
        os.replace(part, out)
    except OSError as error:
        if part is not None:
            part.unlink(missing_ok=True)
        raise UserError(f"plan: {out} cannot be written: {error.strerror}") from None
