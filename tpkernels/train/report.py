"""The report of a run: a table, a picture and a summary, printed and written to the run's folder."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tpkernels.comm.objects import gather
from tpkernels.shard import full_shape
from tpkernels.train.parity import Parity
from tpkernels.train.trainer import Run

LAST = 50  # steps that count for loss and speed "at the end"
PHASES = ("forward", "backward", "optimizer", "data")


@dataclass(frozen=True)
class Rank:
    """The numbers of one rank.

    replica_bytes and stage_bytes: sent to other replicas, and to other stages, in a step of this
    call.
    """

    parameters: int
    peak_bytes: int
    communication: float
    waiting: float
    replica_bytes: float = 0.0
    stage_bytes: float = 0.0


@dataclass(frozen=True)
class Report:
    """Everything that the table shows; `summary.json` in the run's folder has the same."""

    ranks: list[Rank]
    whole_parameters: int
    transport: str
    steps: int
    planned_steps: int | None
    tokens_per_s: float
    train_loss: float
    validation_loss: float | None
    parity: Parity | None
    bubble: tuple[float, float] | None = None


def collect(run: Run) -> Report:
    """Ask all ranks. Call it before the check against one process, which needs memory of its own."""
    records = run.log.records if run.group.rank == 0 else []
    seconds = sum(r["seconds"] for r in run.log.records)
    mine = Rank(
        parameters=sum(p.numel() for p in run.trainer.model.parameters()),
        peak_bytes=peak_bytes(),
        communication=sum(r["communication"] for r in run.log.records) / seconds if seconds else math.nan,
        waiting=sum(r["waiting"] for r in run.log.records) / seconds if seconds else math.nan,
        replica_bytes=run.replica_bytes(),
        stage_bytes=0.0 if run.trainer.pipe is None else run.trainer.pipe.bytes_sent / max(1, run.step - run.first),
    )
    ranks = gather(mine, run.group)
    validations = [r["validation_loss"] for r in records if "validation_loss" in r]
    last = records[-LAST:]
    return Report(
        ranks=ranks,
        whole_parameters=whole_parameters(run),
        transport=run.layout.transport,
        steps=run.step,
        planned_steps=run.total,
        tokens_per_s=run.settings.tokens * len(last) / sum(r["seconds"] for r in last) if last else math.nan,
        train_loss=sum(r["loss"] for r in last) / len(last) if last else math.nan,
        validation_loss=validations[-1] if validations else None,
        parity=None,
        bubble=None if run.trainer.pipe is None else (run.trainer.pipe.bubble(), run.trainer.pipe.expected_bubble),
    )


def whole_parameters(run: Run) -> int:
    """The size of the uncut model: cut parameters count with their full size, replicated ones once; a collective."""
    mine = sum(full_shape(parameter).numel() for parameter in run.trainer.model.parameters())
    return mine if run.layout.pp is None else sum(run.layout.pp.all_gather_ints(mine))


def peak_bytes() -> int:
    """The most memory this process has had resident (shared memory included)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def show(report: Report, console: Console) -> None:
    """Print the table."""
    table = Table(title="training over " + _count(len(report.ranks), "rank"), title_justify="left", show_edge=False)
    table.add_column("")
    for rank in range(len(report.ranks)):
        table.add_column(f"rank {rank}", justify="right")
    ranks = report.ranks
    table.add_row("parameters", *(f"{r.parameters:,}" for r in ranks))
    table.add_row("peak memory", *(f"{r.peak_bytes / 2**20:,.0f} MiB" for r in ranks))
    table.add_row("communication, share of step time", *(f"{r.communication:.1%}" for r in ranks))
    table.add_row("  of it waiting for the other ranks", *(f"{r.waiting:.1%}" for r in ranks))
    if any(r.replica_bytes for r in ranks):
        table.add_row("sent to other replicas, a step", *(f"{r.replica_bytes / 1e6:.2f} MB" for r in ranks))
    if any(r.stage_bytes for r in ranks):
        table.add_row("sent to other stages, a step", *(f"{r.stage_bytes / 1e6:.2f} MB" for r in ranks))
    console.print()
    console.print(table)
    console.print()
    facts = Table(show_header=False, box=None, pad_edge=False)
    facts.add_column(style="bold")
    facts.add_column()
    for name, value in _facts(report):
        facts.add_row(name, value)
    console.print(facts)


def _facts(report: Report) -> list[tuple[str, str]]:
    planned = f" of {report.planned_steps:,} planned" if report.planned_steps not in (None, report.steps) else ""
    last = min(LAST, report.steps)
    facts = [
        ("parameters, uncut", f"{report.whole_parameters:,}"),
        ("transport", report.transport),
        ("steps", f"{report.steps:,}{planned}"),
        (f"tokens/s (last {last} steps)", f"{report.tokens_per_s:,.0f}"),
        (f"train loss (last {last} steps)", _loss(report.train_loss)),
    ]
    if report.validation_loss is not None:
        facts.append(("validation loss", _loss(report.validation_loss)))
    if report.bubble is not None:
        facts.append(("pipeline bubble", f"{report.bubble[0]:.1%}; (p-1)/(m+p-1) is {report.bubble[1]:.1%}"))
    if report.parity is not None:
        p = report.parity
        verdict = "within rounding" if p.holds else "MORE THAN ROUNDING ALLOWS"
        facts.append(
            (
                f"same {_count(p.steps, 'step')} in one process, uncut",
                f"{verdict}: loss differs by {p.loss_difference:.1e} at most (bound {p.loss_bound:.1e}), "
                f"gradient norm by {p.norm_difference:.1e} (bound {p.norm_bound:.1e}, relative)",
            )
        )
    return facts


def _loss(nats: float) -> str:
    return f"{nats:.3f} nats per byte ({nats / math.log(2):.2f} bits)"


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def write_summary(report: Report, folder: Path) -> Path:
    """The report as JSON."""
    path = folder / "summary.json"
    path.write_text(json.dumps(asdict(report), indent=2) + "\n")
    return path


def draw(records: list[dict[str, float]], folder: Path, title: str) -> Path | None:
    """The loss curve and the split of the step time, as `training.png`; None when matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _draw_loss(left, records)
    _draw_split(right, records)
    figure.suptitle(title, fontsize=11)
    path = folder / "training.png"
    figure.savefig(path, dpi=120)
    return path


def _draw_loss(axes: Any, records: list[dict[str, float]]) -> None:
    steps = [r["step"] + 1 for r in records]
    axes.plot(steps, [r["loss"] for r in records], color="#9bb8d3", linewidth=0.8, label="each step")
    axes.plot(steps, smooth([r["loss"] for r in records]), color="#1f5a92", linewidth=1.8, label="train, smoothed")
    checks = [(r["step"] + 1, r["validation_loss"]) for r in records if "validation_loss" in r]
    if checks:
        axes.plot(
            *zip(*checks, strict=True), color="#c8501e", marker="o", markersize=4, linewidth=1.2, label="validation"
        )
    axes.set(xlabel="step", ylabel="loss (nats per byte)", title="loss")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _draw_split(axes: Any, records: list[dict[str, float]]) -> None:
    """Stacked milliseconds of a step; outliers are cut off at the top so that one slow step does not hide the rest."""
    steps = [r["step"] + 1 for r in records]
    parts = {phase: [r.get(phase, 0.0) for r in records] for phase in PHASES}
    parts["communication: moving"] = [r["communication"] - r["waiting"] for r in records]
    parts["communication: waiting"] = [r["waiting"] for r in records]
    whole = sum(r["seconds"] for r in records)
    layers = {
        f"{name} ({sum(values) / whole:.1%})": [1e3 * v for v in smooth(values)] for name, values in parts.items()
    }
    colors = ("#1f5a92", "#5b8fbf", "#8a8a8a", "#cfcfcf", "#c8501e", "#f0b08a")
    axes.stackplot(steps, *layers.values(), labels=list(layers), colors=colors)
    totals = sorted(1e3 * r["seconds"] for r in records)
    axes.set_ylim(0, 1.55 * totals[int(0.9 * (len(totals) - 1))])
    axes.set(xlabel="step", ylabel="milliseconds", title="where a step's time goes (rank 0)")
    axes.margins(x=0)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], frameon=False, loc="upper right", fontsize=8, ncols=2)


def smooth(values: list[float], width: int = 15) -> list[float]:
    """Mean of each value and its neighbours."""
    last = len(values) - 1
    found = []
    for i in range(len(values)):
        half = max(2, min(width // 2, i, last - i))  # narrower at the ends, so hardly one-sided
        window = values[max(0, i - half) : i + half + 1]
        found.append(sum(window) / len(window))
    return found
