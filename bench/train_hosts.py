"""Training on two hosts: cut over the ranks of a host, replicas between: `python -m bench.train_hosts --link 1gbit`.

The main job's model and step, with gradients packed by each codec, and with ZeRO-1, whose parameters are gathered
before the step ends (`zero_step`) or beside the next forward (`zero_forward`). Verified as bench/train_step.py does.
Then each codec trains from the start; the loss is the mean over the last steps and the replicas.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from bench.cell import Cell
from bench.ranks import RankTeam, launch
from bench.rows import KEEP_HELP, Row, circumstances, destination, save
from bench.study import links
from bench.timing import Candidate
from bench.train_step import CHECKED, Job, Spec, measured, show, wanted
from tpkernels.comm.mesh import Mesh
from tpkernels.train.data import open_corpus
from tpkernels.train.gpt import sharded_parts
from tpkernels.train.parity import rounding
from tpkernels.train.settings import Settings
from tpkernels.train.trainer import Trainer

# name: grad_codec, zero, whether parameters are gathered beside the next forward
VARIANTS = {
    "tpkernels": ("none", 0, False),
    "fp16": ("fp16", 0, False),
    "int8": ("int8", 0, False),
    "zero_step": ("none", 1, False),
    "zero_forward": ("none", 1, True),
}
LAST = 10  # steps of which the mean loss is kept
AT_ONCE = 4  # steps that are timed as one, with the parameters that are under way after the last
TIMES = ("median_us", "p90_us", "min_us", "max_us")


@dataclass(frozen=True)
class HostsSpec(Spec):
    """`steps` of the training that is not timed."""

    steps: int = 0


def jobs(settings: Settings, mesh: Mesh) -> dict[str, Job]:
    corpus, parts = open_corpus(settings.data), sharded_parts(mesh.tp)
    want = wanted(replace(settings, tp=1, dp=1), corpus)

    def job(codec: str, zero: int, late: bool) -> Job:
        s = replace(settings, grad_codec=codec, zero=zero)

        def make() -> Trainer:
            trainer = Trainer.new(s, corpus, parts, mesh.tp, mesh.dp)
            if zero and not late:
                assert trainer.replicas is not None
                trainer.replicas.aggregator._gather._late = False
            return trainer

        return Job(make, want, CHECKED * rounding(replace(s, codec=codec)))

    return {name: job(*variant) for name, variant in VARIANTS.items()}


def steps_of(job: Job) -> dict[str, float]:
    """The step that is checked, or some."""
    for _ in range(1 if job.steps < CHECKED else AT_ONCE):
        got = job.step()
    assert job.trainer is not None and job.trainer.replicas is not None
    job.trainer.replicas.aggregator.wait_for_parameters()
    return got


def loss_after(job: Job, steps: int) -> float:
    job.restart()
    last = [job.step()["loss"] for _ in range(steps - job.steps)][-LAST:]
    assert job.trainer is not None and job.trainer.replicas is not None
    return job.trainer.replicas.mean(job.trainer.replicas.weight * sum(last) / LAST)


def on_rank(team: RankTeam, spec: HostsSpec, send: Callable[[Any], None]) -> None:
    with Mesh.open(spec.settings) as mesh:
        assert mesh.dp is not None
        made, transport = jobs(spec.settings, mesh), f"{mesh.tp.transport}, {mesh.dp.transport}"
        candidates = [
            Candidate(name, partial(steps_of, job), job.error, load=job.restart,
                      label={"transport": transport, "codec": VARIANTS[name][0]})
            for name, job in made.items()
        ]  # fmt: skip
        cell = Cell("train_step_hosts", spec.settings.dtype, team.world_size, {}, candidates, baseline="tpkernels")
        rows = measured(cell, team, spec)
        for row in rows:
            row |= {key: row[key] / AT_ONCE for key in TIMES if row[key] is not None} | {"by_placement": {}}
            if not VARIANTS[row["variant"]][1]:
                row["steps"], row["loss"] = spec.steps, loss_after(made[row["variant"]], spec.steps)
        for job in made.values():
            assert job.trainer is not None and job.trainer.replicas is not None
            job.trainer.replicas.close()
        if team.rank == 0:
            send(rows)


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    block_ms: Annotated[float, typer.Option(help="How long a candidate's block in a round should last.")] = 1600.0,
    link: Annotated[str, typer.Option(help="Between the hosts: 1gbit, 300mbit, ...; needs root, ip and tc.")] = "1gbit",
    steps: Annotated[int, typer.Option(min=LAST + CHECKED, help="Until the loss is taken.")] = 60,
    most_lost: Annotated[float, typer.Option(help="Part of a block that others may take; 1e9: any.")] = 0.05,
    keep: Annotated[bool, typer.Option("--keep", help=KEEP_HELP)] = False,
    out: Annotated[Path | None, typer.Option(help="JSON lines to add the rows to.")] = None,
) -> None:
    """Measure the training step of two hosts with two ranks each."""
    settings = replace(Settings(), tp=2, dp=2)
    where, rows = circumstances(False, link), list[Row]()
    spec = HostsSpec(settings, (), "auto", rounds, block_ms / 1e3, most_lost, 0.0, where, steps)
    with links.opened(link, own_memory=True) as opened:
        for found in launch(4, on_rank, spec, pin=False, hosts=[opened.hosts[rank // 2] for rank in range(4)]):
            rows += found
    console = Console(width=max(140, Console().width))
    show(rows, settings.tokens, console)
    for row in rows:
        if "loss" in row:
            console.print(f"{row['variant']}: loss {row['loss']:.3f} after {row['steps']} steps")
    save(destination("hosts.jsonl", keep, out), rows)


if __name__ == "__main__":
    typer.run(main)
