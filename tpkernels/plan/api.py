"""Shard an unmodified model over the ranks of a group: a plan has a style for each module, `parallelize` applies them.

A plan is data, {module glob: style}; styles/style.py has the styles. It comes from shipped/<model_type>.py, from the
model itself where transformers ships one, from a run of the model (derive/), or from the caller. In the order of
parallelize:

    validate.py            models that cannot be sharded are refused
    rules.py, derive/      the plan: a style for each module
    resolved.py, styles/   the sizes that each rank has of each module
    sequence/              tokens sharded between the blocks, checked by a run
    apply.py               modules become parallel layers in place
    loss.py, outputs.py, same_inputs.py, state_dict.py, adapters/    hooks around the sharded model
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import nn

from tpkernels.comm.group import Group, resolve
from tpkernels.compress import CODECS
from tpkernels.data_parallel.in_torch import watch_copies_of
from tpkernels.errors import shorten
from tpkernels.layers.convert import ConvertedModule, group_of
from tpkernels.layers.linear import ColumnParallelLinear, RowParallelLinear
from tpkernels.layers.reference import Ref
from tpkernels.plan.adapters.apply import AdapterGuard
from tpkernels.plan.adapters.load import LoadAdapter, take_shards
from tpkernels.plan.apply import apply, share_inputs
from tpkernels.plan.derive.inputs import Call, check_inputs
from tpkernels.plan.loss import check_cut_logits, cut_logits
from tpkernels.plan.outputs import GatheredAttentions, refuse_methods
from tpkernels.plan.resolved import Resolved
from tpkernels.plan.rules import Plan, log, refuse_stages
from tpkernels.plan.same_inputs import SameInputs
from tpkernels.plan.sequence.apply import SequencePlan
from tpkernels.plan.state_dict import SavePretrained, gather_for_peft
from tpkernels.plan.styles.attention import disable_fast_paths
from tpkernels.plan.styles.base import CutSettings, is_linear
from tpkernels.plan.styles.experts import ExpertStyle
from tpkernels.plan.styles.linear import VocabHeadStyle
from tpkernels.plan.styles.replicated import ReplicateStyle
from tpkernels.plan.validate import refuse, refuse_patched

__all__ = ["Plan", "PlanReport", "parallelize"]

Model = TypeVar("Model", bound=nn.Module)


@runtime_checkable
class Chosen(Protocol):
    """What decides how a model is sharded over its group, such as a Recipe of the planner."""

    @property
    def tp(self) -> int:
        """Ranks of the group."""

    @property
    def sequence_parallel(self) -> bool:
        """As in `parallelize`."""

    @property
    def codec(self) -> str:
        """As in `parallelize`."""


@dataclass
class PlanReport:
    """The report of `parallelize`: the attribute `tpk_plan` of the model. str() of it is the line that is logged.

    Attributes:
        source: of the plan, for people.
        first_group: over which the model was sharded.
        model: the model.
        styles: {module name: name of its style}, of every module that is not replicated.
        linears: the number of linears of the model.
        whole: the names of those that are replicated.
        heads: {how they are sharded: number of attention blocks}.
        sequence_parallel: whether tokens are sharded between the blocks.
        options: of parallelize, by which another model of the kind is sharded alike.
    """

    source: str
    first_group: Group
    model: Ref[nn.Module] = field(repr=False, compare=False)
    styles: dict[str, str] = field(default_factory=dict)
    linears: int = 0
    whole: list[str] = field(default_factory=list)
    heads: dict[str, int] = field(default_factory=dict)
    sequence_parallel: bool = False
    options: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def group(self) -> Group:
        """The group over which the model is sharded now: that of its layers."""
        return group_of(self.model.target, self.first_group)

    @classmethod
    def of(
        cls, model: nn.Module, plan: Plan, resolved: Resolved, settings: CutSettings, *, sequence_parallel: bool
    ) -> PlanReport:
        """Return the report of a model that is about to be sharded.

        Args:
            model: the full one.
            plan: the source of the styles.
            resolved: the sizes.
            settings: the group and the codecs.
            sequence_parallel: as in `parallelize`.
        """
        linears = [name for name, module in resolved.modules.items() if is_linear(module)]
        return cls(
            source=plan.source,
            first_group=settings.group,
            model=Ref(model),
            styles={n: style.name for n, style in resolved.styles.items() if not isinstance(style, ReplicateStyle)},
            linears=len(linears),
            whole=[name for name in linears if name not in resolved.cuts],
            heads=resolved.heads(),
            sequence_parallel=sequence_parallel,
            options={
                "plan": plan,
                "sequence_parallel": sequence_parallel,
                "codec": settings.codec,
                "grad_codec": settings.grad_codec,
            },
        )

    def __str__(self) -> str:
        cut = self.linears - len(self.whole)
        parts = [f"cut {cut} of {self.linears} linears over {self.group.world_size} ranks by the plan of {self.source}"]
        parts += [f"{count} attention blocks {how}" for how, count in self.heads.items()]
        experts = sum(style == ExpertStyle.name for style in self.styles.values())
        parts += [f"{experts} mixtures of experts"] * bool(experts)
        parts += [f"whole: {shorten(self.whole)}"] * bool(self.whole)
        return "; ".join(parts + ["tokens cut between the blocks"] * self.sequence_parallel)


def parallelize(
    model: Model,
    *,
    group: Group | None = None,
    plan: str | Mapping[str, str] | Plan = "auto",
    sequence_parallel: bool = False,
    codec: str = "none",
    grad_codec: str | None = None,
    gather_logits: bool = True,
    inputs: Call | None = None,
    recipe: Chosen | None = None,
) -> Model:
    """Shard a model over the ranks of a group, in place.

    Equal to, for every input, and with gradients that are the shards of the unsharded ones:

        y = model(x)                    # on every rank

    The class of the model, its module names and its state-dict keys stay; values of the state dict are this rank's
    shards (`tpkernels.shard.shard_info(parameter)` has their places). Tied parameters stay tied. `model.tpk_plan` is a
    report; rank 0 logs it in one line (logger "tpkernels", or stderr where logging is not set up).

    Args:
        model: the same on all ranks, on the CPU, the group's device, or meta (then fill the shards by their
            shard_info).
        group: of the ranks; None means all ranks.
        plan: "auto", or {module glob: style}: see `Plan.resolve` and tpkernels/plan/styles/style.py.
        sequence_parallel: between the blocks of a decoder each rank keeps its shard of the tokens only (less memory for
            activations, the same traffic). Hidden states of single layers that the model returns are such shards, too.
        codec: how partial sums are packed on the wire.
        grad_codec: how the backward packs partial gradients; None: as `codec`.
        gather_logits: False leaves the logits of a causal language model sharded over the vocabulary in calls with
            labels and computes the loss from the shards; for training, where full logits may be the largest tensors of
            all. Calls without labels (generate, a loss of your own) gather them.
        inputs: (args, kwargs) of the model for the runs that show how it can be sharded: for a plan from its module
            tree and for sequence_parallel. None: sample inputs are made.
        recipe: of the planner (`planner.plan(...).recipe`), instead of `sequence_parallel` and `codec`. The group has
            its tp ranks; its replicas, stages and ZeRO stage are for `Mesh.open` and `GradAggregator`.

    Returns:
        the model.

    Raises:
        PlanError: the plan does not fit, or the model cannot be sharded: quantised, already wrapped, patched on
            instances, too few heads; nothing is changed then.
        ValueError: no such codec; inputs are no (args, kwargs); a recipe of another number of ranks, or beside
            sequence_parallel or codec.
        TypeError: the recipe is none.

    Source: Shoeybi et al. 2019 (arXiv:1909.08053), Korthikanti et al. 2022 (arXiv:2205.05198).
    """
    group = resolve(group)
    if recipe is not None:
        _check_recipe(recipe, group, sequence_parallel, codec)
        sequence_parallel, codec = recipe.sequence_parallel, recipe.codec
    settings = _settings(group, codec, grad_codec)
    refuse(model)
    check_inputs(inputs)

    if sequence_parallel:
        refuse_stages(model, "sequence_parallel is checked by a run")
    plan = Plan.resolve(model, plan, inputs=inputs)
    styles = plan.styles(model)
    refuse_patched(dict(model.named_modules()), styles)

    resolved = Resolved.of(model, styles, settings.group.world_size)
    tokens = SequencePlan.of(model, resolved, inputs) if sequence_parallel else None
    heads = [name for name, style in styles.items() if isinstance(style, VocabHeadStyle)]
    if not gather_logits:
        check_cut_logits(model, heads)
    report = PlanReport.of(model, plan, resolved, settings, sequence_parallel=sequence_parallel)

    apply(model, resolved, settings)
    if tokens is not None:
        tokens.apply(settings)
    share_inputs(resolved.modules)
    disable_fast_paths(model)
    if not gather_logits:
        cut_logits(model, heads[0])

    GatheredAttentions().watch(model, resolved, settings.group)
    SameInputs(model, settings.group)
    _guard(model, settings.group)
    model.tpk_plan = report  # type: ignore[assignment]
    if settings.group.rank == 0:
        _log(report)
    return model


def _check_recipe(recipe: Chosen, group: Group, sequence_parallel: bool, codec: str) -> None:
    if not isinstance(recipe, Chosen):
        raise TypeError(f"parallelize: recipe must be one of the planner (report.recipe), got {type(recipe).__name__}")
    if recipe.tp != group.world_size:
        raise ValueError(
            f"parallelize: recipe has tp {recipe.tp}, and group {group.label!r} {group.world_size} ranks: take the "
            f"group of Mesh.open(recipe)"
        )
    if sequence_parallel or codec != "none":
        raise ValueError(
            f"parallelize: expected a recipe, or sequence_parallel and codec, got a recipe and {sequence_parallel}, "
            f"{codec!r}"
        )


def _settings(group: Group, codec: str, grad_codec: str | None) -> CutSettings:
    settings = CutSettings(group, codec, codec if grad_codec is None else grad_codec)
    if not {settings.codec, settings.grad_codec} <= set(CODECS):
        raise ValueError(
            f"parallelize: codecs must be among {list(CODECS)}, got {settings.codec!r}, {settings.grad_codec!r}"
        )
    return settings


def _log(report: PlanReport) -> None:
    """One line: to the logger "tpkernels" where logging is set up, else to stderr."""
    if log.level != logging.NOTSET or log.hasHandlers():
        log.info("%s", report)
    else:
        print(f"tpkernels: {report}", file=sys.stderr, flush=True)


def _guard(model: nn.Module, group: Group) -> None:
    """Replace or refuse the uses of a model by others that would take this rank's shards for full parameters."""
    linears = (ColumnParallelLinear, RowParallelLinear)
    for kinds in ((ConvertedModule,), linears):  # the table of ids is not called where embeddings are given
        first = next((module for module in model.modules() if isinstance(module, kinds)), None)
        if first is not None:
            first.register_forward_pre_hook(AdapterGuard(model))
    if group.world_size > 1:
        watch_copies_of(model)
    model.register_load_state_dict_pre_hook(take_shards)  # type: ignore[no-untyped-call]
    model.register_state_dict_post_hook(gather_for_peft)  # type: ignore[no-untyped-call]
    if hasattr(model, "load_adapter"):
        model.load_adapter = LoadAdapter(model)  # type: ignore[assignment]
    if hasattr(model, "_get_static_cache_init_shape"):  # it would count the heads of the full model
        model._get_static_cache_init_shape = _no_static_shape  # type: ignore[assignment]
    for module in model.modules():  # the models in a model, too
        refused = getattr(module, "tpk_stages", None) is not None  # by take_stages already
        if (
            hasattr(type(module), "save_pretrained")
            and not refused
            and any(isinstance(m, ConvertedModule) for m in module.modules())
        ):
            module.save_pretrained = SavePretrained(module, group)  # type: ignore[assignment]
            refuse_methods(module)


def _no_static_shape() -> None:
    """Return None: transformers then allocates static caches by the shape of the first keys."""
