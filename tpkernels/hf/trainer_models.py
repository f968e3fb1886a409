"""What `fit_trainer` changes of a trainer beside saving and replicas: heads, a reference, checks, counts, schedulers.

Fused losses (those of TRL, of Liger) never call the head: they take hidden states and `lm_head.weight`. While a
trainer that `fit_trainer` made right computes a step, the weight of a cut head is therefore whole for whoever reads it:
gathered once a step, and its gradient is this rank's rows. The head's own forward goes on multiplying by its part.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from tpkernels import ops
from tpkernels.comm.group import Group
from tpkernels.data_parallel import check_replicas
from tpkernels.layers.base import gather
from tpkernels.layers.convert import ConvertedModule, change_layer
from tpkernels.layers.linear import ColumnParallelLinear
from tpkernels.plan.api import parallelize
from tpkernels.shard import full_shape


class WholeHeads:
    """Whether heads are seen whole now, and what was gathered for that."""

    def __init__(self) -> None:
        self._gathered: dict[tuple[Any, ...], Tensor] | None = None

    @contextmanager
    def seen(self) -> Iterator[None]:
        """Let the weights of heads be whole; nothing is kept behind the outermost of these."""
        if self._gathered is not None:
            yield
            return
        self._gathered = {}
        try:
            yield
        finally:
            self._gathered = None

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """Let them be parts, for the head itself."""
        before, self._gathered = self._gathered, None
        try:
            yield
        finally:
            self._gathered = before

    def look(self, head: Head, name: str) -> Any:
        """The parameter, or the whole that it is a part of. Collective in the second case."""
        if name not in head._parameters:
            raise AttributeError(f"{type(head).__name__} has no attribute {name!r}")
        parameter, cut = head._parameters[name], head._cuts.get(name)
        if self._gathered is None or parameter is None or cut is None:
            return parameter
        key = (id(parameter), parameter._version, torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        if key not in self._gathered:
            self._gathered[key] = gather(parameter, cut.dim, cut.full_size, head.group, unit=cut.unit)
        return self._gathered[key]


class Head(ColumnParallelLinear):
    """A column layer that makes logits, in a trainer."""

    whole: WholeHeads

    @property
    def weight(self) -> Any:  # type: ignore[override]
        """This rank's rows, or all."""
        return self.whole.look(self, "weight")

    @property
    def bias(self) -> Any:  # type: ignore[override]
        """This rank's part, or all of it."""
        return self.whole.look(self, "bias")

    def local_parameter(self, name: str) -> Tensor | None:
        """Return this rank's parameter, also while the head is seen whole."""
        with self.whole.unseen():
            return super().local_parameter(name)


def show_heads(trainer: Any) -> None:
    """Let a trainer see the heads of its models whole while it computes: its own model, a reference, rewards."""
    whole = WholeHeads()
    for model in _models_of(trainer):
        for module in model.modules():
            if isinstance(module, ConvertedModule) and not is_parametrized(module) and _makes_logits(module):
                change_layer(module, Head)
                module.whole = whole
    for name in ("training_step", "prediction_step"):
        setattr(trainer, name, _inside(whole, getattr(trainer, name)))


def _makes_logits(module: nn.Module) -> bool:
    return isinstance(module, ColumnParallelLinear) and module.gather_output


def cut_reference(trainer: Any) -> None:
    """Cut a whole reference model as the trained one is: its numbers are to be the same bits where nothing was learned.

    One of other sizes stays whole, on every rank.
    """
    reference, report = getattr(trainer, "ref_model", None), trainer.model.tpk_plan
    if not isinstance(reference, nn.Module) or getattr(reference, "tpk_plan", None) is not None:
        return
    shapes = [{n: tuple(full_shape(p)) for n, p in m.named_parameters()} for m in (reference, report.model.target)]
    if shapes[0] == shapes[1]:
        parallelize(reference, group=report.group, **report.options)


def count_whole(trainer: Any, dp_group: Group | None) -> None:
    """Let a trainer count the operations of the unsharded model, and operations and tokens of all replicas."""
    flops: Callable[[Any], float] = trainer.floating_point_ops
    tokens: Any = getattr(trainer, "_track_num_input_tokens", None)

    def floating_point_ops(inputs: Any) -> int:
        tables = {id(p) for m in trainer.model.modules() if isinstance(m, nn.Embedding) for p in m._parameters.values()}
        counted = [p for p in trainer.model.parameters() if id(p) not in tables]
        parts: int = sum(p.numel() for p in counted)
        whole: int = sum(full_shape(p).numel() for p in counted)
        replicas = 1 if dp_group is None else dp_group.world_size
        return int(flops(inputs)) * whole * replicas // max(1, parts)

    def track_tokens(inputs: Any) -> None:
        before = trainer.state.num_input_tokens_seen
        tokens(inputs)
        mine = torch.tensor([trainer.state.num_input_tokens_seen - before])
        trainer.state.num_input_tokens_seen = before + int(ops.all_reduce(mine, group=dp_group).item())

    trainer.floating_point_ops = floating_point_ops
    if dp_group is not None and tokens is not None and trainer.args.include_num_input_tokens_seen != "no":
        trainer._track_num_input_tokens = track_tokens


def _models_of(trainer: Any) -> Iterator[nn.Module]:
    """The models that a trainer holds, one by one or in lists."""
    for value in vars(trainer).values():
        for item in value if isinstance(value, list | tuple) else (value,):
            if isinstance(item, nn.Module):
                yield item


class SameSteps:
    """Checks at the first step of a training that the ranks of a replica have the same parameters, batch and seeds."""

    def __init__(self, trainer: Any, group: Group) -> None:
        self._trainer, self._group, self._state = trainer, group, None
        self._step = trainer.training_step
        trainer.training_step = self

    def __call__(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """One step.

        Raises:
            RankMismatchError: they differ; names what and the ranks.
        """
        if self._state is not self._trainer.state:  # a new one for each training
            check_replicas(model, group=self._group, batch=inputs, rng=True, buffers=False)
            self._state = self._trainer.state
        step: Tensor = self._step(model, inputs, *args, **kwargs)
        return step


def _inside(whole: WholeHeads, step: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(step)
    def run(*args: Any, **kwargs: Any) -> Any:
        with whole.seen():
            return step(*args, **kwargs)

    return run


def scheduler_state(scheduler: Any) -> Any:
    """Return the state of a scheduler for JSON, whose keys are text: a mapping with other keys as a list of pairs."""
    return _pairs(scheduler.state_dict())


def load_scheduler(scheduler: Any, state: Any) -> None:
    """Give a scheduler the state that `scheduler_state` returned."""
    found = _unpaired(state)
    for name, value in found.items():
        if isinstance(getattr(scheduler, name, None), Counter):  # the milestones of MultiStepLR
            found[name] = Counter(value)
    scheduler.load_state_dict(found)


def _pairs(value: Any) -> Any:
    if isinstance(value, Mapping):
        items = [[key, _pairs(inner)] for key, inner in value.items()]
        return dict(items) if all(isinstance(key, str) for key, _ in items) else {"pairs": items}
    return [_pairs(inner) for inner in value] if isinstance(value, list | tuple) else value


def _unpaired(value: Any) -> Any:
    if isinstance(value, dict):
        items = value["pairs"] if value.keys() == {"pairs"} else value.items()
        return {key: _unpaired(inner) for key, inner in items}
    return [_unpaired(inner) for inner in value] if isinstance(value, list) else value
