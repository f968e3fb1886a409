"""The options of a Trainer that cannot work on a sharded model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch

from tpkernels.comm.group import Group
from tpkernels.optimizers import needs_whole_tensors
from tpkernels.plan.loss import CutCausalLoss


def problems(trainer: Any, dp_group: Group | None, mixin: type[Any]) -> Iterator[tuple[str, str]]:
    """Yield (option, alternative) for each option of a Trainer that cannot work.

    Args:
        dp_group: the replicas; None when there is one.
        mixin: the class whose compute_loss is not one of the trainer's own.
    """
    of = trainer.args
    if of.fp16:
        yield "fp16=True", "each rank would find a loss scale of its own: take bf16"
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
    if option_text(of.save_strategy) != "no" and kind is not None and needs_whole_tensors(kind):
        yield (
            f"a checkpoint with {kind.__name__}, whose state is that of full tensors,",
            "set save_strategy='no' and call trainer.save_model, or take one that treats every value by itself",
        )
    own_loss = _defines_loss(trainer, mixin)
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
    if dp_group is not None:
        yield from _problems_of_replicas(trainer, own_loss)


def _problems_of_replicas(trainer: Any, own_loss: bool) -> Iterator[tuple[str, str]]:
    of, accelerator = trainer.args, trainer.accelerator
    if getattr(trainer, "model_init", None) is not None:
        yield "model_init with replicas", "it makes another model when the training begins: make the model yourself"
    if option_text(of.train_sampling_strategy) not in ("random", "sequential"):
        yield f"train_sampling_strategy={option_text(of.train_sampling_strategy)!r} with replicas", "take 'random'"
    if accelerator.split_batches or accelerator.dispatch_batches or not accelerator.even_batches:
        yield "an accelerator_config of split, dispatched or uneven batches with replicas", "leave it out"
    if not accelerator.use_seedable_sampler:
        yield "use_seedable_sampler=False with replicas", "they would shuffle apart: leave it True"
    if accelerator.gradient_state.plugin_kwargs.get("sync_each_batch"):
        yield "sync_each_batch=True with replicas", "leave it out: gradients are averaged once a step"
    if own_loss and of.average_tokens_across_devices:
        yield (
            "a compute_loss of your own with replicas and average_tokens_across_devices=True",
            "whether its loss is divided by the tokens of all replicas cannot be determined: set that to False, and "
            "each replica's loss counts alike",
        )


def _optimizer_class(trainer: Any) -> type[torch.optim.Optimizer] | None:
    """The class of the optimizer that the Trainer has or will make; None where that cannot be determined."""
    kind: Any = type(trainer.optimizer)
    if trainer.optimizer is None:
        with suppress(ImportError, ValueError):  # the Trainer raises it when it makes one
            made = trainer.optimizer_cls_and_kwargs
            kind = (made or trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model))[0]
    return kind if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) else None


def _defines_loss(trainer: Any, mixin: type[Any]) -> bool:
    """Whether the trainer computes its loss by a method of its own, which overrides that of transformers' Trainer."""
    from transformers import Trainer

    definers = (kind for kind in type(trainer).__mro__ if "compute_loss" in vars(kind) and kind is not mixin)
    return next(definers) is not Trainer


def _cut_logits(model: Any) -> bool:
    return isinstance(getattr(model, "loss_function", None), CutCausalLoss)


def option_text(option: Any) -> str:
    """The value of an option that may be an enumeration."""
    return str(getattr(option, "value", option))
