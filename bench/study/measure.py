"""The cells of the study on a rank: train a method to its end for the loss, or time some of its steps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

import torch
import torch.distributed as dist

from bench.rows import Row
from bench.study.methods import DDPTrainer, Method, make, settings_of
from tpkernels import ops
from tpkernels.comm.mesh import Mesh, rows_of
from tpkernels.compress import CODECS
from tpkernels.train.data import Corpus, open_corpus, validation_batches
from tpkernels.train.settings import Settings
from tpkernels.train.trainer import Trainer

VALIDATIONS = 32  # batches whose loss is averaged at the end
CURVE = 20  # points of a learning curve
WARM_UP = 2  # steps before the clock starts
PLENTY = 10_000  # steps of the schedule while timing; the rate plays no part in the time


@dataclass
class Session:
    """The state that all cells of one start of the ranks share."""

    layout: str
    groups: Mesh
    settings: Settings
    corpus: Corpus

    @classmethod
    def begin(cls, layout: str, groups: Mesh, settings: Settings) -> Session:
        return cls(layout, groups, settings, open_corpus(settings.data))

    def make(self, method: Method, **changes: Any) -> Trainer:
        settings = settings_of(Settings(**(self.settings.__dict__ | changes)), self.layout, method)
        return make(method, settings, self.corpus, self.groups)

    def bytes_sent(self, trainer: Trainer) -> int:
        """By this rank since the start, between replicas; with one replica, inside it."""
        if isinstance(trainer, DDPTrainer):
            return trainer.bytes_sent()
        if trainer.replicas is not None:
            return trainer.replicas.bytes_sent()
        if trainer.group is None:  # torch's own tensor parallelism, which nobody counts
            return 0
        return int(trainer.group.stats()["wire_bytes"])


def close(trainer: Trainer) -> None:
    """Leave no thread and no residual behind."""
    if trainer.replicas is not None and not isinstance(trainer, DDPTrainer):
        trainer.replicas.close()


def train(session: Session, method: Method, seed: int, steps: int) -> Row:
    """The validation loss after `steps` steps, and the bytes sent."""
    trainer = session.make(method, seed=seed, steps=steps)
    losses, sent, began = [], [session.bytes_sent(trainer)], time.perf_counter()
    for step in range(steps):
        losses.append(trainer.step(step, steps)["loss"])
        sent.append(session.bytes_sent(trainer))
    trainer.finish()
    seconds = time.perf_counter() - began
    validation = validate(session, trainer)
    close(trainer)
    each = max(1, steps // CURVE)
    late = len(sent) // 2  # after warm-ups of codecs
    return {
        "steps": steps,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "validation_loss": validation,
        "curve": [round(mean(losses[i : i + each]), 4) for i in range(0, steps, each)],
        "bytes_per_step": round((sent[-1] - sent[late]) / (len(sent) - 1 - late)),
        "bytes_per_step_all": round((sent[-1] - sent[0]) / steps),
        "seconds": round(seconds, 2),
    }


@torch.no_grad()
def validate(session: Session, trainer: Trainer) -> float:
    """Mean loss in nats per byte over many windows, shared among the replicas."""
    s, groups = trainer.settings, session.groups
    batches = validation_batches(session.corpus, batch=s.batch, context=s.context, batches=VALIDATIONS)
    mine = [
        trainer.loss(ids, target).item()
        for i, (ids, target) in enumerate(batches)
        if i % groups.replicas == groups.replica
    ]
    total = torch.tensor([sum(mine), len(mine)], dtype=torch.float64)
    dist.all_reduce(total)
    return float(total[0] / total[1])


def timed(session: Session, methods: list[Method], rounds: int, steps: int) -> Iterator[Row]:
    """Tokens per second of each method, taken in turn; the slowest rank of a round counts."""
    seconds: dict[str, list[float]] = {m.name: [] for m in methods}
    exposed: dict[str, list[float]] = {m.name: [] for m in methods}
    for _ in range(rounds):
        for method in methods:
            trainer = session.make(method)
            length = steps if method.mode != "local" else trainer.settings.local_steps
            first = WARM_UP if method.mode != "local" else length
            for step in range(first):
                trainer.step(step, PLENTY)
            dist.barrier()
            began = time.perf_counter()
            records = [trainer.step(step, PLENTY) for step in range(first, first + length)]
            took = torch.tensor([time.perf_counter() - began], dtype=torch.float64)
            dist.all_reduce(took, op=dist.ReduceOp.MAX)
            seconds[method.name].append(float(took) / length)
            exposed[method.name].append(mean(r["communication"] for r in records))
            close(trainer)
        for method in methods:
            yield summary(session, method, seconds[method.name], exposed[method.name], steps)


def summary(session: Session, method: Method, seconds: list[float], exposed: list[float], steps: int) -> Row:
    """The row of a method after so many rounds; that of a later round replaces it."""
    return {
        "method": method.name,
        "step_seconds": median(seconds),
        "step_seconds_all": [round(x, 5) for x in seconds],
        "tokens_per_s": session.settings.tokens / median(seconds),
        "exposed_seconds": median(exposed),
        "steps": steps,
        "rounds": len(seconds),
    }


def alone(session: Session, codecs: list[str], rounds: int) -> Iterator[Row]:
    """Time the two parts of a step with replicas alone: computing, and averaging."""
    groups = session.groups
    assert groups.dp is not None
    # One replica's part of the batch, and no other rank.
    settings = Settings(**(session.settings.__dict__ | {"batch": len(rows_of(session.settings.batch, groups.dp))}))
    method = Method("alone")
    computing, whole = [], []
    for _ in range(rounds):
        one = make(method, settings_of(settings, session.layout, method), session.corpus, Mesh(groups.tp, groups.tp))
        dist.barrier()
        records = [one.step(step, PLENTY) for step in range(2 + WARM_UP)][WARM_UP:]
        computing.append(mean(r["forward"] + r["backward"] for r in records))
        whole.append(mean(r["seconds"] for r in records))
    numel = sum(p.numel() for p in one.model.parameters())
    yield {"method": "step alone", "step_seconds": slowest(whole), "rounds": rounds}
    yield {"method": "computing alone", "step_seconds": slowest(computing), "rounds": rounds}
    for codec in codecs:
        if codec not in CODECS:
            continue
        x, took = torch.randn(numel), []
        for _ in range(rounds + 1):
            dist.barrier()
            began = time.perf_counter()
            ops.all_reduce(x, group=groups.dp, op="avg", codec=codec)
            took.append(time.perf_counter() - began)
        yield {"method": f"averaging alone, {codec}", "step_seconds": slowest(took[1:]), "rounds": rounds}


def slowest(seconds: list[float]) -> float:
    """The median of the slowest rank."""
    found = torch.tensor([median(seconds)], dtype=torch.float64)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return float(found)
