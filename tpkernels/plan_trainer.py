"""The Trainer of transformers on a cut model.

    with one_replica():                                   # not one data-parallel replica for each rank
        arguments = TrainingArguments(..., save_strategy="no")
        trainer = fit_trainer(Trainer(model=parallelize(model), args=arguments, train_dataset=data))
        trainer.train()
    tpkernels.checkpoint.save(model, folder, optimizer=trainer.optimizer)

The ranks together are one replica: all of them see the same batches, because all draw the same random numbers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from tpkernels.data_parallel.clip import clip_grad_norm_
from tpkernels.plan_styles import PlanError

# By these accelerate recognises that it was started as one of several processes.
LAUNCHED = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE",
)  # fmt: skip


@contextmanager
def one_replica() -> Iterator[None]:
    """Let accelerate take this rank for a run of its own: it neither wraps the model in DDP nor deals out the data."""
    before = {name: os.environ.pop(name) for name in LAUNCHED if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


def fit_trainer(trainer: Any) -> Any:
    """Make a Trainer of a cut model right: the gradient norm is taken over all ranks, nothing is saved by each of them.

    Returns:
        the trainer.

    Raises:
        PlanError: its model is not cut, it was not made inside `one_replica`, or it would save checkpoints, which every
            rank would write to the same files (use tpkernels.checkpoint).
    """
    report = getattr(trainer.model, "tpk_plan", None)
    if report is None:
        raise PlanError("fit_trainer: the model of the trainer is not cut")
    if trainer.accelerator.num_processes != 1:
        raise PlanError("fit_trainer: make arguments and trainer inside `with one_replica():`")
    if str(getattr(trainer.args.save_strategy, "value", trainer.args.save_strategy)) != "no":
        raise PlanError("fit_trainer: save_strategy must be 'no': save with tpkernels.checkpoint")
    group = report.group

    def clip(parameters: Any, max_norm: float, norm_type: float = 2.0) -> Tensor:
        trainer.accelerator.unscale_gradients()
        return clip_grad_norm_(list(parameters), max_norm, groups=group, norm_type=norm_type)

    trainer.accelerator.clip_grad_norm_ = clip
    return trainer
