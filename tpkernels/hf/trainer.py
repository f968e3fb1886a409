"""The Trainer of transformers on a cut model, alone or as one of several replicas.

    with one_replica():                                   # accelerate neither wraps the model nor deals out the data
        arguments = TrainingArguments(..., save_steps=100)
        trainer = fit_trainer(Trainer(model=parallelize(model, group=tp), args=arguments, train_dataset=data), dp)
        trainer.train()                                   # or trainer.train(resume_from_checkpoint=True)

The ranks that hold one replica see the same batches, because all draw the same random numbers. Replicas are dealt the
batches in turn, so that a step learns from per_device_train_batch_size * accumulation * replicas sequences: those that
one process with a batch as large would take.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tpkernels import checkpoint, layers, ops
from tpkernels.checkpoint.ranks import CheckpointRanks
from tpkernels.checkpoint.staging import refuse_later
from tpkernels.comm.group import Group
from tpkernels.data_parallel import GradAggregator, clip_grad_norm_
from tpkernels.errors import PlanError
from tpkernels.hf.trainer_models import (
    SameSteps,
    count_whole,
    cut_reference,
    load_scheduler,
    scheduler_state,
    show_heads,
)
from tpkernels.optimizers import needs_whole_tensors
from tpkernels.plan.adapters.apply import cut_adapters
from tpkernels.plan.loss import CutCausalLoss

# By these accelerate recognises that it was started as one of several processes.
LAUNCHED = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE",
)  # fmt: skip
STEP = "checkpoint-"  # and the step, the names of checkpoints
STATE = "trainer_state.json"  # where the Trainer looks for its state


@contextmanager
def one_replica() -> Iterator[None]:
    """Let accelerate take this rank for a run of its own: it neither wraps the model in DDP nor deals out the data."""
    before = {name: os.environ.pop(name) for name in LAUNCHED if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


def fit_trainer(trainer: Any, dp_group: Group | None = None) -> Any:
    """Make a Trainer of a cut model right. Every rank calls it.

    The gradient norm is taken over all ranks. With replicas, batches are dealt out, gradients, tokens and losses are
    averaged; evaluation is done by every replica alike. Checkpoints are those of tpkernels.checkpoint, in folders named
    checkpoint-<step> which `train(resume_from_checkpoint=...)` takes, also on other ranks as long as a step is of as
    many sequences; `save_model` writes a plain Hugging Face folder. Only rank 0 shows progress and reports. Random
    numbers of torch are saved, others are not.

    Adapters of peft are cut (`cut_adapters`). A trainer that multiplies by the weight of the head itself (those of TRL)
    finds it whole; a reference model of the same sizes is cut, too. At the first step the ranks of a replica must see
    the same batch and draw the same random numbers.

    Args:
        trainer: made inside `one_replica`, with the same arguments on all ranks; its output_dir is a folder all see.
        dp_group: the ranks that hold the same part of other replicas; None when there is one replica.

    Returns:
        the trainer.

    Raises:
        PlanError: its model is not cut, it was not made inside `one_replica`, or it is to do what cannot be done right
            here; the text says what.
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
    for problem, instead in _problems(trainer, dp_group):
        raise PlanError(f"fit_trainer: {problem} does not work on a cut model; {instead}")
    if getattr(trainer.model, "peft_config", None):
        cut_adapters(trainer.model)
    cut_reference(trainer)
    _Saving(trainer, report.group, dp_group)
    show_heads(trainer)
    SameSteps(trainer, report.group)
    count_whole(trainer, dp_group)
    if dp_group is not None:
        _Replica(trainer, report.group, dp_group)
    return trainer


def _problems(trainer: Any, dp_group: Group | None) -> Iterator[tuple[str, str]]:
    """What of a Trainer's arguments cannot be made right, and what to do."""
    from transformers import Trainer

    of, accelerator = trainer.args, trainer.accelerator
    if of.fp16:
        yield "fp16=True", "each rank would find a loss scale of its own: take bf16"
    if of.load_best_model_at_end or _text(of.save_strategy) == "best":
        yield "load_best_model_at_end or save_strategy='best'", "load what you want with tpkernels.checkpoint.load"
    if of.save_only_model:
        yield "save_only_model=True", "call trainer.save_model for a plain folder"
    if of.push_to_hub:
        yield "push_to_hub=True", "push what trainer.save_model wrote"
    metrics = trainer.compute_metrics or trainer.preprocess_logits_for_metrics
    if metrics is not None and not of.prediction_loss_only and _cut_logits(trainer.model):
        yield (
            "compute_metrics or preprocess_logits_for_metrics where the model was cut with gather_logits=False",
            "each rank would see its part of the vocabulary: gather the logits, or set prediction_loss_only=True",
        )
    kind = _optimizer_class(trainer)
    if _text(of.save_strategy) != "no" and kind is not None and needs_whole_tensors(kind):
        yield (
            f"a checkpoint with {kind.__name__}, whose state is that of whole tensors,",
            "set save_strategy='no' and call trainer.save_model, or take one that treats every value by itself",
        )
    own_loss = type(trainer).compute_loss is not Trainer.compute_loss
    if own_loss and _cut_logits(trainer.model):
        yield (
            "a compute_loss of the trainer's own where the model was cut with gather_logits=False",
            "it may compute the loss from this rank's part of the vocabulary: gather the logits",
        )
    if getattr(of, "precompute_ref_log_probs", False):
        yield "precompute_ref_log_probs=True", "they were computed from this rank's part of the head: set it to False"
    if getattr(of, "use_vllm", False):
        yield "use_vllm=True", "the engine would be given this rank's parts: generate with the model"
    if of.auto_find_batch_size:
        yield "auto_find_batch_size=True", "ranks would try sizes of their own: give a size"
    if dp_group is None:
        return
    if getattr(trainer, "model_init", None) is not None:
        yield "model_init with replicas", "it makes another model when the training begins: make the model yourself"
    if _text(of.train_sampling_strategy) not in ("random", "sequential"):
        yield f"train_sampling_strategy={_text(of.train_sampling_strategy)!r} with replicas", "take 'random'"
    if accelerator.split_batches or accelerator.dispatch_batches or not accelerator.even_batches:
        yield "an accelerator_config of split, dispatched or uneven batches with replicas", "leave it out"
    if not accelerator.use_seedable_sampler:
        yield "use_seedable_sampler=False with replicas", "they would shuffle apart: leave it True"
    if accelerator.gradient_state.plugin_kwargs.get("sync_each_batch"):
        yield "sync_each_batch=True with replicas", "leave it out: gradients travel once a step"
    if own_loss and of.average_tokens_across_devices:
        yield (
            "a compute_loss of your own with replicas and average_tokens_across_devices=True",
            "whether its loss is divided by the tokens of all replicas is not known here: set that to False, and each "
            "replica's loss counts alike",
        )


def _optimizer_class(trainer: Any) -> type[torch.optim.Optimizer] | None:
    """Of the optimizer that the Trainer has or will make; None where it cannot be told."""
    kind: Any = type(trainer.optimizer)
    if trainer.optimizer is None:
        with suppress(ImportError, ValueError):  # the Trainer raises it when it makes one
            made = trainer.optimizer_cls_and_kwargs
            kind = (made or trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model))[0]
    return kind if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) else None


def _cut_logits(model: Any) -> bool:
    return isinstance(getattr(model, "loss_function", None), CutCausalLoss)


def _text(option: Any) -> str:
    return str(getattr(option, "value", option))


def _at_the_beginning(do: Callable[[], None]) -> Any:
    """A callback of a Trainer that does something before the first step."""
    from transformers import TrainerCallback

    class AtTheBeginning(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            do()

    return AtTheBeginning()


class _Saving:
    """Clips, saves and loads for a Trainer, whose own way would be one file written by all ranks."""

    def __init__(self, trainer: Any, group: Group, dp_group: Group | None) -> None:
        self._trainer, self._group, self._dp_group = trainer, group, dp_group
        self._place = CheckpointRanks(group, dp_group)
        self._random: dict[str, Tensor] | None = None
        trainer.accelerator.clip_grad_norm_ = self._clip
        trainer.is_world_process_zero = trainer.is_local_process_zero = lambda: self._place.is_first
        trainer.state.is_world_process_zero = trainer.state.is_local_process_zero = self._place.is_first
        trainer.save_model = self._save_model
        trainer._save_checkpoint = self._save
        trainer._load_from_checkpoint = self._open
        trainer._load_optimizer_and_scheduler = self._load
        trainer._load_rng_state = self._load_random
        trainer.add_callback(_at_the_beginning(self._check_names))

    def _check_names(self) -> None:
        """Refuse at the beginning what would fail at the first save."""
        folder, step = self._trainer.args.output_dir, self._trainer.state.global_step
        with self._place.together(f"train in {folder}"):
            if self._place.is_first and _text(self._trainer.args.save_strategy) != "no":
                refuse_later(Path(folder), STEP, step)

    def _clip(self, parameters: Any, max_norm: float, norm_type: float = 2.0) -> Tensor:
        return clip_grad_norm_(list(parameters), max_norm, groups=self._group, norm_type=norm_type)

    def _save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        folder = output_dir or self._trainer.args.output_dir
        with self._place.together(f"save {folder}"):
            if self._place.replica == 0:
                self._trainer.model.save_pretrained(folder)
            if self._place.is_first and self._trainer.processing_class is not None:
                self._trainer.processing_class.save_pretrained(folder)

    def _save(self, model: Any, trial: Any) -> None:
        from transformers.trainer_callback import ExportableState

        trainer = self._trainer
        trainer.store_flos()
        for callback in [*trainer.callback_handler.callbacks, trainer.control]:
            if isinstance(callback, ExportableState):
                kept, name = trainer.state.stateful_callbacks, type(callback).__name__
                kept[name] = [*kept[name], callback.state()] if isinstance(kept[name], list) else callback.state()
        step = trainer.state.global_step
        extra = {
            "trainer_state": json.loads(json.dumps(dataclasses.asdict(trainer.state))),
            "scheduler": scheduler_state(trainer.lr_scheduler), "sequences": self._sequences(),
        }  # fmt: skip
        folder = checkpoint.save(
            trainer.model,
            os.path.join(trainer.args.output_dir, f"{STEP}{step:08d}"),
            group=self._group, dp_group=self._dp_group, optimizer=_plain(trainer.optimizer), step=step,
            extra=self._place.gather(extra)[0],  # in a Trainer's state is who it is
        )  # fmt: skip
        with self._place.together(f"save {folder}"):
            if self._place.is_first and (trainer.args.save_total_limit or 0) > 0:
                checkpoint.prune(folder.parent, trainer.args.save_total_limit)

    def _open(self, folder: str, model: Any = None) -> None:
        """Put the state where the Trainer looks for it. It goes when the rest is loaded, once there is an optimizer."""
        with self._place.together(f"load {folder}"):
            extra, path = checkpoint.peek(folder)["extra"], os.path.join(folder, STATE)
            state, was, now = extra["trainer_state"], extra.get("sequences"), self._sequences()
            if was not in (None, now) and not self._trainer.args.ignore_data_skip:
                raise checkpoint.CheckpointError(
                    f"a step was of {was} sequences when it was saved, and is of {now} now, so that the data would go "
                    f"on elsewhere: change batch or accumulation, or set ignore_data_skip=True"
                )
            if self._place.is_first:
                with open(path + ".new", "w") as file:
                    json.dump(state, file, indent=2, sort_keys=True)
                os.replace(path + ".new", path)

    def _sequences(self) -> int:
        """That a step learns from, over all replicas."""
        trainer = self._trainer
        return int(trainer.get_total_train_batch_size(trainer.args))

    def _load(self, folder: str | None) -> None:
        if folder is None:
            return
        trainer = self._trainer
        self._place.gather(None)  # all have read it
        with self._place.together(f"load {folder}"):
            if self._place.is_first:
                os.remove(os.path.join(folder, STATE))  # a checkpoint holds what its save wrote, and nothing else
        found = checkpoint.load(
            trainer.model, folder, group=self._group, dp_group=self._dp_group, optimizer=_plain(trainer.optimizer)
        )
        load_scheduler(trainer.lr_scheduler, found.extra["scheduler"])
        self._random = layers.rng_state()  # to be set again when the batches of before have been passed over

    def _load_random(self, folder: str | None) -> None:
        if self._random is not None:
            layers.set_rng_state(self._random)


class _Replica:
    """What a Trainer does otherwise when it trains one of several replicas."""

    def __init__(self, trainer: Any, group: Group, dp_group: Group) -> None:
        self._trainer, self._group, self._dp_group = trainer, group, dp_group
        self._aggregator: GradAggregator | None = None
        self._train, self._step, self._loss = trainer.train, trainer.training_step, trainer.compute_loss
        self._tokens, self._loader = trainer._get_num_items_in_batch, trainer.get_train_dataloader
        self._batch_size = trainer.get_total_train_batch_size
        trainer.train, trainer.training_step, trainer.compute_loss = self.train, self.step, self.loss
        trainer._get_num_items_in_batch, trainer.get_train_dataloader = self.tokens, self.loader
        trainer.get_total_train_batch_size = lambda args: self._batch_size(args) * dp_group.world_size

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """With replicas that are the same at the beginning and average their gradients."""
        accelerator = self._trainer.accelerator
        with GradAggregator(self._trainer.model, group=self._dp_group, codec="none") as self._aggregator:
            accelerator.no_sync = lambda model=None: self._aggregator.no_sync()
            try:
                return self._train(*args, **kwargs)
            finally:
                self._aggregator = None
                del accelerator.no_sync

    def step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward; the loss is the mean over the replicas."""
        loss: Tensor = self._step(model, inputs, *args, **kwargs)
        if self._aggregator is not None and self._trainer.accelerator.sync_gradients:
            self._aggregator.wait()
        return ops.all_reduce(loss.reshape(1), group=self._dp_group, op="avg").reshape(())

    def tokens(self, *args: Any, **kwargs: Any) -> Any:
        """Those of all replicas, by which their losses are divided."""
        found = self._tokens(*args, **kwargs)
        if isinstance(found, Tensor) and self._trainer.args.average_tokens_across_devices:
            return ops.all_reduce(found.reshape(1), group=self._dp_group).reshape(found.shape)
        return found

    def loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """Divided by the mean of the replicas' tokens, if it is by tokens: the average divides by the replicas again.

        Losses that are not divided by tokens (those of classes, for one) stay the means that they are.
        """
        if isinstance(num_items_in_batch, Tensor) and self._trainer.args.average_tokens_across_devices:
            num_items_in_batch = num_items_in_batch / self._dp_group.world_size
        return self._loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)

    def loader(self) -> Any:
        """Of the batches whose number, modulo the replicas, is that of this one."""
        accelerator = self._trainer.accelerator
        accelerator.prepare_data_loader = self._deal
        try:
            return self._loader()
        finally:
            del accelerator.prepare_data_loader

    def _deal(self, data_loader: Any, device_placement: bool | None = None, **_: Any) -> Any:
        from accelerate.data_loader import prepare_data_loader

        accelerator = self._trainer.accelerator
        made = prepare_data_loader(
            data_loader,
            accelerator.device,
            num_processes=self._dp_group.world_size,
            process_index=self._dp_group.rank,
            put_on_device=accelerator.device_placement if device_placement is None else device_placement,
            dispatch_batches=False,
            use_seedable_sampler=True,
            data_seed=accelerator.dataloader_config.data_seed,
            non_blocking=accelerator.non_blocking,
            use_stateful_dataloader=accelerator.use_stateful_dataloader,
        )
        accelerator._dataloaders.append(made)
        return made


def _plain(optimizer: Any) -> Any:
    """The optimizer itself, where accelerate has wrapped it."""
    return getattr(optimizer, "optimizer", optimizer)
