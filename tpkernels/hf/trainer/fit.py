"""The Trainer of transformers on a sharded model, for one replica or several.

    with one_replica():                                   # accelerate neither wraps the model nor shards the data
        arguments = TrainingArguments(..., save_steps=100)
        trainer = TensorParallelTrainer(parallelize(model, group=tp), arguments, train_dataset=data, dp_group=dp)
        trainer.train()                                   # or trainer.train(resume_from_checkpoint=True)

`fit_trainer(trainer, dp)` turns a Trainer that exists, of transformers or of TRL, into one.

All ranks of a replica see the same batches, because all draw the same random numbers. Replicas take the batches in
turn, so that a step learns from per_device_train_batch_size * accumulation * replicas sequences: those that one process
with a batch as large would take.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from tpkernels import ops
from tpkernels.checkpoint.ranks import CheckpointRanks
from tpkernels.checkpoint.staging import refuse_later
from tpkernels.comm.group import Group
from tpkernels.data_parallel import GradAggregator, check_replicas
from tpkernels.errors import PlanError
from tpkernels.hf.trainer.accelerator import AcceleratorMixin, mix_in
from tpkernels.hf.trainer.checks import option_text, problems
from tpkernels.hf.trainer.models import FullHeads, shard_reference
from tpkernels.hf.trainer.state import STEP, CheckpointMixin
from tpkernels.plan.adapters.apply import cut_adapters

if TYPE_CHECKING:
    from transformers import Trainer

# Environment variables by which accelerate detects that it was started as one of several processes.
LAUNCHED = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE",
)  # fmt: skip


@contextmanager
def one_replica() -> Iterator[None]:
    """Hide the other ranks from accelerate, so that it neither wraps the model in DDP nor shards the data."""
    before = {name: os.environ.pop(name) for name in LAUNCHED if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


class TensorParallelMixin(CheckpointMixin):
    """The differences of a Trainer on a sharded model; to be mixed in before a Trainer class.

    Gradient norms cover all ranks. While a step is computed, a fused loss reads the full weight of a sharded head. With
    a data-parallel group, batches are distributed over the replicas, and gradients, token counts and losses averaged.
    """

    tpk_checked_state: Any = None  # the TrainerState of the training whose first step was checked

    def is_world_process_zero(self) -> bool:
        """Whether this rank reports and writes; True on all ranks until the groups are set."""
        return self.tpk_place is None or self.tpk_place.is_first

    def is_local_process_zero(self) -> bool:
        """As `is_world_process_zero`."""
        return self.is_world_process_zero()

    def set_groups(self, group: Group, dp_group: Group | None) -> None:
        """Shard adapters and the reference model, and use the groups from now on. Collective.

        Args:
            group: the ranks that the model is sharded over.
            dp_group: the ranks that hold the same shards of other replicas; None when there is one.
        """
        self.tpk_group, self.tpk_dp_group, self.tpk_place = group, dp_group, CheckpointRanks(group, dp_group)
        if getattr(self.model, "peft_config", None):
            cut_adapters(self.model)
        shard_reference(self)
        self.tpk_heads = FullHeads(self)
        mix_in(AcceleratorMixin, self.accelerator)
        self.accelerator.tpk_group, self.accelerator.tpk_dp_group = group, dp_group
        self.state.is_world_process_zero = self.state.is_local_process_zero = self.tpk_place.is_first

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; replicas are checked to be equal at the start, and their gradients averaged."""
        if self.tpk_dp_group is None:
            return super().train(*args, **kwargs)
        with GradAggregator(self.model, group=self.tpk_dp_group, codec="none") as aggregator:
            self.accelerator.tpk_aggregator = aggregator
            try:
                return super().train(*args, **kwargs)
            finally:
                self.accelerator.tpk_aggregator = None

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward of one batch; the loss is the mean over the replicas.

        Raises:
            CheckpointError: at the first step; output_dir has checkpoints of later steps, so that a save would fail.
            RankMismatchError: at the first step; ranks of a replica differ in parameters, batch or random numbers.
        """
        if self.tpk_checked_state is not self.state:  # a new one for each training
            self._check_first_step(model, inputs)
            self.tpk_checked_state = self.state
        with self.tpk_heads.full():
            loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        if self.tpk_dp_group is None:
            return loss
        if self.accelerator.tpk_aggregator is not None and self.accelerator.sync_gradients:
            self.accelerator.tpk_aggregator.wait()
        return ops.all_reduce(loss.reshape(1), group=self.tpk_dp_group, op="avg").reshape(())

    def _check_first_step(self, model: Any, inputs: Any) -> None:
        folder = self.args.output_dir
        with self.tpk_place.together(f"train in {folder}"):
            if self.tpk_place.is_first and option_text(self.args.save_strategy) != "no":
                refuse_later(Path(folder), STEP, self.state.global_step)
        check_replicas(model, group=self.tpk_group, batch=inputs, rng=True, buffers=False)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """Forward of one batch, with full heads."""
        with self.tpk_heads.full():
            return super().prediction_step(*args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss, divided by the mean of the replicas' tokens where it is divided by tokens.

        The average over the replicas divides by their number again. Losses that are not divided by tokens (those of
        classes, for one) stay means.

        Args:
            model, inputs, return_outputs, num_items_in_batch: as for Trainer.
        """
        if self._counts_all_tokens(num_items_in_batch):
            num_items_in_batch = num_items_in_batch / self._replicas
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)

    def _get_num_items_in_batch(self, *args: Any, **kwargs: Any) -> Any:
        """The tokens of all replicas, by which their losses are divided."""
        count: Any = super()._get_num_items_in_batch(*args, **kwargs)
        if self._counts_all_tokens(count):
            return ops.all_reduce(count.reshape(1), group=self.tpk_dp_group).reshape(count.shape)
        return count

    def _counts_all_tokens(self, count: Any) -> bool:
        averaged: bool = self.args.average_tokens_across_devices
        return self.tpk_dp_group is not None and averaged and isinstance(count, Tensor)

    def get_train_dataloader(self) -> Any:
        """The batches whose number modulo the replicas is the rank of this replica."""
        self.accelerator.tpk_shards_data = True
        try:
            return super().get_train_dataloader()
        finally:
            self.accelerator.tpk_shards_data = False

    def get_total_train_batch_size(self, args: Any) -> int:
        """Sequences of a step, over all replicas."""
        return int(super().get_total_train_batch_size(args)) * self._replicas

    def floating_point_ops(self, inputs: Any) -> int:
        """Operations of the unsharded model, over all replicas."""
        return int(super().floating_point_ops(inputs)) * self._replicas

    def _track_num_input_tokens(self, inputs: Any) -> None:
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)  # type: ignore[no-untyped-call]
        if self.tpk_dp_group is not None and self.args.include_num_input_tokens_seen != "no":
            local = torch.tensor([self.state.num_input_tokens_seen - before])
            total = ops.all_reduce(local, group=self.tpk_dp_group).item()
            self.state.num_input_tokens_seen = before + int(total)

    @property
    def _replicas(self) -> int:
        return 1 if self.tpk_dp_group is None else self.tpk_dp_group.world_size


def fit_trainer(trainer: Any, dp_group: Group | None = None) -> Any:
    """Turn a Trainer of a sharded model into a tensor-parallel one, by changing its class. Every rank calls it.

    The gradient norm is taken over all ranks. With replicas, batches are distributed, gradients, tokens and losses are
    averaged; every replica evaluates the same. Checkpoints are those of tpkernels.checkpoint, in folders named
    checkpoint-<step> which `train(resume_from_checkpoint=...)` takes, also on other ranks as long as a step is of as
    many sequences; `save_model` writes a plain Hugging Face folder. Only rank 0 shows progress and reports. Random
    numbers of torch are saved, others are not.

    Adapters of peft are sharded (`cut_adapters`). A trainer that multiplies by the weight of the head itself (those of
    TRL) reads the full weight; a reference model of the same sizes is sharded, too. At the first step the ranks of a
    replica must have the same batch and random numbers.

    Args:
        trainer: made inside `one_replica`, with the same arguments on all ranks; its output_dir is a folder that all
            ranks share.
        dp_group: the ranks that hold the same shards of other replicas; None when there is one replica.

    Returns:
        the trainer.

    Raises:
        PlanError: its model is not sharded, it was not made inside `one_replica`, or one of its options cannot work on
            a sharded model (says which, and the alternative).
    """
    report = getattr(trainer.model, "tpk_plan", None)
    if report is None:
        raise PlanError("fit_trainer: the model of the trainer is not cut")
    if trainer.accelerator.num_processes != 1:
        raise PlanError("fit_trainer: make arguments and trainer inside `with one_replica():`")
    if dp_group is not None and dp_group.world_size == 1:
        dp_group = None
    ranks = report.group.world_size * (1 if dp_group is None else dp_group.world_size)
    if dist.is_initialized() and dist.get_world_size() != ranks:
        raise PlanError(
            f"fit_trainer: the model is cut over {report.group.world_size} ranks and dp_group makes {ranks} of them, "
            f"but the run has {dist.get_world_size()}: dp_group must join the same parts of all replicas"
        )
    for problem, instead in problems(trainer, dp_group, TensorParallelMixin):
        raise PlanError(f"fit_trainer: {problem} does not work on a cut model; {instead}")
    mix_in(TensorParallelMixin, trainer)
    trainer.set_groups(report.group, dp_group)
    return trainer


@cache
def trainer_class() -> type[Trainer]:
    """TensorParallelTrainer, made at the first use, because it imports transformers."""
    from transformers import Trainer

    class TensorParallelTrainer(TensorParallelMixin, Trainer):
        """A Trainer of a sharded model.

        Args:
            args, kwargs: as for Trainer; the TrainingArguments are made inside `one_replica`.
            dp_group: as for `fit_trainer`, which lists the differences and what is raised.
        """

        def __init__(self, *args: Any, dp_group: Group | None = None, **kwargs: Any) -> None:
            with one_replica():
                super().__init__(*args, **kwargs)
            fit_trainer(self, dp_group)

    return TensorParallelTrainer
