"""The picture of README: latency of all_reduce over size, and exposed communication of the fused ops between two hosts.

`python -m bench.picture` draws it from bench/results; a row of panels for each machine class that was measured. Colours
are those of Okabe and Ito, of different lightness, and lines and bars differ in marks and hatches, so that it can be
printed in grey.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench import rows as kept
from bench.rows import Row
from bench.shapes import format_bytes
from bench.table import digits, size, under

GREY, ORANGE, BLUE = "#8c8c8c", "#e69f00", "#0072b2"
LINES: dict[str, tuple[str, dict[str, Any]]] = {
    "gloo": ("torch.distributed, gloo", {"color": GREY, "marker": "s", "ls": "--"}),
    "plain": ("tpkernels.ops.all_reduce_", {"color": BLUE, "marker": "o"}),
    "sym": ("the same, tensor from group.empty", {"color": ORANGE, "marker": "^", "ls": ":"}),
}
BARS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear_gloo": ("F.linear + gloo", {"color": GREY}),
    "one_chunk": ("the op in one piece", {"color": ORANGE, "hatch": "//"}),
    "tpkernels": ("the op", {"color": BLUE}),
}


def newest(rows: Sequence[Row], *keys: str) -> dict[tuple[Any, ...], Row]:
    """The latest verified row for each value of these fields."""
    return {tuple(row[k] for k in keys): row for row in sorted(rows, key=lambda r: str(r["date"])) if row["verified"]}


def latency(axes: Axes, rows: Sequence[Row]) -> None:
    """One line for each program: median, whiskers from least to most."""
    found = newest([r for r in rows if r["median_us"]], "variant", "bytes")
    sizes = sorted({nbytes for _, nbytes in found})
    for variant, (label, style) in LINES.items():
        mine = [found[variant, nbytes] for nbytes in sizes if (variant, nbytes) in found]
        middle = [row["median_us"] for row in mine]
        whiskers = [
            [row["median_us"] - row["min_us"] for row in mine],
            [row["max_us"] - row["median_us"] for row in mine],
        ]
        axes.errorbar([row["bytes"] for row in mine], middle, yerr=whiskers, label=label, ms=5, capsize=2, **style)
    axes.set(xscale="log", yscale="log", xlabel="size of the tensor, fp32", ylabel="microseconds, slowest rank",
             title=f"all_reduce, two ranks of one host\n{rows[0]['machine']['class']}")  # fmt: skip
    axes.set_xticks(sizes, [format_bytes(nbytes) for nbytes in sizes], minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def exposed(axes: Axes, rows: Sequence[Row]) -> None:
    """Three bars for each op and codec: what communication adds to the GEMM alone."""
    found = newest([r for r in rows if r["exposed_us"] is not None], "op", "codec", "variant")
    jobs = [(op, codec) for op, codec, variant in found if variant == "tpkernels"]
    ops = list(dict.fromkeys(op for op, _ in jobs))
    jobs.sort(key=lambda job: ops.index(job[0]))
    height = 0.8 / len(BARS)
    for i, (variant, (label, style)) in enumerate(BARS.items()):
        at = [(j, found.get((op, "none" if variant == "linear_gloo" else codec, variant))) for j, (op, codec) in
              enumerate(jobs)]  # fmt: skip
        ms = {j + (i - 1) * height: max(row["exposed_us"], 0.0) / 1e3 for j, row in at if row is not None}
        bars = axes.barh(list(ms), list(ms.values()), height, label=label, edgecolor="white", **style)
        axes.bar_label(bars, [digits(value) for value in ms.values()], padding=3, fontsize=8)
    axes.set_yticks(range(len(jobs)), [op + ("" if codec == "none" else f"\n{codec}") for op, codec in jobs])
    axes.set_ylim(len(jobs) + 0.2, -0.6)  # the first one above, and room for the legend below the last one
    axes.margins(x=0.12)
    last = rows[-1]
    axes.set(xlabel="milliseconds of communication not hidden behind the GEMM",
             title=f"fused ops, two hosts joined by {last['link']}, {size(last)} {last['dtype']}\n"
                   f"{last['machine']['class']}")  # fmt: skip
    axes.grid(alpha=0.3, axis="x")
    axes.legend(frameon=False, loc="lower right", ncols=len(BARS))


def draw(results: Path, path: Path, link: str = "1gbit") -> bool:
    """Draw both panels for each machine class; the right one only where links were measured. False: nothing to draw."""
    rows = [row for row in kept.load(results) if "variant" in row]
    wanted = {"op": "all_reduce", "dtype": "fp32", "R": 2, "codec": "none", "link": None}
    single = kept.select(rows, **wanted)
    linked = [
        row
        for row in rows
        if row.get("link") == link and row["exposed_us"] is not None and row["dtype"] == "fp32" and row["M"] is not None
    ]
    machines = kept.classes(single)
    if not machines:
        return False
    sheet = Figure(figsize=(14 if linked else 7, 5.2 * len(machines)), layout="constrained")
    panels = sheet.subplots(len(machines), 2 if linked else 1, squeeze=False)
    for machine, (left, *right) in zip(machines, panels, strict=True):
        mine = [row for row in single if row["machine"]["class"] == machine]
        latency(left, mine)
        for axes in right:
            over = [row for row in linked if row["machine"]["class"] == machine]
            exposed(axes, over) if over else axes.axis("off")
    latest = {row["machine"]["class"]: row for row in sorted(single, key=lambda row: str(row["date"]))}
    notes = [under(latest[machine]) for machine in machines]
    width = 190 if linked else 95  # characters of this size beside each other
    sheet.supxlabel("\n".join(textwrap.fill(note, width) for note in notes), fontsize=6.5, color="0.4")
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.savefig(path, dpi=110)
    return True


def main(
    out: Annotated[Path, typer.Argument(help="The PNG to write.")] = kept.PICTURE,
    results: Annotated[Path, typer.Option(help="A file or a folder of JSON lines.")] = kept.RESULTS,
    link: Annotated[str, typer.Option(help="Of the right panel.")] = "1gbit",
) -> None:
    """Draw the picture."""
    if not draw(results, out, link):
        raise typer.BadParameter(f"{results} has no row of all_reduce")


if __name__ == "__main__":
    typer.run(main)
