"""The trade-off of a report as a picture (PNG), and as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from tpkernels.errors import UserError
from tpkernels.planner.hardware import Cluster
from tpkernels.planner.memory import most
from tpkernels.planner.recipe import Job, whole_heads
from tpkernels.planner.report import Report
from tpkernels.planner.search import Candidate, Choices, Search

# Parts of a step: name, fields of StepTime, colour.
PARTS = (
    ("compute", ("compute", "optimizer"), "#4c72b0"),
    ("exposed communication", ("tensor", "pipeline", "data"), "#dd8452"),
    ("bubble", ("bubble",), "#b3b3b3"),
)
SHOWN = 12  # bars, and cuts that cannot run on the page
FACTORS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # of the ranks, of scaling curves


def part_of(candidate: Candidate, names: tuple[str, ...]) -> float:
    """Milliseconds of some fields of a candidate's StepTime."""
    return float(1e3 * sum(getattr(candidate.time, name) for name in names))


def scaling(report: Report, grow_batch: bool) -> tuple[list[int], list[float]]:
    """Return numbers of ranks and tokens per second and rank of the best recipe there.

    Args:
        grow_batch: weak scaling: the batch grows with the ranks; otherwise the same job on more ranks.
    """
    ranks, speeds = [], []
    for factor in FACTORS:
        count, batch = report.cluster.ranks * factor, report.job.batch * (factor if grow_batch else 1)
        if count < 1 or count % 1 or batch < 1 or batch % 1:
            continue
        machine: Cluster = replace(report.cluster, ranks=int(count))
        job: Job = replace(report.job, batch=int(batch))
        best = Search(machine, job, whole_heads(job.shape), Choices(), 0).run()[0]
        if best.time:
            ranks.append(int(count))
            speeds.append(job.tokens / best.seconds / count)
    return ranks, speeds


def figure(report: Report) -> Any:
    """Return the matplotlib figure of a report: steps split into their parts, memory over time, scaling.

    Raises:
        UserError: matplotlib is missing, or nothing can run.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("a picture needs matplotlib: pip install matplotlib") from None
    if report.best is None:
        raise UserError("plan: nothing can run, so there is nothing to draw")
    drawn = Figure(figsize=(15, 5.4), layout="constrained")
    bars, plane, curves = drawn.subplots(1, 3, width_ratios=(1.5, 1, 1))
    _bars(bars, report)
    _plane(plane, report)
    top = 0.0
    for grow, label, mark in ((False, "strong: the same batch", "o-"), (True, "weak: the batch grows", "x--")):
        ranks, speeds = scaling(report, grow)
        curves.plot(ranks, speeds, mark, label=label)
        curves.set_xscale("log")
        curves.set_xticks(ranks, labels=[f"{count:,}" for count in ranks], rotation=45)
        top = max(top, *speeds)
    curves.minorticks_off()
    curves.axvline(report.cluster.ranks, color="#b3b3b3", linestyle=":", label=f"{report.cluster.ranks:,} ranks")
    curves.set(ylim=(0, 1.15 * top), xlabel="ranks", ylabel="tokens/s of a rank", title="Scaling")
    curves.legend(loc="lower left", fontsize=8)
    shape, device = report.job.shape, report.cluster.device.name
    drawn.suptitle(
        f"{shape.name}, {shape.parameters / 1e9:,.2f} G parameters, {report.job.tokens:,} tokens a step, "
        f"{report.cluster.ranks:,} x {device}"
    )
    return drawn


def _bars(axes: Any, report: Report) -> None:
    shown = report.runnable[:SHOWN]
    rows, left = list(range(len(shown))), [0.0] * len(shown)
    for name, fields, colour in PARTS:
        values = [part_of(c, fields) for c in shown]
        axes.barh(rows, values, left=left, color=colour, label=name)
        left = [a + b for a, b in zip(left, values, strict=True)]
    error, _ = report.error
    if error is not None:
        axes.errorbar(left, rows, xerr=[x * error / 100 for x in left], fmt="none", ecolor="black", capsize=3,
                      label=f"± {error:.1f} %, the error known")  # fmt: skip
    names = [f"tp {c.tp} pp {c.pp} dp {c.dp}, mb {c.recipe.micro_batch if c.recipe else 0}" for c in shown]
    axes.set(yticks=rows, yticklabels=names, xlabel="ms a step", title="The fastest cuts")
    axes.invert_yaxis()
    axes.set_xlim(0, max(left) * 1.1)
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.12), ncols=4, fontsize=8)


def _plane(axes: Any, report: Report) -> None:
    found = report.runnable
    need = [c.memory.total / 2**30 for c in found if c.memory]
    points = axes.scatter(
        [c.seconds for c in found], need, c=[c.tp for c in found], cmap="viridis", norm="log", s=36, zorder=2
    )
    axes.scatter([found[0].seconds], need[:1], marker="o", s=140, facecolors="none", edgecolors="red", label="best")
    has = most(report.cluster) / 2**30
    axes.axhline(has, color="black", linestyle="--", label=f"{has:.0f} GiB to plan for")
    axes.set(ylim=(0, 1.1 * has), xlabel="s a step", ylabel="GiB on a rank", title="Memory over time")
    bar = axes.figure.colorbar(points, ax=axes, label="tp")
    sizes = sorted({c.tp for c in found})
    bar.set_ticks(sizes, labels=[str(size) for size in sizes])
    bar.minorticks_off()
    axes.legend(fontsize=8)


def _image(report: Report) -> bytes:
    buffer = io.BytesIO()
    figure(report).savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _write(file: Path, data: bytes) -> None:
    try:
        file.write_bytes(data)
    except OSError as error:
        raise UserError(f"plan: {file} cannot be written: {error.strerror}") from None


def png(report: Report, file: Path) -> None:
    """Draw a report.

    Raises:
        UserError: as `figure`, or the file cannot be written.
    """
    _write(file, _image(report))


def html(report: Report, file: Path) -> None:
    """Write a report as a page: the picture, the table of cuts that can run, and the reasons of the others.

    Raises:
        UserError: as `figure`, or the file cannot be written.
    """
    image = base64.b64encode(_image(report)).decode()
    columns = ("recipe", "ms a step", *(name for name, _, _ in PARTS), "tokens/s", "MFU", "GiB a rank", "why it loses")
    lines = []
    for c in report.runnable:
        assert c.recipe and c.memory
        lines.append([
            c.recipe.text(), f"{1e3 * c.seconds:,.1f}", *(f"{part_of(c, fields):,.1f}" for _, fields, _ in PARTS),
            f"{report.tokens_per_s(c):,.0f}", f"{report.mfu(c):.1%}", f"{c.memory.total / 2**30:.1f}", c.why or "best",
        ])  # fmt: skip
    refused = [[f"tp {c.tp}, pp {c.pp}, dp {c.dp}", c.why] for c in report.candidates if c.recipe is None]
    title = escape(f"{report.job.shape.name} on {report.cluster.ranks:,} x {report.cluster.device.name}")
    texts = "".join(f"<p>{escape(text)}</p>" for text in report.texts())
    _write(
        file,
        f"""<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body {{ font: 15px sans-serif; margin: 2em; }} table {{ border-collapse: collapse; }} img {{ max-width: 100%; }}
th, td {{ padding: 3px 10px; text-align: left; border-bottom: 1px solid #ddd; }}</style>
<h1>{title}</h1>{texts}
<img alt="the fastest cuts, memory over time, scaling" src="data:image/png;base64,{image}">
<h2>Cuts that can run</h2>{_table(columns, lines)}
<h2>Cuts that cannot</h2>{_table(("cut", "why"), refused)}
</html>
""".encode(),
    )


def _table(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"
