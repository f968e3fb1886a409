"""What the tests of training share: a run that ends with its block, and what there is at the end of one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tpkernels.comm.group import Group
from tpkernels.comm.mesh import Mesh
from tpkernels.data_parallel.flat import stepped
from tpkernels.train.settings import Settings
from tpkernels.train.trainer import Run, open_run


@contextmanager
def run(settings: Settings, folder: str | Path, *, resume: bool = False) -> Iterator[Run]:
    with (
        Group.open() as group,
        Mesh.open(tp=settings.tp, dp=settings.dp, pp=settings.pp, world=group) as layout,
        open_run(settings, Path(folder), layout, resume=resume) as opened,
    ):
        yield opened


def finished(settings: Settings, folder: str | Path, *, resume: bool = False) -> tuple[list[torch.Tensor], list[float]]:
    """Parameters, optimizer state, what an aggregator keeps, and losses at the end."""
    with run(settings, folder, resume=resume) as opened:
        opened.loop()
        trainer = opened.trainer
        parameters, state = list(trainer.model.parameters()), trainer.optimizer.state
        moments = [v for p in parameters for _, v in sorted(state[stepped(p)].items())]
        kept = [] if trainer.replicas is None else trainer.replicas.aggregator.state_dict()["tensors"].items()
        tensors = [t.detach().clone() for t in (*parameters, *moments, *(t for _, t in sorted(kept)))]
        return tensors, [r["loss"] for r in opened.log.records]
