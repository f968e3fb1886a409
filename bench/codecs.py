"""Packing by itself: how near encode, decode and encode with error feedback come to a copy of the same values.

One rank, one core. A share is bytes read and written in a second over what `copy_` of the same values reads and writes;
a row's `ratio` is of times, `share` makes the one of the other. `python -m bench.codecs` prints them. The bytes of a
row are those of the values: 256 KiB lie in the second-level cache, 4 MiB in the third, 64 MiB in memory. Moves are ops
here, with a call's 1.0 to 1.5 us (Intel with AMX, one core).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench import rows as kept
from bench.cell import CODEC_FLOOR, CODEC_ROUNDING, DTYPES, Cell, Setting, compare, rounding
from bench.rows import Row
from bench.shapes import format_bytes
from bench.timing import Candidate
from tpkernels import ops
from tpkernels.compress import CODECS, wire_bytes

OP = "codec_moves"
GOALS = {"encode": 0.7, "decode": 0.7, "feedback": 0.4}
"""Of one core's copy bandwidth, for each move."""
MOVES = tuple(GOALS)


def moved(move: str, codec: str, nbytes: int, itemsize: int) -> int:
    """Bytes that a move of so many bytes of values reads and writes."""
    if move == "copy":
        return 2 * nbytes
    numel = nbytes // itemsize
    residual = 8 * numel if move == "feedback" else 0
    return nbytes + residual + wire_bytes(codec, numel, itemsize)


def share(row: Row) -> float:
    """Of the copy's bandwidth."""
    move, _, codec = row["variant"].partition("_")
    size = (codec, row["bytes"], DTYPES[row["dtype"]].itemsize)
    return float(row["ratio"]) * moved(move, *size) / moved("copy", *size)


def least_ratio(move: str, codec: str, itemsize: int = 4) -> float:
    """The ratio of times at which a move of many values reaches the goal."""
    many = 1 << 20
    return GOALS[move] * moved("copy", codec, many, itemsize) / moved(move, codec, many, itemsize)


def moves(setting: Setting, nbytes: int) -> Cell:
    """Every move of every codec that packs, beside a copy."""
    n = nbytes // setting.itemsize
    x = setting.values(setting.rank, n)
    y, residual = torch.empty_like(x), torch.zeros(n)
    exact = x.double()
    magnitude = exact.abs()

    def near(codec: str) -> Callable[[Tensor], float]:
        share_lost = 1.01 * CODEC_ROUNDING[codec] + rounding(setting.dtype)
        return compare(exact, share_lost * magnitude + 1.01 * CODEC_FLOOR[codec] * magnitude.max())

    def of(codec: str) -> Iterator[Candidate]:
        wire = ops.compress(x, codec)

        def unpacked(found: Tensor) -> Tensor:
            return ops.decompress(found, (n,), setting.dtype, codec)

        def right(found: Tensor) -> float:
            return near(codec)(unpacked(found))

        label: dict[str, str | None] = {"codec": codec, "path": None, "transport": None}
        yield Candidate(f"encode_{codec}", lambda: ops.compress(x, codec), right, label=label)
        yield Candidate(f"decode_{codec}", lambda: unpacked(wire), near(codec), label=label)
        yield Candidate(
            f"feedback_{codec}",
            call=lambda: ops.compress_with_feedback(x, residual, codec),
            error=right,
            load=residual.zero_,
            label=label,
        )

    def copied(found: Tensor) -> float:
        return 0.0 if torch.equal(found, x) else 9.0

    candidates = [Candidate("copy", lambda: y.copy_(x), copied)]
    for codec in CODECS:
        candidates += of(codec) if codec != "none" else ()
    wanted = [c for c in candidates if not setting.only or c.name in ("copy", *setting.only)]
    return Cell(OP, setting.dtype_name, setting.world_size, {"bytes": nbytes}, wanted, "copy")


def main(
    results: Annotated[Path, typer.Argument(help="A file of JSON lines.")] = kept.RESULTS / "codec_moves.jsonl",
    strict: Annotated[bool, typer.Option(help="Exit 1 if a move misses its goal, at any size.")] = False,
) -> None:
    """Print shares of the copy's bandwidth from the kept rows."""
    found = [row for row in kept.load(results) if row["op"] == OP and row["variant"] != "copy" and row["ratio"]]
    table = Table(box=None, pad_edge=False, header_style="bold")
    sizes = sorted({row["bytes"] for row in found})
    for name in ("move", *map(format_bytes, sizes)):
        table.add_column(name)
    for variant in dict.fromkeys(row["variant"] for row in found):
        by_size = {row["bytes"]: share(row) for row in found if row["variant"] == variant}
        table.add_row(variant, *(f"{by_size[size]:.0%}" if size in by_size else "-" for size in sizes))
    Console(width=120).print(table)
    if strict and (not found or any(share(row) < GOALS[row["variant"].partition("_")[0]] for row in found)):
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
