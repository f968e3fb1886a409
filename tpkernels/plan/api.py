"""Cut an unmodified model over the ranks of a group: a plan says how each module is cut, `parallelize` does it.

A plan is data, {module glob: style}; styles/style.py has the styles. It comes from shipped/<model_type>.py, from the
model itself where transformers ships one, from the tree of its modules (search.py), or from the caller.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn

from tpkernels.comm.group import Group, resolve
from tpkernels.compress import CODECS
from tpkernels.errors import PlanError
from tpkernels.layers.base import Cut
from tpkernels.plan.adapters.apply import AdapterGuard
from tpkernels.plan.adapters.load import LoadAdapter, load_whole
from tpkernels.plan.apply import CutSettings, apply, apply_to_blocks, arrange_random, share_inputs
from tpkernels.plan.cuts import all_cuts, is_linear
from tpkernels.plan.derive.inputs import Call, check_inputs
from tpkernels.plan.loss import check_cut_logits, cut_logits
from tpkernels.plan.outputs import GatheredAttentions, refuse_methods
from tpkernels.plan.rules import (
    Plan,
    _few,
    log,
)
from tpkernels.plan.same_inputs import SameInputs
from tpkernels.plan.sequence.apply import check_sequence, cut_sequence, find_doors
from tpkernels.plan.state_dict import SavePretrained, give_whole
from tpkernels.plan.styles.attention import leave_fast_paths
from tpkernels.plan.styles.heads import Block, find_blocks
from tpkernels.plan.styles.modules import Column, CutModule, Row, Tied, group_of
from tpkernels.plan.styles.style import Style
from tpkernels.plan.styles.units import check_ties
from tpkernels.plan.validate import refuse, refuse_patched

__all__ = ["Plan", "PlanError", "PlanReport", "parallelize"]

Model = TypeVar("Model", bound=nn.Module)


@dataclass
class PlanReport:
    """What `parallelize` did; it sits on the model as `tpk_plan`, and str() of it is the line that it logs.

    Attributes:
        source: where the plan came from.
        styles: {module name: style}, of every module that was cut.
        linears: how many linears the model has. whole: the names of those that were left whole.
        heads: {how: number of attention blocks}.
        first_group: over which it was cut. model: which.
        sequence_parallel: whether tokens are cut between the blocks.
        options: of parallelize, by which another model of the kind is cut alike.
    """

    source: str
    first_group: Group
    model: list[nn.Module] = field(repr=False, compare=False)  # in a list: a reference, and no child of anything
    styles: dict[str, str] = field(default_factory=dict)
    linears: int = 0
    whole: list[str] = field(default_factory=list)
    heads: dict[str, int] = field(default_factory=dict)
    sequence_parallel: bool = False
    options: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def group(self) -> Group:
        """Over which the model is cut now: that of its layers."""
        return group_of(self.model[0], self.first_group)

    def __str__(self) -> str:
        cut = self.linears - len(self.whole)
        parts = [f"cut {cut} of {self.linears} linears over {self.group.world_size} ranks by the plan of {self.source}"]
        parts += [f"{count} attention blocks {how}" for how, count in self.heads.items()]
        experts = sum(style == "expert" for style in self.styles.values())
        parts += [f"{experts} mixtures of experts"] * bool(experts)
        parts += [f"whole: {_few(self.whole)}"] * bool(self.whole)
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
) -> Model:
    """Cut a model over the ranks of a group, in place.

    Equal to, for every input, and with gradients that are the unsharded ones' parts:

        y = model(x)                    # on every rank

    The class of the model, its module names and its state-dict keys stay; values of the state dict are this rank's
    parts (`tpkernels.shard.shard_info(parameter)` says of what). Tied parameters stay tied. `model.tpk_plan` says what
    was done; rank 0 logs it in one line (logger "tpkernels", or stderr where logging is not set up).

    Args:
        model: the same on all ranks, on the CPU, the group's device, or meta (then fill the parts by their shard_info).
        group: over which; None means all ranks.
        plan: "auto", or {module glob: style}: see `Plan.resolve` and tpkernels/plan/styles/style.py.
        sequence_parallel: between the blocks of a decoder each rank keeps its part of the tokens only (less memory for
            activations, the same traffic). Hidden states of single layers that the model returns are such parts, too.
        codec: how partial sums travel.
        grad_codec: how the backward packs partial gradients; None: as `codec`.
        gather_logits: False leaves the logits of a causal language model cut over the vocabulary in calls with labels
            and computes the loss from the parts; for training, where whole logits may be the largest tensors of all.
            Calls without labels (generate, a loss of your own) gather them.
        inputs: (args, kwargs) with which to call the model where it is run to see how it can be cut: for a plan from
            its module tree and for sequence_parallel. None: sample inputs are made.

    Returns:
        the model.

    Raises:
        PlanError: the plan does not fit, or the model cannot be cut: quantised, already wrapped, patched on instances,
            too few heads; nothing is changed then.
        ValueError: no such codec; inputs are no (args, kwargs).

    Source: Shoeybi et al. 2019 (arXiv:1909.08053), Korthikanti et al. 2022 (arXiv:2205.05198).
    """
    group = resolve(group)
    settings = CutSettings(group, codec, codec if grad_codec is None else grad_codec)
    if not {settings.codec, settings.grad_codec} <= set(CODECS):
        raise ValueError(
            f"parallelize: codecs must be among {list(CODECS)}, got {settings.codec!r}, {settings.grad_codec!r}"
        )
    refuse(model)
    check_inputs(inputs)
    plan = Plan.resolve(model, plan, inputs=inputs)
    styles = plan.styles(model)
    modules = dict(model.named_modules())
    refuse_patched(modules, styles)
    blocks = list(find_blocks(modules, styles))
    cuts = all_cuts(modules, styles, blocks, group.world_size)
    check_ties(modules, cuts)
    layers = check_sequence(model, modules, [block.name for block in blocks]) if sequence_parallel else []
    found = find_doors(model, layers, {modules[n]: style for n, style in styles.items()}, inputs) if layers else []
    heads = [name for name, style in styles.items() if style.name == "vocab_head"]
    if not gather_logits:
        check_cut_logits(model, heads)
    report = _report(PlanReport(plan.source, group, [model]), styles, cuts, modules, blocks)
    report.sequence_parallel = sequence_parallel
    report.options = {"plan": plan, "sequence_parallel": sequence_parallel, "codec": codec, "grad_codec": grad_codec}
    tied = Tied(model)
    tied.check(modules, cuts)
    apply_to_blocks(blocks, styles, settings, tied)
    for name, style in styles.items():
        apply(modules[name], style, cuts.get(name), settings, tied)
    tied.rejoin(model)
    arrange_random(modules, blocks, group)
    if layers:
        cut_sequence(layers, found, group, settings.codec, settings.grad_codec)
    share_inputs(modules)
    leave_fast_paths(model)
    if not gather_logits:
        cut_logits(model, heads[0])
    GatheredAttentions().watch(model, blocks, styles, group)
    SameInputs(model, group)
    _guard(model, group)
    model.tpk_plan = report  # type: ignore[assignment]
    if group.rank == 0:
        _say(report)
    return model


def _say(report: PlanReport) -> None:
    """One line: to the logger "tpkernels" where somebody has set up logging, else to stderr."""
    if log.level != logging.NOTSET or log.hasHandlers():
        log.info("%s", report)
    else:
        print(f"tpkernels: {report}", file=sys.stderr, flush=True)


def _guard(model: nn.Module, group: Group) -> None:
    """Keep from going wrong in silence what others do with a model without knowing that it is cut."""
    for kinds in ((CutModule,), (Column, Row)):  # the table of ids is passed by where embeddings are given
        first = next((module for module in model.modules() if isinstance(module, kinds)), None)
        if first is not None:
            first.register_forward_pre_hook(AdapterGuard(model))
    model.register_load_state_dict_pre_hook(load_whole)  # type: ignore[no-untyped-call]
    model.register_state_dict_post_hook(give_whole)  # type: ignore[no-untyped-call]
    if hasattr(model, "load_adapter"):
        model.load_adapter = LoadAdapter(model)  # type: ignore[assignment]
    if hasattr(model, "_get_static_cache_init_shape"):  # it would count the heads of the whole model
        model._get_static_cache_init_shape = _lazily  # type: ignore[assignment]
    for module in model.modules():  # the models in a model, too
        if hasattr(type(module), "save_pretrained") and any(isinstance(m, CutModule) for m in module.modules()):
            module.save_pretrained = SavePretrained(module, group)  # type: ignore[assignment]
            refuse_methods(module)


def _lazily() -> None:
    """What transformers takes for: let static caches take their shape from the first keys."""


def _report(
    report: PlanReport,
    styles: dict[str, Style],
    cuts: dict[str, Cut],
    modules: dict[str, nn.Module],
    blocks: list[Block],
) -> PlanReport:
    linears = [name for name, module in modules.items() if is_linear(module)]
    report.linears = len(linears)
    report.styles = {name: style.name for name, style in styles.items() if style.name != "replicate"}
    report.whole = [name for name in linears if name not in cuts]
    for block in blocks:
        how = block.heads.text(report.first_group.world_size)
        report.heads[how] = report.heads.get(how, 0) + 1
    return report
