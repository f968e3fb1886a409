"""Rows as a table to read in a terminal: the columns that a reader needs to believe a number."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.rows import Row
from bench.shapes import format_bytes

Cellwise = Callable[[Row], str]
Line = Sequence[str]


def digits(value: Any, unit: str = "") -> str:
    """Three digits, a dash for nothing."""
    if value is None:
        return "-"
    if abs(value) >= 1000:
        return f"{value:,.0f}{unit}"
    return f"{value:.3g}{unit}"


def times_faster(values: Sequence[Any] | None, unit: str = "x") -> str:
    """3.4x [2.1, 4.0]: a median, and least and most where they are known."""
    if not values or values[0] is None:
        return "-"
    spread = "" if values[1] is None or math.isnan(values[1]) else f" [{digits(values[1])}, {digits(values[2])}]"
    return f"{digits(values[0])}{unit}{spread}"


def ratio(row: Row) -> str:
    """Against the baseline; a dash for the baseline itself."""
    return (
        "-"
        if row["variant"] == row["baseline"]
        else times_faster([row[k] for k in ("ratio", "ratio_min", "ratio_max")])
    )


def size(row: Row) -> str:
    """M x N (x K) where the op has them, else bytes; a dash for what has one size only."""
    if row["M"] is not None:
        return "x".join(str(row[name]) for name in "MNK" if row[name] is not None)
    return "-" if row["bytes"] is None else format_bytes(row["bytes"])


def markdown(head: Line, lines: Iterable[Line], foot: str = "") -> str:
    """A table in markdown.

    Args:
        head: the columns; the first is aligned to the left, the others to the right.
        foot: a paragraph below.
    """
    rule = ["---", *["---:"] * (len(head) - 1)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *lines))
    return f"{table}\n\n{foot}\n" if foot else f"{table}\n"


def show_lines(head: Line, lines: Iterable[Line], console: Console, title: str) -> None:
    """Print a table of text."""
    table = Table(*head, title=title, title_justify="left")
    for line in lines:
        table.add_row(*line)
    console.print(table)


def columns(rows: Sequence[Row]) -> dict[str, Cellwise]:
    """Header -> text; columns that are empty for all rows are left out."""
    everything: dict[str, Cellwise] = {
        "op": lambda r: r["op"],
        "variant": lambda r: r["variant"],
        "codec": lambda r: r["codec"],
        "size": size,
        "R": lambda r: str(r["R"]),
        "dtype": lambda r: r["dtype"],
        "path": lambda r: r["path"] or "-",
        "median us": lambda r: digits(r["median_us"]),
        "p90": lambda r: digits(r["p90_us"]),
        "GFLOP/s": lambda r: digits(r["gflops"]),
        "busbw GB/s": lambda r: digits(r["busbw_gbs"]),
        "exposed us": lambda r: digits(r["exposed_us"]),
        f"vs {rows[0]['baseline']}": ratio,
        "where": lambda r: r["placement"],
        "verified": lambda r: "yes" if r["verified"] else "NO",
    }
    return {name: text for name, text in everything.items() if any(text(row) != "-" for row in rows)}


def under(row: Row) -> str:
    """The text below a table: the machine, the versions, the protocol."""
    at = row["machine"]
    mhz = f" at {at['mhz']} MHz" if at["mhz"] else ""
    cores = f"{at['cores']} {'virtual ' if at['virtual'] else ''}cores"
    pinned = "one core a rank" if row["pinned"] else "not pinned"
    taken = ""  # nothing to say of what was measured once, against nothing
    if row["baseline"] is not None:
        threads = f"{row['threads']} thread{'s' * (row['threads'] > 1)} a rank"
        taken = (
            f"{row['rounds']} rounds, slowest rank, {pinned}, {threads}; "
            f"ratios against {row['baseline']}, taken inside rounds: median [min, max]; "
        )
    return (
        f"{at['class']} ({at['cpu']}), {cores}{mhz}; torch {row['torch']}; tpkernels {row['version']}, commit "
        f"{row['commit']}; {row['date']}; {taken}{row['scheduler']} priority, load {row['load']}"
    )


def show(rows: Sequence[Row], console: Console) -> None:
    """Print a table of rows of one run."""
    if not rows:
        console.print("no rows")
        return
    table, shown = Table(box=None, pad_edge=False, header_style="bold"), columns(rows)
    for name in shown:
        left = name in ("op", "variant", "codec", "path", "dtype", "where", "verified")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    last = None
    for row in rows:
        if last is not None and size(row) != last:
            table.add_section()
        last = size(row)
        table.add_row(*(text(row) for text in shown.values()), style=None if row["verified"] else "bold red")
    console.print(table)
    console.print(under(rows[0]), style="dim", markup=False)
