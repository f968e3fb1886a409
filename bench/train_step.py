"""Tokens/s of the main job's training step against the same model on F.linear and gloo: `python -m bench.train_step`.

Both are tpkernels.train.gpt in the same rank processes, with the same optimizer, clipping and batches; only the parts
differ (bench/plain_model.py). With --dp the ranks hold replicas, and torch's DDP over gloo is the baseline. Verified
before and after: from the same seed, the loss and gradient norm of the fourth step, which three updates have shaped,
must be those of one uncut process within the bound of tpkernels.train.parity.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from bench import plain_model
from bench.cell import Cell
from bench.ranks import RankTeam, cores, launch
from bench.rows import KEEP_HELP, Row, circumstances, destination, row_of, save
from bench.run import complete, named, wait_until_quiet
from bench.study import links
from bench.table import digits, under
from bench.timing import Candidate, measure, slowest
from tpkernels import Group
from tpkernels.comm.mesh import rows_of
from tpkernels.compress import CODECS
from tpkernels.train.data import Corpus, open_corpus
from tpkernels.train.gpt import sharded_parts, whole_parts
from tpkernels.train.parity import rounding
from tpkernels.train.replicas import Replicas
from tpkernels.train.settings import Settings
from tpkernels.train.trainer import Trainer

TOTAL = 1000  # of the schedule; the rate plays no part in the time
CHECKED = 4  # steps from the start until the result is compared


class PlainTrainer(Trainer):
    """The trainer with the baseline's clipping."""

    def clip(self) -> Tensor:
        return plain_model.clip_grad_norm_(list(self.model.parameters()), self.settings.clip)


class PlainReplicas(Replicas):
    """Replicas whose gradients DDP averages in the backward."""

    def __init__(self, group: Group, settings: Settings) -> None:
        self.group, self.rows = group, rows_of(settings.batch, group)
        self.weight = 1.0  # DDP has no other

    def wait(self) -> bool:
        return True

    def after_step(self) -> None:
        pass

    def close(self) -> None:
        pass


class DDPTrainer(Trainer):
    """The trainer under torch's DDP."""

    @cached_property
    def wrapped(self) -> DistributedDataParallel:
        return DistributedDataParallel(plain_model.Loss(self.model))

    def loss(self, ids: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = self.wrapped(ids, target)
        return loss


@dataclass
class Job:
    """One candidate: its model in training. `restart` makes it new; every call is the next step."""

    make: Callable[[], Trainer]
    want: dict[str, float]
    allowed: float
    trainer: Trainer | None = None

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        if self.trainer is not None and self.trainer.replicas is not None:
            self.trainer.replicas.close()
        self.trainer, self.steps = self.make(), 0
        for _ in range(CHECKED - 1):
            self.step()

    def step(self) -> dict[str, float]:
        assert self.trainer is not None
        self.steps += 1
        return self.trainer.step(self.steps - 1, TOTAL)

    def error(self, got: dict[str, float]) -> float:
        replicas = None if self.trainer is None else self.trainer.replicas
        if replicas is not None:
            got = got | {"loss": replicas.mean(got["loss"] * replicas.weight)}
        differences = (abs(got[key] / self.want[key] - 1) for key in ("loss", "grad_norm"))
        return max(differences) / self.allowed


def wanted(settings: Settings, corpus: Corpus) -> dict[str, float]:
    """The numbers of the checked step, from one process and torch's own layers."""
    trainer = Trainer.new(settings, corpus, whole_parts(), None)
    return [trainer.step(step, TOTAL) for step in range(CHECKED)][-1]


def cell(settings: Settings, codecs: Sequence[str], team: RankTeam, group: Group) -> Cell:
    """The training step with its candidates: ours with each codec, named `tpkernels` or by the codec, and torch's."""
    corpus = open_corpus(settings.data)
    want = wanted(replace(settings, dp=1), corpus)

    def candidate(name: str, s: Settings, make: Callable[[], Trainer], transport: str) -> Candidate:
        codec = s.grad_codec if s.dp > 1 else s.codec
        job = Job(make, want, CHECKED * rounding(replace(s, codec=codec)))
        return Candidate(name, job.step, job.error, load=job.restart, label={"transport": transport, "codec": codec})

    def ours(codec: str) -> Candidate:
        s = replace(settings, **{"grad_codec" if settings.dp > 1 else "codec": codec})
        parts = sharded_parts(group, sequence_parallel=s.sequence_parallel, codec=s.codec)

        def make() -> Trainer:
            if s.dp > 1:
                return Trainer.new(s, corpus, whole_parts(), None, group)
            return Trainer.new(s, corpus, parts, group)

        return candidate("tpkernels" if codec == "none" else codec, s, make, group.transport)

    def plain() -> Trainer:
        if settings.dp == 1:
            return PlainTrainer.new(settings, corpus, plain_model.plain_parts(), None)
        trainer = DDPTrainer.new(settings, corpus, whole_parts(), None)
        trainer.replicas = PlainReplicas(group, settings)
        return trainer

    candidates = [*(ours(codec) for codec in codecs), candidate("gloo", settings, plain, "gloo")]
    op = "train_step" if settings.dp == 1 else "train_step_dp"
    return Cell(op, settings.dtype, team.world_size, {}, candidates, baseline="gloo")


@dataclass(frozen=True)
class Spec:
    """The jobs and options of every rank."""

    settings: Settings
    codecs: tuple[str, ...]
    transport: str
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
    with Group.open(transport=spec.transport) as group:
        job = cell(spec.settings, spec.codecs, team, group)
        rows: list[Row] = []
        while not rows or not (complete(rows, spec.rounds) or slowest(team, float(time.monotonic() > until))):
            if spec.wait_s:
                wait_until_quiet(team, spec.most_lost, until)
            rows = measured(job, team, spec)
        if team.rank == 0:
            send(rows)


def show(rows: list[Row], tokens: int, console: Console) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    versus = f"vs {rows[0]['baseline']}"
    for name in (rows[0]["op"], "dtype", "R", "ms", "p90", "tokens/s", versus, "least", "most", "error", "verified"):
        table.add_column(name, justify="left" if name == rows[0]["op"] else "right")
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
    codec: Annotated[str, typer.Option(help="Of our candidates: none,fp16,int8.")] = "none",
    dp: Annotated[bool, typer.Option("--dp", help="Replicas in place of a model cut over the ranks.")] = False,
    hosts: Annotated[int, typer.Option(min=1, max=2, help="2: a host (network namespace) for each of 2 ranks.")] = 1,
    link: Annotated[str, typer.Option(help="Between the hosts: 1gbit, 300mbit, ...; needs root, ip and tc.")] = "1gbit",
    sequence_parallel: Annotated[bool, typer.Option("--sequence-parallel", help="Of our candidate.")] = False,
    most_lost: Annotated[float, typer.Option(help="Part of a block that others may take; 1e9: any.")] = 0.05,
    wait: Annotated[float, typer.Option(help="Seconds to wait, in all, for a quiet machine; then keep nothing.")] = 0.0,
    keep: Annotated[bool, typer.Option("--keep", help=KEEP_HELP)] = False,
    out: Annotated[
        Path | None, typer.Option(help="JSON lines to add the rows to; default runs/bench/train_step.jsonl.")
    ] = None,
) -> None:
    """Measure the training step with the main job's default sizes."""
    if hosts == 2 and ranks != 2:
        raise typer.BadParameter(f"--hosts 2 has one rank on each host, got --ranks {ranks}")
    pinned, between = ranks <= len(cores()), link if hosts == 2 else None
    tp, replicas = (1, ranks) if dp else (ranks, 1)
    settings = replace(Settings(), tp=tp, dp=replicas, dtype=dtype, sequence_parallel=sequence_parallel)
    codecs = tuple(named(each, CODECS, "--codec") for each in codec.split(","))
    transport = "auto" if between is None else "group"
    where = circumstances(pinned, between)
    spec = Spec(settings, codecs, transport, rounds, block_ms / 1e3, most_lost, wait, where)
    console, rows = Console(width=max(140, Console().width)), list[Row]()
    with links.opened(between or links.LOOPBACK) as opened:
        for found in launch(ranks, on_rank, spec, pin=pinned, hosts=opened.hosts if between else ()):
            rows += found
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
