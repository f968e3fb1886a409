"""The rows of the study: JSON lines, one for each cell, added when the cell is done and kept from then on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
FILE = "study/compression_study.jsonl"  # among the rows of the bench

# What a row measures. A later row of the same identity replaces an earlier one.
IDENTITY = ("kind", "layout", "link", "method", "seed", "steps")


def identity(row: Row) -> tuple[Any, ...]:
    """What it measures."""
    return tuple(row.get(name) for name in IDENTITY)


def load(path: Path) -> list[Row]:
    """All whole rows, in the order in which they were first measured."""
    kept: dict[tuple[Any, ...], Row] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:  # cut off by a crash; the cell is measured again
            continue
        kept[identity(row)] = row
    return list(kept.values())


def add(path: Path, row: Row) -> None:
    """Append a row; it is in the file when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cut_off = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
    with path.open("a") as file:
        file.write(("\n" if cut_off else "") + json.dumps(row) + "\n")


def select(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """The rows that have these values."""
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def values(rows: Sequence[Row], key: str) -> list[float]:
    """That column."""
    return [float(row[key]) for row in rows]
