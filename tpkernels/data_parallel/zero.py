"""Optimizers whose state and step are cut over the replicas (ZeRO), beside an aggregator that scatters gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from tpkernels.optimizers import needs_whole_tensors

from .aggregator import GradAggregator
from .flat import flat_shard, stepped

WHO = "zero_optimizer"
Optimizer = TypeVar("Optimizer", bound=torch.optim.Optimizer)


def zero_optimizer(
    kind: Callable[..., Optimizer], aggregator: GradAggregator, params: Iterable[Any] | None = None, **options: Any
) -> Optimizer:
    """Make an optimizer whose state and step are cut over the replicas of an aggregator with zero=1 or 2.

        aggregator = GradAggregator(model, group=dp, zero=1)
        optimizer = zero_optimizer(torch.optim.AdamW, aggregator, lr=1e-3)

    Its parameters are this rank's parts, flat tensors whose .grad is that part of the average. Each step updates them,
    and gathers the parameters of the model over the ranks, in messages as large as those of the gradients (beside the
    next forward pass where the aggregator has gather="forward"); all ranks make the steps alike. With codec "none" the
    parameters are, bit for bit, those of

        optimizer = kind(params, **options)              # with zero=0

    torch's ZeroRedundancyOptimizer does the same with another cut: full parameters go to the ranks, so that parts are
    as uneven as parameters are, every rank needs all averages, and optimizers that need full tensors work. Here parts
    are even to 64 values a parameter, a gradient is scattered and not reduced on all ranks (half of the bytes), and
    `checkpoint.save` cuts the state like any other tensor: it loads into any number of replicas, and without zero.

    Take `clip_grad_norm_` of this library: it knows the parts; p.grad of the model is None.

    Args:
        kind: a class of optimizers that treat every value by itself, or a function (params, **options) that makes one.
        aggregator: of the model.
        params: of the model, as torch takes them: tensors, (name, tensor) or groups with options. None: all that are
            trained. Frozen ones may be among them.
        options: passed on.

    Returns:
        what `kind` returns; schedulers and GradScaler work with it as with any other.

    Raises:
        ValueError: the aggregator has zero=0, a parameter is not of its model, or the optimizer does not treat every
            value by itself.

    Source: Rajbhandari et al. 2020, ZeRO (arXiv:1910.02054).
    """
    if aggregator.zero == 0:
        raise ValueError(f"{WHO}: aggregator must have zero=1 or 2, got 0: make the optimizer itself, or pass zero=1")
    known = {id(p) for p in aggregator.parameters}

    def part_of(parameter: Any) -> Any:
        if isinstance(parameter, tuple):
            return parameter[0], part_of(parameter[1])
        if not isinstance(parameter, Tensor) or (parameter.requires_grad and id(parameter) not in known):
            got = f"one of shape {list(parameter.shape)}" if isinstance(parameter, Tensor) else repr(parameter)
            raise ValueError(f"{WHO}: params must be parameters of the aggregator's model, got {got}")
        return stepped(parameter) if parameter.requires_grad else parameter

    def part_of_group(group: Mapping[str, Any]) -> dict[str, Any]:
        inside = group["params"]
        return {**group, "params": [part_of(p) for p in ([inside] if isinstance(inside, Tensor) else inside)]}

    given = aggregator.parameters if params is None else params
    parts = [part_of_group(one) if isinstance(one, Mapping) else part_of(one) for one in given]
    optimizer = kind(parts, **options)
    if needs_whole_tensors(type(optimizer)):
        name = type(optimizer).__name__
        raise ValueError(
            f"{WHO}: kind must be an optimizer that treats every value by itself, got {name}; if it does, add it "
            f"before: tpkernels.optimizers.ELEMENTWISE.add({name}), else take zero=0"
        )
    optimizer.register_step_pre_hook(lambda *_: _take_values(aggregator))
    optimizer.register_step_post_hook(lambda *_: aggregator.gather_parameters())
    return optimizer


def _take_values(aggregator: GradAggregator) -> None:
    """The optimizer steps the values that the parameters have now, wherever they are."""
    aggregator.wait_for_parameters()
    for parameter in aggregator.parameters:
        if (flat := flat_shard(parameter)) is not None:
            flat.values.data = flat.part(parameter.detach())
