"""The methods of the study: every codec and mode of this library, and those of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from bench.plain_model import clip_grad_norm_ as plain_clip
from bench.plain_model import plain_parts
from tpkernels.comm.mesh import Mesh, rows_of
from tpkernels.compress import CODECS
from tpkernels.train.data import Corpus
from tpkernels.train.gpt import GPT, sharded_parts
from tpkernels.train.settings import GRAD_CODECS, GRAD_MODES, Settings
from tpkernels.train.trainer import Trainer

LAYOUTS = {"dp2": (1, 2), "tp2": (2, 1), "tp2dp2": (2, 2)}  # (tp, dp)
POWER_RANK = 4  # of PowerSGD's approximation
POWER_START = 10  # steps that PowerSGD leaves plain, as its authors advise for the beginning


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        name: what tables call it.
        codec, mode: of this library. torch: "plain", "fp16" or "powersgd" of DDP, "tp" for plain tensor parallelism.
    """

    name: str
    codec: str = "none"
    mode: str = "sync"
    torch: str | None = None


def methods(layout: str) -> list[Method]:
    """All methods of a layout, the baseline first."""
    if LAYOUTS[layout][1] == 1:  # without replicas the codecs carry activations and their gradients
        return [Method("torch TP", torch="tp"), *(Method(codec, codec) for codec in CODECS)]
    torchs = [Method("DDP", torch="plain"), Method("DDP fp16 hook", torch="fp16"), Method("PowerSGD", torch="powersgd")]
    return torchs + [Method(f"{c}{'' if m == 'sync' else ' ' + m}", c, m) for m in GRAD_MODES for c in GRAD_CODECS]


def settings_of(base: Settings, layout: str, method: Method) -> Settings:
    """The settings of a run by this method."""
    tp, dp = LAYOUTS[layout]
    changes: dict[str, Any] = {"tp": tp, "dp": dp}
    if method.torch is None:
        changes |= {"codec": method.codec} if dp == 1 else {"grad_codec": method.codec, "grad_mode": method.mode}
    return Settings(**(base.__dict__ | changes))


def make(method: Method, settings: Settings, corpus: Corpus, groups: Mesh) -> Trainer:
    """A model in training; collective over all ranks."""
    tp = groups.tp
    if method.torch == "tp":
        return PlainTrainer.new(settings, corpus, plain_parts(), None)
    parts = sharded_parts(tp, codec=settings.codec)
    if method.torch is None:
        return Trainer.new(settings, corpus, parts, tp, groups.dp)
    trainer = DDPTrainer.new(settings, corpus, parts, tp)
    trainer.wrap(groups, method.torch)
    return trainer


class PlainTrainer(Trainer):
    """Tensor parallelism by torch.distributed alone."""

    def clip(self) -> Tensor:
        return plain_clip(list(self.model.parameters()), self.settings.clip)


class Losses(nn.Module):
    """DDP wraps `forward`, and the trainer calls `loss`."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, target: Tensor) -> Tensor:
        return self.model.loss(ids, target)


@dataclass
class Share:
    """The replicas of a trainer, where DDP averages the gradients."""

    rows: range
    weight: float = 1.0

    def wait(self) -> bool:
        """Done in backward."""
        return True

    def after_step(self) -> None:
        """Parameters stay equal."""

    def drain(self) -> bool:
        """Nothing is under way."""
        return False


class DDPTrainer(Trainer):
    """DistributedDataParallel with one of its hooks; counts the bytes that its collectives send."""

    def wrap(self, groups: Mesh, hook: str) -> None:
        assert groups.dp is not None
        self.replicas = Share(rows_of(self.settings.batch, groups.dp))  # type: ignore[assignment]
        self.hook, self.world_size, self.counted = hook, groups.dp.world_size, 0
        self.power_start = POWER_START if self.settings.warmup else 2  # the least that it takes
        process_group = groups.dp.process_group
        # Over gloo the callbacks of PowerSGD start collectives in an order that differs between ranks as soon as there
        # are two buckets, and the process aborts ("Received data size doesn't match"). So it gets one.
        cap = 1000 if hook == "powersgd" else None
        self.ddp = DistributedDataParallel(Losses(self.model), process_group=process_group, bucket_cap_mb=cap)
        self.power = powerSGD_hook.PowerSGDState(
            process_group, matrix_approximation_rank=POWER_RANK, start_powerSGD_iter=self.power_start
        )
        if hook == "fp16":
            self.ddp.register_comm_hook(process_group, default_hooks.fp16_compress_hook)
        elif hook == "powersgd":
            self.ddp.register_comm_hook(self.power, powerSGD_hook.powerSGD_hook)

    def loss(self, ids: Tensor, target: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super().loss(ids, target)
        self.counted += 1
        loss: Tensor = self.ddp(ids, target)
        return loss

    def bytes_sent(self) -> int:
        """Since the start, by each rank: a ring all-reduce of n bytes sends 2 (R - 1) / R * n."""
        ring = 2 * (self.world_size - 1) / self.world_size
        values = sum(p.numel() for p in self.model.parameters())
        if self.hook == "powersgd":  # which counts by itself, from its start on
            plain = min(self.counted, self.power_start) * values
            return int(ring * 4 * (plain + self.power.total_numel_after_compression))
        return int(ring * {"plain": 4, "fp16": 2}[self.hook] * self.counted * values)
