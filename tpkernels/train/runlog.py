"""The log of a run: one JSON line for each step, in a file that a resumed run continues."""

from __future__ import annotations

import json
import os
from pathlib import Path


class RunLog:
    """Records of the steps, in memory and, on the rank that has a path, in a file.

    Args:
        path: None keeps records in memory only.
        keep_below: records of this step and later are dropped from the file: they were written after the checkpoint
            from which the run continues, and will be written again.
    """

    def __init__(self, path: Path | None, keep_below: int = 0) -> None:
        self.path = path
        self.records: list[dict[str, float]] = []
        if path is None:
            return
        if path.exists():
            self.records = [r for r in read(path) if r["step"] < keep_below]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(r) + "\n" for r in self.records))
        os.replace(temporary, path)

    def add(self, record: dict[str, float]) -> None:
        """Append one step; it is in the file when this returns."""
        self.records.append(record)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")


def read(path: Path) -> list[dict[str, float]]:
    """All whole lines; a line that was cut off by a crash is left out."""
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records
