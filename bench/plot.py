"""Draw latency and ratio over size from rows: `python -m bench.plot all_reduce.png --op all_reduce`.

Over a link between two hosts, what of the fused GEMMs' communication is exposed: `--link 1gbit`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench import rows as kept
from bench.rows import Row
from bench.shapes import format_bytes
from bench.table import size, under

COLORS = ["#7f7f7f", "#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b"]  # baseline first, in grey


def across(row: Row) -> int:
    """The value on the x axis: tokens of a GEMM or vocabulary op, bytes of a collective."""
    return int(row["M"] if row["M"] is not None else row["bytes"])


def lines(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Latest rows by variant, smallest size first; the baseline first."""
    latest: dict[tuple[str, int], Row] = {}
    for row in sorted(rows, key=lambda r: r["date"]):
        if row["verified"] and row["median_us"] is not None and (row["M"] or row["bytes"]):
            latest[row["variant"], across(row)] = row
    names = sorted({v for v, _ in latest}, key=lambda v: (v != rows[0]["baseline"], v))
    return {v: [latest[key] for key in sorted(latest) if key[0] == v] for v in names}


def draw(axes: Axes, found: dict[str, list[Row]], value: str, low: str, high: str) -> None:
    """One line for each variant, with a whisker from least to most; the baseline against itself says nothing."""
    for color, (name, rows) in zip(COLORS * 3, found.items(), strict=False):
        baseline = value == "ratio" and name == rows[0]["baseline"]
        shown = [row for row in rows if row[value] is not None and row[value] > 0 and not baseline]
        if not shown:
            continue
        middle = [row[value] for row in shown]
        whiskers: Any = [[m - row[low] for m, row in zip(middle, shown, strict=True)],
                         [row[high] - m for m, row in zip(middle, shown, strict=True)]]  # fmt: skip
        axes.errorbar([across(r) for r in shown], middle, yerr=whiskers, marker="o", ms=4, lw=1.5, capsize=2,
                      color=color, label=name)  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.grid(alpha=0.3)


def figure(rows: Sequence[Row], path: Path) -> None:
    """Latency on the left, times faster than the baseline in the middle, exposed communication of GEMMs on the right.

    Raises:
        ValueError: no verified row.
    """
    found = lines(rows) if rows else {}
    if not found:
        raise ValueError("plot: there is no verified row of this op, dtype and number of ranks")
    first, tokens = rows[0], rows[0]["M"] is not None
    exposes = any(row["exposed_us"] is not None for some in found.values() for row in some)
    sheet = Figure(figsize=(18 if exposes else 12, 5), layout="constrained")
    left, right, *more = sheet.subplots(1, 3 if exposes else 2)
    draw(left, found, "median_us", "min_us", "max_us")
    draw(right, found, "ratio", "ratio_min", "ratio_max")
    for axes in more:
        draw(axes, found, "exposed_us", "exposed_us", "exposed_us")
    right.axhline(1, color=COLORS[0], lw=1)
    ticks = sorted({across(row) for some in found.values() for row in some})
    labels = ["microseconds, slowest rank", f"times faster than {first['baseline']}", "exposed microseconds"]
    for axes, label in zip((left, right, *more), labels, strict=False):
        axes.set_xticks(ticks, [str(t) if tokens else format_bytes(t) for t in ticks])
        axes.set(xlabel="tokens M" if tokens else "size", ylabel=label)
        axes.legend(frameon=False)
    sheet.suptitle(f"{first['op']}, {first['R']} ranks, {first['dtype']}: median over rounds, whiskers least and most")
    sheet.supxlabel(under(first), fontsize=7, color="gray")
    sheet.savefig(path, dpi=130)


EXPOSED = {"linear_gloo": "F.linear, then gloo", "one_chunk": "one chunk", "tpkernels": "chunks"}


def exposed_figure(rows: Sequence[Row], path: Path) -> None:
    """For each op, size, dtype and codec three bars: milliseconds beyond the faster GEMM alone.

    Raises:
        ValueError: no verified row of a fused GEMM.
    """
    latest: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in sorted((r for r in rows if r["verified"] and r["exposed_us"] is not None), key=lambda r: r["date"]):
        latest.setdefault((f"{row['op']}\n{size(row)} {row['dtype']}", row["codec"], row["date"]), {})[
            row["variant"]
        ] = row
    groups = {(op, codec): found for (op, codec, _), found in latest.items() if "tpkernels" in found}
    if not groups:
        raise ValueError("plot: there is no verified row of a fused GEMM over this link")
    plain = {op: found["linear_gloo"] for (op, _, _), found in latest.items() if "linear_gloo" in found}
    sheet = Figure(figsize=(3 + 1.7 * len(groups), 5), layout="constrained")
    axes = sheet.subplots()
    for i, (variant, label) in enumerate(EXPOSED.items()):
        for at, ((op, _), found) in enumerate(groups.items()):
            row = plain.get(op) if variant == "linear_gloo" else found.get(variant)
            if row is None:
                continue
            value = max(row["exposed_us"], 0.0) / 1e3
            bar = axes.bar(at + 0.28 * (i - 1), value, 0.26, color=COLORS[i], label=label if at == 0 else None)
            axes.bar_label(bar, [f"{value:.1f}"], fontsize=8)
    axes.set_xticks(range(len(groups)), [f"{op}\ncodec {codec}" for op, codec in groups], fontsize=8)
    axes.set(ylabel="exposed milliseconds")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.margins(y=0.15)
    axes.legend(frameon=False, ncols=len(EXPOSED), loc="upper right")
    first = next(iter(next(iter(groups.values())).values()))
    sheet.suptitle(f"Time beyond the GEMM alone, {first['R']} ranks on two hosts, link of {first['link']}")
    sheet.supxlabel(under(first), fontsize=7, color="gray", wrap=True)
    sheet.savefig(path, dpi=130)


def main(
    out: Annotated[Path, typer.Argument(help="The PNG to write.")],
    op: Annotated[str, typer.Option()] = "all_reduce",
    ranks: Annotated[int, typer.Option()] = 2,
    dtype: Annotated[str, typer.Option()] = "fp32",
    link: Annotated[str | None, typer.Option(help="All fused GEMMs of runs with --hosts 2 over this link.")] = None,
    results: Annotated[Path, typer.Option(help="A file or a folder of JSON lines.")] = kept.RESULTS,
) -> None:
    """Draw one op, or all fused GEMMs over a link."""
    found = [r for r in kept.load(results) if "kind" not in r and r["R"] == ranks and r.get("link") == link]
    try:
        if link is None:
            figure([r for r in found if (r["op"], r["dtype"]) == (op, dtype)], out)
        else:
            exposed_figure(found, out)
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    typer.run(main)
