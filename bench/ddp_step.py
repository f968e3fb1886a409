"""A training step of replicas: DistributedDataParallel on gloo and on back end tpk, GradAggregator, with each codec.

`python -m bench.run ddp_step --hosts 2 --link 10gbit`. The model and its check are those of bench/c10d_programs.py, a
size is that of the parameters. The roof is the step of one replica, whose buckets DDP fills and nobody sends.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bench.c10d import GLOO, group_of
from bench.c10d_programs import BOUND, FAKE, Training, batch, checked, ddp_over, expected, step, width_of
from bench.cell import Cell, Setting
from bench.timing import Candidate
from tpkernels import Group
from tpkernels import c10d as tpk
from tpkernels.data_parallel import GradAggregator

CODECS = ("none", "fp16", "int8")


@dataclass
class Packed(Training):
    """DDP over a group of back end tpk, with a codec."""

    group: Any = None
    codec: str = "none"

    def step(self) -> Tensor:
        with tpk.codec(self.group, self.codec):
            return super().step()


@dataclass
class Aggregated(Training):
    """The model itself; an aggregator averages its gradients.

    Attributes:
        keeps: what packing loses, for the next step: reads and writes an fp32 residual of the model's size.
    """

    group: Group | None = None
    codec: str = "none"
    keeps: bool = True
    aggregator: GradAggregator | None = None

    def restart(self) -> None:
        if self.aggregator is not None:
            self.aggregator.close()
            self.aggregator = None
        super().restart()

    def step(self) -> Tensor:
        if self.aggregator is None:
            self.aggregator = GradAggregator(self.model, group=self.group, codec=self.codec, error_feedback=self.keeps)
        return step(self.model, self.optimizer, *self.data, averaged=self.aggregator.wait)


def ddp_step(setting: Setting, nbytes: int) -> Cell:
    """A step with averaged gradients, and what of it is communication that nothing hides."""
    width = width_of(setting, nbytes)
    shape = (width, batch(width, setting.rank), expected(width, range(setting.world_size))[setting.rank])
    options = tpk.Options(transport=setting.transport)
    group = functools.cache(lambda: dist.new_group(backend="tpk", pg_options=options))

    def candidate(name: str, job: Training, codec: str, transport: str) -> Candidate:
        job.restart()
        label = {"codec": codec, "transport": transport}
        return Candidate(name, job.step, checked(name, job.error), load=job.restart, label=label)

    def plain(name: str, backend: str) -> Candidate:
        return candidate(name, Training(functools.partial(ddp_over, group_of(backend)), *shape), "none", backend)

    def packed(codec: str) -> Candidate:
        wrap = functools.partial(DistributedDataParallel, process_group=group())
        return candidate(f"ddp_{codec}", Packed(wrap, *shape, group(), codec), codec, "tpk")

    def aggregated(name: str, codec: str, keeps: bool) -> Candidate:
        job = Aggregated(nn.Module.train, *shape, setting.group(), codec, keeps)
        return candidate(name, job, codec, setting.group().transport)

    makers = {GLOO: functools.partial(plain, GLOO, GLOO)}
    makers |= {f"ddp_{codec}": functools.partial(packed, codec) for codec in CODECS}
    names = {"tpkernels": ("none", True)} | {codec: (codec, True) for codec in CODECS[1:]}
    names |= {f"no_feedback_{codec}": (codec, False) for codec in CODECS[1:]}
    makers |= {name: functools.partial(aggregated, name, *of) for name, of in names.items()}
    makers[BOUND] = functools.partial(plain, BOUND, FAKE)
    sizes = {"bytes": nbytes}
    return Cell("ddp_step", setting.dtype_name, setting.world_size, sizes, setting.pick(**makers), GLOO, roofs=(BOUND,))
