"""The study as one picture: loss over steps, loss over bytes, speed over links."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from bench.rows import Row
from bench.study import goals
from bench.study.links import RATES
from bench.study.methods import methods

LAYOUT = "dp2"
CURVES = ("DDP", "none", "fp16", "int8", "fp8", "topk", "topk local", "fp16 delayed", "int8 local", "PowerSGD")
BARS = ("DDP", "DDP fp16 hook", "PowerSGD", "none", "bf16", "fp16", "int8", "fp8", "topk")


def draw(kept: Sequence[Row], folder: Path) -> Path | None:
    """Write compression_study.png; None when matplotlib is not installed or there is nothing to draw."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    if not kept:
        return None
    figure = Figure(figsize=(15, 9), layout="constrained")
    FigureCanvasAgg(figure)
    (curves, sizes), (bars, more) = figure.subplots(2, 2)
    draw_curves(curves, kept)
    draw_bytes(sizes, kept)
    draw_bars(bars, kept, "")
    draw_bars(more, kept, " delayed")
    figure.suptitle("compressed gradients, two replicas of the byte-level GPT", fontsize=12)
    path = folder / "compression_study.png"
    figure.savefig(path, dpi=110)
    return path


def draw_curves(axes: Any, kept: Sequence[Row]) -> None:
    for name in CURVES:
        rows = goals.runs(kept, LAYOUT, name)
        if rows:
            points = [mean(column) for column in zip(*(row["curve"] for row in rows), strict=True)]
            each = rows[-1]["steps"] / len(points)
            axes.plot([each * (i + 1) for i in range(len(points))], points, label=name, linewidth=1.3)
    axes.set(xlabel="step", ylabel="training loss (nats per byte)", title="loss of a replica, mean of the seeds")
    axes.grid(alpha=0.3)
    legend(axes)


def draw_bytes(axes: Any, kept: Sequence[Row]) -> None:
    """The price in loss of fewer bytes."""
    points: list[tuple[str, float, float]] = []
    for method in methods(LAYOUT):
        rows = goals.runs(kept, LAYOUT, method.name)
        if rows:
            found = goals.losses(kept, LAYOUT, method.name)
            sent = rows[-1]["bytes_per_step"] / 1e6
            spread = [[mean(found) - min(found)], [max(found) - mean(found)]]
            marker = "s" if method.torch else {"sync": "o", "delayed": ">", "local": "^"}[method.mode]
            axes.errorbar([sent], [mean(found)], yerr=spread, marker=marker, capsize=2, linewidth=1)
            points.append((method.name, sent, mean(found)))
    for names, sent, loss in neighbours(points):
        axes.annotate(
            "\n".join(names), (sent, loss), xytext=(0, 20), textcoords="offset points", fontsize=7, ha="center"
        )
    axes.margins(0.1)
    axes.set(
        xscale="log",
        xlabel="MB a step and rank",
        ylabel="validation loss",
        title="loss over bytes, with the seeds' spread",
    )
    axes.grid(alpha=0.3)


def neighbours(points: Sequence[tuple[str, float, float]]) -> Iterator[tuple[list[str], float, float]]:
    """Points (name, bytes, loss) that would lie on each other's labels, together at the place of the first."""
    left = sorted(points, key=lambda point: point[1])
    while left:
        _, sent, loss = left[0]
        near = [p for p in left if p[1] < 1.35 * sent and abs(p[2] - loss) < 0.03 * loss]
        yield [name for name, _, _ in near], sent, loss
        left = [p for p in left if p not in near]


def draw_bars(axes: Any, kept: Sequence[Row], mode: str) -> None:
    """Speed over links, against DDP plain."""
    names = [name if name in ("DDP", "DDP fp16 hook", "PowerSGD") else name + mode for name in BARS]
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        pairs = [(goals.tokens(kept, LAYOUT, link, name), goals.tokens(kept, LAYOUT, link, "DDP")) for link in RATES]
        ratios = [mine / plain if mine and plain else 0.0 for mine, plain in pairs]
        axes.bar([x + (i - len(names) / 2 + 0.5) * width for x in range(len(RATES))], ratios, width, label=name)
    axes.axhline(1.0, color="#444444", linewidth=0.8)
    axes.set_xticks(range(len(RATES)), list(RATES))
    axes.set(ylabel="tokens/s against DDP plain", title=f"speed over links{f', mode{mode}' if mode else ', mode sync'}")
    axes.grid(alpha=0.3, axis="y")
    legend(axes)


def legend(axes: Any) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8, ncols=2)
