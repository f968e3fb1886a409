"""Plan: the rules {module glob: style} of a model, from the caller, shipped, the model's own, or derived."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from tpkernels.errors import DeriveError, PlanError, shorten
from tpkernels.layers.absent import Absent
from tpkernels.plan.derive.inputs import Call
from tpkernels.plan.derive.search import derive_plan
from tpkernels.plan.derive.vocabulary import module_of
from tpkernels.plan.styles.base import Style, can_be_cut, is_linear
from tpkernels.plan.styles.experts import ExpertStyle, takes_choices
from tpkernels.plan.styles.style import TRANSLATION, parse_style
from tpkernels.plan.validate import patched_parents

log = logging.getLogger("tpkernels")


@dataclass(frozen=True)
class Plan:
    """How a model is sharded.

    Attributes:
        rules: {module glob: style}; of several rules that match a module the last one counts.
        source: of the rules, for people.
        strict: an embedding or linear without a rule, and a rule that matches nothing, are errors. Otherwise the first
            are replicated, as in the plans that transformers ships.
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
            model: the full one; parameters may be on the meta device.
            plan: "auto" for shipped/<model_type>.py, else the model's own, else a derived one; {module glob: style}.
            inputs: (args, kwargs) with which a plan is derived; None: sample inputs are made.

        Raises:
            PlanError: there is none; the text has the reason.
        """
        if isinstance(plan, Plan):
            return plan
        if not isinstance(plan, str):
            return cls(dict(plan))
        if plan != "auto":
            raise PlanError(f"Plan: plan must be 'auto' or {{module glob: style}}, got {plan!r}")
        return _of_ours(model) or _of_the_model(model) or _derived(model, inputs)

    def styles(self, model: nn.Module) -> dict[str, Style]:
        """Return the style of every module that has a rule: {module name: Style}.

        Raises:
            PlanError: a module without a rule, a rule without a module, or no such style; names them.
        """
        parsed = {glob: parse_style(text) for glob, text in self.rules.items()}
        modules = dict(model.named_modules())
        absent = {name for m in modules.values() if isinstance(m, Absent) for name in m.inner_names()}
        found: dict[str, Style] = {}
        used: set[str] = set()
        for name in [*modules, *(absent - modules.keys())]:
            for glob, style in parsed.items():
                if name and fnmatchcase(name, glob):
                    used.add(glob)
                    if name not in absent:  # what another pipeline stage holds is sharded there
                        found[name] = style
        for name, style in list(found.items()):
            style.refine(name, modules, found)
        if self.strict:
            missing = [name for name, module in modules.items() if is_weighty(module) and not _covered(name, found)]
            if missing:
                raise PlanError(f"Plan: no rule for {shorten(missing)} ({len(missing)} modules)")
            if len(used) < len(parsed):
                raise PlanError(f"Plan: no module for the rules {shorten(g for g in parsed if g not in used)}")
        return found


def refuse_stages(model: nn.Module, why: str) -> None:
    """Raise PlanError where a model has some pipeline stages only, and so cannot be run.

    Args:
        model: to be sharded.
        why: it has to be run.
    """
    if any(isinstance(module, Absent) for module in model.modules()):
        raise PlanError(
            f"parallelize: {type(model).__name__} has some of its pipeline stages only, and {why}: call parallelize "
            f"before take_stages"
        )


def is_weighty(module: nn.Module) -> bool:
    """Whether a strict plan must have a rule for the module."""
    return (is_linear(module) or isinstance(module, nn.Embedding)) and can_be_cut(module)


def _covered(name: str, found: dict[str, Style]) -> bool:
    """Whether the module has a rule, or is inside of one whose style covers its children."""
    parents = [name.rsplit(".", n)[0] for n in range(1, name.count(".") + 1)]
    return name in found or any(p in found and found[p].covers_children for p in parents)


def without_rule(modules: dict[str, nn.Module], styles: dict[str, Style]) -> list[str]:
    """Return the modules with weights beside column and row layers, or between them, that have no rule.

    Whether such a module gets sharded features, so that its gradients are partial, depends on the forward.
    """
    found = []
    for name, module in modules.items():
        inside = [f"{name}.{child}" if name else child for child, _ in module.named_children()]
        roles = {styles[child].role for child in inside if child in styles} & {"column", "row"}
        if len(roles) == 1:  # the other one may be in a child, as may be what is between them
            inside = [below for below, _ in module.named_modules(prefix=name) if below != name]
            roles |= {styles[below].role for below in inside if below in styles}
        if {"column", "row"} <= roles:
            found += [
                child
                for child in inside
                if not _covered(child, styles) and any(True for _ in modules[child].parameters(recurse=False))
            ]
    return list(dict.fromkeys(found))


def _of_ours(model: nn.Module) -> Plan | None:
    """The plan of plan/shipped/<model_type>.py: RULES, a dict, or a function of the model that gives one."""
    name = getattr(getattr(model, "config", None), "model_type", None)
    if not isinstance(name, str) or not name.replace("_", "").isalnum():
        return None
    where = f"tpkernels.plan.shipped.{name}"
    if importlib.util.find_spec(where) is None:
        return None
    rules = importlib.import_module(where).RULES
    heads = {head: "replicate" for head, module in model.named_children() if isinstance(module, nn.Linear)}
    found = heads | dict(rules(model) if callable(rules) else rules)  # heads: of classes, of answers
    return Plan(found | _of_the_vocabulary(model), f"tpkernels/plan/shipped/{name}.py")


def _of_the_model(model: nn.Module) -> Plan | None:
    """The plan that transformers ships with the model, in styles of ours.

    It has no rule for the table of ids.
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
        log.info("the plan that ships with %s has styles %s", type(model).__name__, shorten(sorted(set(unknown))))
        return None
    found = {glob: str(TRANSLATION[style]) for glob, style in rules.items() if TRANSLATION[style] is not None}
    plan = Plan(found | _of_the_vocabulary(model), "transformers", strict=False)
    modules, styles = dict(model.named_modules()), plan.styles(model)
    silent = without_rule(modules, styles) + patched_parents(modules, styles)
    silent += [n for n, style in styles.items() if isinstance(style, ExpertStyle) and not takes_choices(modules[n])]
    if silent:
        log.info("the plan that ships with %s is not enough for %s", type(model).__name__, shorten(silent))
        return None
    return plan


def _of_the_vocabulary(model: nn.Module) -> dict[str, str]:
    """Rules for the table of ids, and for the linear that computes logits."""
    names = {id(module): name for name, module in model.named_modules()}
    table, head = module_of(model, "get_input_embeddings"), module_of(model, "get_output_embeddings")
    rules = {names[id(table)]: "vocab"} if isinstance(table, nn.Embedding) and id(table) in names else {}
    return rules | ({names[id(head)]: "vocab_head"} if isinstance(head, nn.Linear) and id(head) in names else {})


def _derived(model: nn.Module, inputs: Call | None) -> Plan:
    refuse_stages(model, "its plan has to be derived from a run")
    try:
        return Plan(derive_plan(model, inputs=inputs), "its module tree")
    except DeriveError as error:
        raise PlanError(
            f"Plan: there is no plan for {type(model).__name__}, and none can be derived: {error}"
        ) from None
