"""Tokens/s of the main job's training step against the same model on F.linear and gloo: `python -m bench.train_step`.

Both are tpkernels.train.gpt in the same rank processes, with the same optimizer, clipping and batches; only the parts
differ (bench/plain_model.py). Verified before and after: from the same seed, the loss and gradient norm of the fourth
step, which three updates have shaped, must be those of one uncut process within the bound of tpkernels.train.parity.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench import plain_model
from bench.cell import Cell
from bench.ranks import RankTeam, cores, launch
from bench.rows import KEEP_HELP, Row, circumstances, destination, row_of, save
from bench.run import complete, wait_until_quiet
from bench.table import digits, under
from bench.timing import Candidate, measure, slowest
from tpkernels import Group
from tpkernels.train.data import Corpus, open_corpus
from tpkernels.train.gpt import Parts, sharded_parts, whole_parts
from tpkernels.train.parity import rounding
from tpkernels.train.settings import Settings
from tpkernels.train.trainer import Trainer

TOTAL = 1000  # of the schedule; the rate plays no part in the time
CHECKED = 4  # steps from the start until the result is compared


class PlainTrainer(Trainer):
    """The trainer with the baseline's clipping."""

    def clip(self) -> Tensor:
        return plain_model.clip_grad_norm_(list(self.model.parameters()), self.settings.clip)


@dataclass
class Job:
    """One candidate: its model in training. `restart` makes it new; every call is the next step."""

    make: Callable[[], Trainer]
    want: dict[str, float]
    allowed: float

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.trainer, self.steps = self.make(), 0
        for _ in range(CHECKED - 1):
            self.step()

    def step(self) -> dict[str, float]:
        self.steps += 1
        return self.trainer.step(self.steps - 1, TOTAL)

    def error(self, got: dict[str, float]) -> float:
        differences = (abs(got[key] / self.want[key] - 1) for key in ("loss", "grad_norm"))
        return max(differences) / self.allowed


def wanted(settings: Settings, corpus: Corpus) -> dict[str, float]:
    """The numbers of the checked step, from one process and torch's own layers."""
    trainer = Trainer.new(settings, corpus, whole_parts(), None)
    return [trainer.step(step, TOTAL) for step in range(CHECKED)][-1]


def cell(settings: Settings, team: RankTeam, group: Group) -> Cell:
    """The training step with its candidates."""
    corpus = open_corpus(settings.data)
    want, allowed = wanted(settings, corpus), CHECKED * rounding(settings)

    def candidate(name: str, kind: type[Trainer], parts: Parts, label: dict[str, str | None]) -> Candidate:
        job = Job(lambda: kind.new(settings, corpus, parts, group if kind is Trainer else None), want, allowed)
        return Candidate(name, job.step, job.error, load=job.restart, label=label)

    ours = {"transport": group.transport, "codec": settings.codec}
    parts = sharded_parts(group, sequence_parallel=settings.sequence_parallel, codec=settings.codec)
    candidates = [
        candidate("tpkernels", Trainer, parts, ours),
        candidate("gloo", PlainTrainer, plain_model.plain_parts(), {"transport": "gloo"}),
    ]
    return Cell("train_step", settings.dtype, team.world_size, {}, candidates, baseline="gloo")


@dataclass(frozen=True)
class Spec:
    """The jobs and options of every rank."""

    settings: Settings
    rounds: int
    block_s: float
    most_lost: float
    wait_s: float
    where: Row


def measured(job: Cell, team: RankTeam, spec: Spec) -> list[Row]:
    probes: list[float] = []

    def probe() -> None:
        probes.append(team.flag_rtt_ns())

    timings = measure(
        job.candidates, team, rounds=spec.rounds, block_s=spec.block_s, most_lost=spec.most_lost, each_round=probe
    )
    probe()
    by_name = {t.name: t for t in timings}
    return [row_of(job, candidate, by_name, probes, spec.where) for candidate in job.candidates]


def on_rank(team: RankTeam, spec: Spec, send: Callable[[Any], None]) -> None:
    until = time.monotonic() + spec.wait_s
    with Group.open() as group:
        job = cell(spec.settings, team, group)
        rows: list[Row] = []
        while not rows or not (complete(rows, spec.rounds) or slowest(team, float(time.monotonic() > until))):
            if spec.wait_s:
                wait_until_quiet(team, spec.most_lost, until)
            rows = measured(job, team, spec)
        if team.rank == 0:
            send(rows)


def show(rows: list[Row], tokens: int, console: Console) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("train_step", "dtype", "R", "ms", "p90", "tokens/s", "vs gloo", "least", "most", "error", "verified"):
        table.add_column(name, justify="left" if name == "train_step" else "right")
    for row in rows:
        ms = [digits(None if row[key] is None else row[key] / 1e3) for key in ("median_us", "p90_us")]
        speed = "-" if row["median_us"] is None else f"{tokens / row['median_us'] * 1e6:,.0f}"
        ratios = [digits(row[key]) for key in ("ratio", "ratio_min", "ratio_max")]
        table.add_row(row["variant"], row["dtype"], str(row["R"]), *ms, speed, *ratios, digits(row["error"]),
                      "yes" if row["verified"] else "NO")  # fmt: skip
    console.print(table)
    console.print(under(rows[0]), style="dim", markup=False)


def main(
    ranks: Annotated[int, typer.Option(min=1, help="Rank processes, one thread each.")] = 2,
    rounds: Annotated[int, typer.Option(min=1)] = 15,
    block_ms: Annotated[float, typer.Option(help="How long a candidate's block in a round should last.")] = 800.0,
    dtype: Annotated[str, typer.Option(help="fp32, bf16")] = "fp32",
    codec: Annotated[str, typer.Option(help="Of our candidate.")] = "none",
    sequence_parallel: Annotated[bool, typer.Option("--sequence-parallel", help="Of our candidate.")] = False,
    most_lost: Annotated[float, typer.Option(help="Part of a block that others may take; 1e9: any.")] = 0.05,
    wait: Annotated[float, typer.Option(help="Seconds to wait, in all, for a quiet machine; then keep nothing.")] = 0.0,
    keep: Annotated[bool, typer.Option("--keep", help=KEEP_HELP)] = False,
    out: Annotated[
        Path | None, typer.Option(help="JSON lines to add the rows to; default runs/bench/train_step.jsonl.")
    ] = None,
) -> None:
    """Measure the training step with the main job's default sizes."""
    pinned = ranks <= len(cores())
    settings = replace(Settings(), tp=ranks, dtype=dtype, codec=codec, sequence_parallel=sequence_parallel)
    spec = Spec(settings, rounds, block_ms / 1e3, most_lost, wait, circumstances(pinned))
    console = Console(width=max(140, Console().width))
    rows: list[Row] = [row for found in launch(ranks, on_rank, spec, pin=pinned) for row in found]
    show(rows, settings.tokens, console)
    if not complete(rows, rounds):
        console.print("others had the cores in more than half of the rounds: nothing is kept")
    else:
        save(destination("train_step.jsonl", keep, out), rows)
    if not all(row["verified"] for row in rows):
        console.print("a result is wrong: see verified", style="bold red")
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
