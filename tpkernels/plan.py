"""Cut an unmodified model over the ranks of a group: a plan says how each module is cut, `parallelize` does it.

A plan is data, {module glob: style}; plan_styles.py has the styles. It comes from plans/<model_type>.py, from the model
itself where transformers ships one, from the tree of its modules (derive.py), or from the caller.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from torch import nn

from tpkernels.compress import CODECS
from tpkernels.derive_inputs import Call, check_inputs
from tpkernels.group import Group, resolve
from tpkernels.layers.base import Cut
from tpkernels.plan_alike import SameInputs
from tpkernels.plan_apply import (
    CutSettings,
    all_cuts,
    apply,
    apply_to_blocks,
    arrange_random,
    can_be_cut,
    is_linear,
    share_inputs,
    unsaid,
)
from tpkernels.plan_attention import STYLE, leave_fast_paths, settle
from tpkernels.plan_experts import takes_choices
from tpkernels.plan_heads import Block, find_blocks
from tpkernels.plan_layers import Column, CutModule, Row, Tied, group_of
from tpkernels.plan_loss import check_cut_logits, cut_logits
from tpkernels.plan_outputs import GatheredAttentions, refuse_methods
from tpkernels.plan_peft import AdapterGuard
from tpkernels.plan_peft_load import LoadAdapter, load_whole
from tpkernels.plan_refuse import patched_parents, refuse, refuse_patched
from tpkernels.plan_save import SavePretrained, give_whole
from tpkernels.plan_sequence import check_sequence, cut_sequence, find_doors
from tpkernels.plan_styles import TRANSLATION, PlanError, Style, parse_style
from tpkernels.plan_units import check_ties

__all__ = ["Plan", "PlanError", "PlanReport", "parallelize"]

log = logging.getLogger("tpkernels")
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Plan:
    """How a model is cut.

    Attributes:
        rules: {module glob: style}; of several rules that match a module the last one counts.
        source: where they come from, for people.
        strict: an embedding or linear without a rule, and a rule that matches nothing, are errors. Otherwise the first
            stay whole, as transformers means it in the plans that it ships.
    """

    rules: Mapping[str, str]
    source: str = "the caller"
    strict: bool = True

    @classmethod
    def resolve(
        cls, model: nn.Module, plan: str | Mapping[str, str] | Plan = "auto", *, inputs: Call | None = None
    ) -> Plan:
        """Return the plan for a model.

        Args:
            model: whole; parameters may be on the meta device.
            plan: "auto" for plans/<model_type>.py, else the model's own, else a derived one; {module glob: style}.
            inputs: (args, kwargs) with which a plan is derived; None: sample inputs are made.

        Raises:
            PlanError: there is none, with the reason.
        """
        if isinstance(plan, Plan):
            return plan
        if not isinstance(plan, str):
            return cls(dict(plan))
        if plan != "auto":
            raise PlanError(f"Plan: plan must be 'auto' or {{module glob: style}}, got {plan!r}")
        return _of_ours(model) or _of_the_model(model) or _derived(model, inputs)

    def styles(self, model: nn.Module) -> dict[str, Style]:
        """Return the style of every module that the plan cuts or keeps: {module name: Style}.

        Raises:
            PlanError: a module without a rule, a rule without a module, or no such style; names them.
        """
        parsed = {glob: parse_style(text) for glob, text in self.rules.items()}
        modules = dict(model.named_modules())
        found: dict[str, Style] = {}
        used: set[str] = set()
        for name in modules:
            for glob, style in parsed.items():
                if name and fnmatchcase(name, glob):
                    found[name] = style
                    used.add(glob)
        settle(found, modules)
        if self.strict:
            missing = [name for name, module in modules.items() if is_weighty(module) and not _covered(name, found)]
            if missing:
                raise PlanError(f"Plan: no rule for {_few(missing)} ({len(missing)} modules)")
            if len(used) < len(parsed):
                raise PlanError(f"Plan: no module for the rules {_few(g for g in parsed if g not in used)}")
        return found


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
        plan: "auto", or {module glob: style}: see `Plan.resolve` and tpkernels/plan_styles.py.
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


def is_weighty(module: nn.Module) -> bool:
    """Whether a strict plan must say something about this module."""
    return (is_linear(module) or isinstance(module, nn.Embedding)) and can_be_cut(module)


def _covered(name: str, found: dict[str, Style]) -> bool:
    """Whether a rule holds for the module, or a mixture above it is cut as a whole."""
    parents = [name.rsplit(".", n)[0] for n in range(1, name.count(".") + 1)]
    return name in found or any(p in found and found[p].name in (STYLE, "expert", "replicate") for p in parents)


def _few(names: Iterable[str], most: int = 6) -> str:
    """A list of names for a message, which may be long."""
    names = list(names)
    return str(names[:most])[:-1] + (", ...]" if len(names) > most else "]")


def _of_ours(model: nn.Module) -> Plan | None:
    """The plan of plans/<model_type>.py: RULES, a dict, or a function of the model that gives one."""
    name = getattr(getattr(model, "config", None), "model_type", None)
    if not isinstance(name, str) or not name.replace("_", "").isalnum():
        return None
    where = f"tpkernels.plans.{name}"
    if importlib.util.find_spec(where) is None:
        return None
    rules = importlib.import_module(where).RULES
    found = dict(rules(model) if callable(rules) else rules)
    return Plan(found | _of_the_vocabulary(model), f"tpkernels/plans/{name}.py")


def _of_the_model(model: nn.Module) -> Plan | None:
    """The plan that transformers ships with the model, in our words.

    It says nothing about the table that ids look up.
    """
    own: dict[str, str] = dict(getattr(model, "_tp_plan", None) or {})
    base = getattr(model, "base_model", model)
    prefix = f"{model.base_model_prefix}." if base is not model else ""
    ships = getattr(base.config, "base_model_tp_plan", None) if hasattr(base, "config") else None
    if not ships:
        return None
    rules = {prefix + glob: style for glob, style in ships.items()} | own
    unknown = [style for style in rules.values() if style not in TRANSLATION]
    if unknown:
        log.info("the plan that ships with %s has styles %s", type(model).__name__, _few(set(unknown)))
        return None
    found = {glob: str(TRANSLATION[style]) for glob, style in rules.items() if TRANSLATION[style] is not None}
    plan = Plan(found | _of_the_vocabulary(model), "transformers", strict=False)
    modules, styles = dict(model.named_modules()), plan.styles(model)
    silent = unsaid(modules, styles) + patched_parents(modules, styles)
    silent += [n for n, style in styles.items() if style.name == "expert" and not takes_choices(modules[n])]
    if silent:
        log.info("the plan that ships with %s is not enough for %s", type(model).__name__, _few(silent))
        return None
    return plan


def _of_the_vocabulary(model: nn.Module) -> dict[str, str]:
    """Rules for the table that ids look up, and for the linear that makes logits."""
    names = {id(module): name for name, module in model.named_modules()}
    table, head = (getattr(model, get, lambda: None)() for get in ("get_input_embeddings", "get_output_embeddings"))
    rules = {names[id(table)]: "vocab"} if isinstance(table, nn.Embedding) else {}
    return rules | ({names[id(head)]: "vocab_head"} if isinstance(head, nn.Linear) else {})


def _derived(model: nn.Module, inputs: Call | None) -> Plan:
    if importlib.util.find_spec("tpkernels.derive") is None:
        raise PlanError(f"Plan: there is no plan for {type(model).__name__}; pass one as {{module glob: style}}")
    derive = importlib.import_module("tpkernels.derive")
    try:
        return Plan(derive.derive_plan(model, inputs=inputs), "its module tree")
    except derive.DeriveError as error:
        raise PlanError(
            f"Plan: there is no plan for {type(model).__name__}, and none can be derived: {error}"
        ) from None


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
