"""Training of the byte-level GPT over the ranks of a group: the loop, one step of it, and what surrounds them."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from tpkernels import checkpoint, data_parallel, ops
from tpkernels.checkpoint.staging import refuse_later
from tpkernels.comm.group import Group
from tpkernels.comm.mesh import LANE_MIB, Mesh, enough_memory
from tpkernels.comm.objects import gather, raise_together
from tpkernels.data_parallel import GradAggregator
from tpkernels.errors import RankMismatchError, UserError
from tpkernels.pipeline import Pipeline, take_stages
from tpkernels.pipeline.orders import stages_on
from tpkernels.train import settings as settings_file
from tpkernels.train.clock import Clock
from tpkernels.train.data import Corpus, check_size, open_corpus, train_batch, validation_batches
from tpkernels.train.gpt import GPT, Parts, sharded_parts
from tpkernels.train.progress import Screen
from tpkernels.train.replicas import Replicas
from tpkernels.train.runlog import RunLog
from tpkernels.train.settings import Settings
from tpkernels.train.stages import config_of, precision, rows_in, stage_loss, stages_of
from tpkernels.train.update import learning_rate, make_optimizer

CALIBRATION_STEPS = 20  # after so many, the number of steps that fit into --minutes is estimated
DEFAULT_MINUTES = 2.0
STEP = "step-"  # and the step, the names of checkpoints
OVERTIME = 1.15  # a run whose length was estimated may take so much longer before it is cut short
OTHER_WORK = 0.06  # share of the time for validation and checkpoints, when estimating


@dataclass
class Trainer:
    """Model and optimizer with the one step that they are made for. Works the same on cut and uncut models.

    Attributes:
        group: over which the gradient norm counts; None for an uncut model.
        replicas: the other copies of the model that learn from the same batches; None where this is the only one.
        pipe: the pipeline of which `model` is one stage; None where it is the whole model.
    """

    settings: Settings
    corpus: Corpus
    model: GPT
    optimizer: torch.optim.Optimizer
    group: Group | None
    replicas: Replicas | None = None
    pipe: Pipeline | None = None

    @classmethod
    def new(
        cls,
        settings: Settings,
        corpus: Corpus,
        parts: Parts,
        group: Group | None,
        dp: Group | None = None,
        pp: Group | None = None,
    ) -> Trainer:
        """Build from the seed: the same weights whatever the parts and the number of ranks.

        Args:
            group: the ranks that the model is cut over. dp: the ranks that have the same part of other replicas.
            pp: the ranks that have the other stages of this replica.
        """
        torch.manual_seed(settings.seed)
        model = GPT(config_of(settings), parts)
        stages = None
        if pp is not None:
            held = stages_on(settings.schedule, pp.rank, pp.world_size, settings.num_stages)
            stages = take_stages(model, stages_of(settings), *held)
        replicas = None if dp is None else Replicas(model, dp, settings)
        aggregator = None if replicas is None else replicas.aggregator
        pipe = None
        if stages is not None and pp is not None:
            pipe = Pipeline(
                stages, group=pp, schedule=settings.schedule, micro_batches=settings.micro_batches,
                codec=settings.stage_codec, forward=partial(stage_loss, settings), weigh=rows_in,
                aggregator=aggregator,
            )  # fmt: skip
        return cls(settings, corpus, model, make_optimizer(model, settings, aggregator), group, replicas, pipe)

    def step(self, step: int, total: int | None, clock: Clock | None = None) -> dict[str, float]:
        """Learn from the batch of this step; the numbers of the step for the log."""
        clock = clock or Clock(None)
        s = self.settings
        rate = learning_rate(s, step, total)
        rows = None if self.replicas is None else self.replicas.rows
        ids, target = train_batch(self.corpus, seed=s.seed, step=step, batch=s.batch, context=s.context, rows=rows)
        clock.lap("data")
        weight = 1.0 if self.replicas is None else self.replicas.weight
        if self.pipe is not None:
            loss = self.pipe.step(scale=weight, ids=ids, target=target)
            clock.lap("backward")  # and forward: of different micro-batches at the same time
        else:
            with precision(s):
                loss = self.loss(ids, target)
            clock.lap("forward")
            (loss if self.replicas is None else loss * weight).backward()  # type: ignore[no-untyped-call]
            clock.lap("backward")
        ready = self.replicas is None or self.replicas.wait()
        if ready and self.pipe is not None:
            self.pipe.sum_tied()
        clock.lap("communication")
        norm = self.apply(rate) if ready else 0.0
        self.optimizer.zero_grad()
        clock.lap("optimizer")
        if self.replicas is not None:
            self.replicas.after_step()
            clock.lap("communication")
        return {"step": step, "loss": loss.item(), "grad_norm": float(norm), "lr": rate, **clock.seconds}

    def apply(self, rate: float) -> Tensor:
        """Clip the gradients and let the optimizer make its step; the norm before clipping."""
        norm = self.clip()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        return norm

    def finish(self) -> None:
        """After the last step: apply averages that are still pending, so that all replicas are equal."""
        if self.replicas is not None and self.replicas.drain():
            if self.pipe is not None:
                self.pipe.sum_tied()
            self.apply(self.optimizer.param_groups[0]["lr"])
            self.optimizer.zero_grad()

    def loss(self, ids: Tensor, target: Tensor) -> Tensor:
        """Mean loss of these sequences, in nats per byte."""
        return self.model.loss(ids, target)

    @property
    def aggregator(self) -> GradAggregator | None:
        """The aggregator of the replicas; None where there is one replica."""
        return None if self.replicas is None else self.replicas.aggregator

    def clip(self) -> Tensor:
        """Scale all gradients so that their norm over all ranks is at most `clip`; the norm before."""
        if self.group is None:
            return torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        pp, tied = (None, []) if self.pipe is None else (self.pipe.group, self.pipe.tied_copies)
        return data_parallel.clip_grad_norm_(
            self.model, self.settings.clip, groups=[self.group], pipeline=pp, tied=tied
        )

    @torch.no_grad()
    def evaluate(self) -> float:
        """Loss in nats per byte on the validation windows, which are always the same."""
        batches = validation_batches(self.corpus, batch=self.settings.batch, context=self.settings.context)
        if self.pipe is not None:
            losses = [self.pipe.evaluate(ids=ids, target=target).item() for ids, target in batches]
            return sum(losses) / len(losses)
        with precision(self.settings):
            losses = [self.model.loss(ids, target).item() for ids, target in batches]
        return sum(losses) / len(losses)


@dataclass
class Run:
    """One call of `tpkernels train`."""

    settings: Settings
    folder: Path
    layout: Mesh
    trainer: Trainer
    log: RunLog
    screen: Screen
    step: int = 0
    total: int | None = None

    def __post_init__(self) -> None:
        self.began = time.perf_counter()
        self.first = self.step
        self.saved_at: int | None = None
        if self.settings.steps is not None:
            self.total = self.settings.steps

    @property
    def group(self) -> Group:
        """All ranks of the run."""
        return self.layout.world

    @property
    def minutes(self) -> float | None:
        """The limit of this call; None: only the number of steps counts."""
        s = self.settings
        return DEFAULT_MINUTES if s.minutes is None and s.steps is None else s.minutes

    def loop(self) -> None:
        """Train until the schedule, the time or `stop_at` ends it, and save the last step.

        Raises:
            UserError: the loss is not finite.
            RankMismatchError: replicas differ that must be equal.
            CheckpointError: a checkpoint could not be written.
        """
        while not self.is_over():
            if self.total is None and self.step >= CALIBRATION_STEPS:
                self.total = self.estimate()
            record = self.trainer.step(self.step, self.total, Clock(self.layout.tp))
            if self.trainer.replicas is not None:
                record["loss"] = self.mean(record["loss"] * self.trainer.replicas.weight)
            if not math.isfinite(record["loss"]):
                raise UserError(
                    f"the loss is {record['loss']} at step {self.step}: take a smaller --lr and start anew."
                )
            self.step += 1
            last = self.step in (self.total, self.settings.stop_at)
            if self.step == self.total:
                self.trainer.finish()
            self.check_replicas()
            if self.step % self.settings.eval_every == 0 or last:
                record["validation_loss"] = self.mean(self.trainer.evaluate())
            self.log.add(record)
            self.screen.step(record, self.total)
            if self.step % self.settings.checkpoint_every == 0:
                self.save()
        if self.saved_at != self.step and self.step > self.first:
            self.save()

    def mean(self, loss: float) -> float:
        """Of all replicas; in mode local they differ between two averages, else only their batches do."""
        return loss if self.trainer.replicas is None else self.trainer.replicas.mean(loss)

    def check_replicas(self) -> None:
        """Every so many steps, stop all ranks when replicas differ that must not."""
        every = self.settings.check_replicas
        if self.trainer.replicas is not None and every and self.step % every == 0:
            with raise_together(self.group, RankMismatchError, f"after step {self.step}"):
                data_parallel.replicas_agree(self.trainer.model, mesh=self.layout).check()

    def replica_bytes(self) -> float:
        """Bytes that this rank has sent to other replicas, a step of this call."""
        replicas = self.trainer.replicas
        return 0.0 if replicas is None else replicas.bytes_sent() / max(1, self.step - self.first)

    def is_over(self) -> bool:
        """Whether to stop; all ranks go by the clock of rank 0, because theirs differ."""
        if self.step in (self.total, self.settings.stop_at) or (self.total is not None and self.step > self.total):
            return True
        if self.minutes is None:
            return False
        limit = self.minutes * 60 * (1 if self.settings.steps is not None else OVERTIME)
        late = self.group.rank == 0 and time.perf_counter() - self.began > limit
        return bool(
            ops.all_reduce(torch.tensor([float(late)], device=self.group.device), group=self.group, op="max").item()
        )

    def estimate(self) -> int:
        """How many steps fit into the time, from the steps so far; rank 0 decides."""
        planned = 0
        if self.group.rank == 0 and self.minutes is not None:
            seconds = median(r["seconds"] for r in self.log.records[-CALIBRATION_STEPS // 2 :])
            left = self.minutes * 60 * (1 - OTHER_WORK) - (time.perf_counter() - self.began)
            planned = self.step + max(1, int(left / seconds))
        return gather(planned, self.group)[0]

    def save(self) -> None:
        """Write a checkpoint and remove those that are too old."""
        parent = self.folder / "checkpoints"
        extra = {"total": self.total, "settings": asdict(self.settings), "data": self.trainer.corpus.fingerprint}
        t = self.trainer
        checkpoint.save(
            t.model,
            parent / f"{STEP}{self.step:08d}",
            group=self.layout.tp,
            dp_group=self.layout.dp,
            pp_group=self.layout.pp,
            optimizer=t.optimizer,
            aggregator=t.aggregator,
            own_parameters=t.replicas is not None and t.replicas.differ,
            step=self.step,
            extra=extra,
        )
        self.saved_at = self.step
        with raise_together(self.group, checkpoint.CheckpointError, f"remove old checkpoints in {parent}"):
            if self.group.rank == 0:
                checkpoint.prune(parent, self.settings.keep)

    def stopped_early(self) -> bool:
        """Whether the schedule has steps left."""
        return self.total is None or self.step < self.total


@contextlib.contextmanager
def open_run(settings: Settings, folder: Path, layout: Mesh, *, resume: bool, anew: bool = False) -> Iterator[Run]:
    """A new run in `folder`, or the one that is there, at its last checkpoint. Collective over layout.world.

    Args:
        settings: the same on all ranks.
        folder: where log, settings and checkpoints are.
        layout: settings.tp * settings.dp * settings.pp ranks.
        resume: continue from the last checkpoint in `folder`.
        anew: without `resume`, begin again where it holds a run without checkpoints; else it must hold none.

    Raises:
        UserError: bad settings, data that cannot be read or is not the run's, a folder that holds a run, or none.
        CheckpointError: the folder has checkpoints of later steps, so that a save would fail.
    """
    group = layout.world
    with raise_together(group, UserError, ""):
        settings_file.check(settings)
        corpus = open_corpus(settings.data)
        check_size(corpus, settings.context)
    fingerprints = gather(corpus.fingerprint, group)
    if len(set(fingerprints)) > 1:
        raise UserError(
            f"ranks do not see the same data in {corpus.name}: give --data a folder that is equal on all hosts."
        )
    parts = sharded_parts(layout.tp, sequence_parallel=settings.sequence_parallel, codec=settings.codec)
    with enough_memory(group.world_size, LANE_MIB):
        trainer = Trainer.new(settings, corpus, parts, layout.tp, layout.dp, layout.pp)
    step, total = _continue(trainer, folder, layout) if resume else (0, None)
    with raise_together(group, UserError, ""):
        if group.rank == 0 and not resume and not anew:
            _refuse_used(folder)
    with raise_together(group, checkpoint.CheckpointError, ""):
        if group.rank == 0:
            refuse_later(folder / "checkpoints", STEP, step)
    with raise_together(group, UserError, ""):
        if group.rank == 0 and not resume:
            _claim(settings, folder)
    chief = group.rank == 0
    log = RunLog(folder / "log.jsonl" if chief else None, keep_below=step)
    try:
        with Screen(chief, settings.tokens) as screen:
            yield Run(settings, folder, layout, trainer, log, screen, step, total)
    finally:
        if trainer.replicas is not None:
            trainer.replicas.close()


def _refuse_used(folder: Path) -> None:
    if (folder / "settings.json").exists():
        raise UserError(
            f"{folder} holds a run already: add --resume to continue it, or name another folder with --folder."
        )


def _claim(settings: Settings, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        settings_file.save(settings, folder)
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}): name another folder with --folder.") from None


def _continue(trainer: Trainer, folder: Path, layout: Mesh) -> tuple[int, int | None]:
    """Load the last checkpoint; (steps done, steps planned)."""
    found = checkpoint.latest(folder / "checkpoints")
    if found is None:
        raise UserError(
            f"the run in {folder} has no checkpoint to resume from: start anew with another --folder, "
            f"and a smaller --checkpoint-every (it was {trainer.settings.checkpoint_every} steps)."
        )
    data: Any = checkpoint.peek(found)["extra"].get("data")
    if data != trainer.corpus.fingerprint:
        raise UserError(
            f"{trainer.corpus.name} is not the data that the run in {folder} began with: "
            f"give its --data, or start anew without --resume."
        )
    loaded = checkpoint.load(
        trainer.model,
        found,
        group=layout.tp,
        dp_group=layout.dp,
        pp_group=layout.pp,
        optimizer=trainer.optimizer,
        aggregator=trainer.aggregator,
    )
    return loaded.step, loaded.extra["total"]
