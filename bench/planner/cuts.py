"""Every cut of the main job on this machine, to hold the planner against: `python -m bench.planner.cuts`.

A case is a job and what connects two ranks: shared memory, or a link between two hosts (network namespaces with a
/dev/shm of their own, as root). All cuts of a case are timed in the same two processes, in turn, a core each; the
slowest rank of a round counts, and the fastest round. `--calibrate` first keeps what `tpkernels plan
--calibrate` finds beside the rows, by which they are predicted. A case that the file has already is not measured again.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.planner.cpus import shaped
from bench.ranks import RankTeam, launch
from bench.rows import append, circumstances
from bench.study import links
from tpkernels.comm.group import Group
from tpkernels.comm.mesh import Mesh
from tpkernels.planner.hardware import Cluster, calibrated_file, cluster
from tpkernels.planner.recipe import Recipe
from tpkernels.planner.step import step_s
from tpkernels.train.data import open_corpus
from tpkernels.train.gpt import sharded_parts
from tpkernels.train.planned import job_of
from tpkernels.train.settings import Settings
from tpkernels.train.trainer import Trainer

HERE = Path(__file__).parent
ROWS, CPU, SHM = HERE / "cuts.jsonl", HERE / "calibrated" / "cpu.toml", HERE / "calibrated" / "shm.toml"
ROUNDS, QUICK_S = 3, 0.3  # steps of a round: one before the clock starts; three, or one of a slow cut
TOTAL = 1000  # of the schedule; the rate plays no part in the time
RANKS = 2
# layers, d_model, heads, context, batch
SIZES = (
    (4, 256, 4, 128, 8), (4, 128, 4, 128, 16), (2, 256, 4, 128, 8), (4, 256, 4, 64, 8), (2, 512, 8, 128, 4),
    (4, 192, 4, 128, 8),
)  # fmt: skip
LINKS: tuple[tuple[str | None, tuple[int, ...]], ...] = (
    (None, (0, 1, 2, 3, 4, 5)), ("1gbit", (0, 1, 2, 3, 4, 5)), ("100mbit", (0, 1, 2, 3)),
)  # fmt: skip
CUTS: tuple[dict[str, Any], ...] = (
    {"tp": 2}, {"tp": 2, "codec": "bf16"}, {"dp": 2}, {"dp": 2, "grad_codec": "int8"}, {"dp": 2, "zero": 1},
    {"pp": 2, "micro_batches": 4},
)  # fmt: skip


def cases() -> Iterator[tuple[str | None, dict[str, Any]]]:
    """The link and the job of each."""
    for link, sizes in LINKS:
        for i in sizes:
            yield link, dict(zip(("layers", "d_model", "heads", "context", "batch"), SIZES[i], strict=True))


def settings_of(job: dict[str, Any], cut: dict[str, Any]) -> Settings:
    """The settings of a run, past all warm-ups."""
    return Settings(**{"tp": 1, "warmup": 0, **job, **cut})


def on_rank(team: RankTeam, job: dict[str, Any], send: Callable[[Any], None]) -> None:
    """Time every cut of a job; rank 0 sends (cut, seconds of each round)."""
    corpus = open_corpus(None)
    with ExitStack() as opened:
        world = opened.enter_context(Group.open(arena_bytes=16 << 20))
        trainers = []
        for cut in CUTS:
            s = settings_of(job, cut)
            mesh = opened.enter_context(Mesh.open(tp=s.tp, dp=s.dp, pp=s.pp, world=world, arena_bytes=16 << 20))
            parts = sharded_parts(mesh.tp, sequence_parallel=s.sequence_parallel, codec=s.codec)
            trainers.append(Trainer.new(s, corpus, parts, mesh.tp, mesh.dp, mesh.pp))
            if trainers[-1].replicas is not None:
                opened.callback(trainers[-1].replicas.close)
        found: list[list[float]] = [[] for _ in CUTS]
        done = 0
        for _ in range(1 + ROUNDS):
            for trainer, seconds in zip(trainers, found, strict=True):
                steps = 1 if seconds and seconds[-1] > QUICK_S else 3
                trainer.step(done, TOTAL)
                team.barrier()
                started = time.perf_counter()
                for step in range(steps):
                    trainer.step(done + 1 + step, TOTAL)
                seconds.append(max(took for (took,) in team.gather([time.perf_counter() - started])) / steps)
            done += 4
        if team.rank == 0:
            for cut, seconds in zip(CUTS, found, strict=True):
                send((cut, seconds[1:]))


def measure(link: str | None, job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of a case."""
    shared = circumstances(pinned=True, link=link)
    with links.opened(link or links.LOOPBACK, own_memory=link is not None) as opened:
        for cut, seconds in launch(RANKS, on_rank, job, pin=True, hosts=opened.hosts if link else ()):
            yield {"job": job, "cut": cut, "seconds": min(seconds), "seconds_all": seconds, **shared}


def machine_of(link: str | None) -> Cluster:
    """This machine's ranks as it was calibrated, on one host or two."""
    if link is None:
        return cluster(str(CPU), RANKS, f"{SHM},{SHM}", RANKS)
    return shaped(cluster(str(CPU), RANKS, f"{SHM},{link}", 1), link)


@dataclass(frozen=True)
class Row:
    """A row of the file."""

    row: dict[str, Any]

    @property
    def case(self) -> str:
        j = self.row["job"]
        size = f"{j['layers']} layers, {j['d_model']} wide, {j['batch']} x {j['context']}"
        return f"{size}, {self.row['link'] or 'shared memory'}"

    @property
    def name(self) -> str:
        named = {key.replace("_", " "): value for key, value in self.row["cut"].items()}
        return ", ".join(key if value is True else f"{key} {value}" for key, value in named.items())

    @cached_property
    def settings(self) -> Settings:
        return settings_of(self.row["job"], self.row["cut"])

    @property
    def recipe(self) -> Recipe:
        return recipe_of(self.settings)

    @property
    def ms(self) -> float:
        return 1e3 * min(self.row["seconds_all"])

    @cached_property
    def predicted(self) -> float:
        return 1e3 * step_s(machine_of(self.row["link"]), job_of(self.settings), self.recipe).total


def recipe_of(s: Settings) -> Recipe:
    """The recipe of a run, as the planner knows it."""
    micro_batch = s.batch // s.dp // (s.micro_batches if s.pp > 1 else 1)
    return Recipe(s.tp, s.pp, s.dp, micro_batch, s.sequence_parallel, s.zero, codec=s.codec, grad_codec=s.grad_codec)


def read(file: Path = ROWS) -> dict[str, list[Row]]:
    """{case: its rows}."""
    found: dict[str, list[Row]] = {}
    for line in file.read_text().splitlines():
        row = Row(json.loads(line))
        found.setdefault(row.case, []).append(row)
    return found


def calibrate() -> None:
    """Calibrate this machine, and keep its files beside the rows."""
    subprocess.run([sys.executable, "-m", "tpkernels", "plan", "--calibrate", "--ranks", str(RANKS)], check=True)
    CPU.parent.mkdir(exist_ok=True)
    for name, file in (("cpu", CPU), ("shm", SHM)):
        shutil.copyfile(calibrated_file(name), file)
    CPU.write_text(CPU.read_text().replace(str(calibrated_file("shm")), "shm"))  # machine_of names the other file


def main(
    most: Annotated[int, typer.Option(help="Cases of this call.")] = 100,
    calibrate_first: Annotated[bool, typer.Option("--calibrate", help="Calibrate first.")] = False,
) -> None:
    """Measure the cases that the file lacks."""
    if calibrate_first:
        calibrate()
    done = [(row.row["link"], row.row["job"]) for rows in (read().values() if ROWS.exists() else ()) for row in rows]
    for link, job in [case for case in cases() if case not in done][:most]:
        found = [Row(row) for row in measure(link, job)]
        for row in found:
            append(ROWS, row.row)
            print(f"{row.case}: {row.name}: {row.ms:.1f} ms, predicted {row.predicted:.1f}", flush=True)


if __name__ == "__main__":
    typer.run(main)
