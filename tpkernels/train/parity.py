"""The check of a finished run: its first steps once more in one process with torch's own layers, nothing cut."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from tpkernels.train.gpt import whole_parts
from tpkernels.train.settings import Settings
from tpkernels.train.trainer import Trainer


@dataclass(frozen=True)
class Parity:
    """How far the cut run is from the uncut one.

    Attributes:
        steps: how many were compared.
        loss_difference, loss_bound: the largest difference in loss, and what rounding allows at that step.
        norm_difference, norm_bound: the same for the gradient norm, relative. A wrong gradient shows here first.
    """

    steps: int
    loss_difference: float
    loss_bound: float
    norm_difference: float
    norm_bound: float

    @property
    def holds(self) -> bool:
        """Written so that NaN does not hold."""
        return self.loss_difference <= self.loss_bound and self.norm_difference <= self.norm_bound


def compare(trainer: Trainer, records: list[dict[str, float]], total: int | None) -> Parity:
    """Run the first steps of `trainer`'s settings uncut and compare them with the records of the cut run.

    Not collective: call it on one rank. The whole model must fit into its memory.
    """
    settings = trainer.settings
    steps = min(settings.parity_steps, len(records))
    whole = Trainer.new(settings, trainer.corpus, whole_parts(), None)
    losses: list[tuple[float, float]] = []
    norms: list[tuple[float, float]] = []
    for record in records[:steps]:
        step = int(record["step"])
        other = whole.step(step, total)
        bound = rounding(settings) * math.sqrt(step + 1)  # weights carry errors on, which add up like a random walk
        # The loss is a mean over tokens; their errors cancel like independent ones.
        losses.append((abs(other["loss"] - record["loss"]), bound * other["loss"] / math.sqrt(settings.tokens)))
        norms.append((abs(other["grad_norm"] - record["grad_norm"]) / other["grad_norm"], bound))
    nothing = (0.0, 0.0)
    return Parity(steps, *max(losses, key=_excess, default=nothing), *max(norms, key=_excess, default=nothing))


def not_the_same_program(settings: Settings) -> str | None:
    """Why the steps of such a run are not those of one process, even without rounding; None when they are."""
    if settings.dp > 1 and settings.grad_mode != "sync":
        return f"--grad-mode {settings.grad_mode} applies other gradients than one process does"
    if settings.dp > 1 and settings.grad_codec != "none":
        return f"--grad-codec {settings.grad_codec} changes gradients by more than rounding"
    return None


def _excess(pair: tuple[float, float]) -> float:
    difference, bound = pair
    return float("inf") if difference != difference else difference / bound


def rounding(settings: Settings) -> float:
    """By how much the gradient norm, or a token's loss, of two right programs may differ relatively in the first step.

    Errors of rounding add up like random walks. A dot product of K terms in fp32 has a relative error of about
    sqrt(K) * u, u = 2**-24; the products that follow each other in a step (qkv, attention, proj, up, down of each
    block, head; three times as many with backward) add their squares. bf16 rounds each of their results once more, and
    a codec each sum over the ranks. Two programs, each with its own error: sqrt(2). A factor 4 covers the extreme of
    many draws.
    """
    d, blocks = settings.d_model, settings.layers
    terms = 3 * (blocks * (d + settings.context + d + d + 4 * d) + d)
    products = 3 * (blocks * 6 + 1)
    square = terms * 2.0**-48
    if settings.dtype == "bf16":
        square += products * torch.finfo(torch.bfloat16).eps ** 2 / 4
    for codec, messages in ((settings.codec, 4 * blocks), (settings.stage_codec, 2 * (settings.pp - 1))):
        if codec != "none":
            square += messages * {"fp16": 2.0**-11, "bf16": 2.0**-8, "fp8": 2.0**-4}.get(codec, 2.0**-7) ** 2
    return float(4 * (2 * square) ** 0.5)
