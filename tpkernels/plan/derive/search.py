"""Derive a plan for a model from the paths of its features in one run.

`derive_plan` runs the model once on meta tensors and follows every output feature of every linear (flow.py).
Linears whose features meet only in whole units, in the order of the units, and that end in the inputs of other linears
and nowhere else, are cut: the first ones along their outputs, the others along their inputs. Then the model runs again
as each of two ranks would run it, on tensors of their sizes, and every feature must go the way that it went before
(check.py). What fails one of the two stays replicated, which is always right.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from tpkernels.errors import DeriveError, PlanError
from tpkernels.plan.derive.attention import find_attention, replicated_attention
from tpkernels.plan.derive.check import check
from tpkernels.plan.derive.groups import (
    LinearGroup,
    choose,
    common_dropouts,
    find_groups,
    refuse_undroppable,
    refuse_unsummable,
)
from tpkernels.plan.derive.inputs import Call
from tpkernels.plan.derive.names import generalise
from tpkernels.plan.derive.record import Mismatch, Run, evaluating, record_runs
from tpkernels.plan.derive.vocabulary import vocabulary_styles
from tpkernels.plan.styles.attention import MultiheadAttentionStyle
from tpkernels.plan.styles.base import can_be_cut, is_conv1d, is_linear
from tpkernels.plan.styles.style import parse_style

RANKS = 2  # how many the second run pretends to be


@dataclass(frozen=True)
class Derived:
    """A derived plan, and the linears that it replicates.

    Attributes:
        plan: {module glob: style}.
        whole: (linears, the reason why they are replicated), in the order of the run; those that it did not reach last.
    """

    plan: dict[str, str]
    whole: list[tuple[list[str], str]]


def derive_plan(model: nn.Module, *, inputs: Call | None = None) -> dict[str, str]:
    """Derive the plan of a model by a run. See `derive`.

    Args:
        model, inputs: as in `derive`.

    Raises:
        DeriveError: as in `derive`.
    """
    return derive(model, inputs=inputs).plan


def derive(model: nn.Module, *, inputs: Call | None = None) -> Derived:
    """Derive a plan of a model by a run.

    Args:
        model: on any device, also meta. Neither its parameters nor its mode are changed; hooks are put on it for the
            run and taken off again.
        inputs: (args, kwargs) with which to call it. None: sample inputs are made from the config of a transformers
            model, or guessed from the arguments that a module takes.

    Returns:
        a plan with a style for every linear, Conv1D and embedding of the model and for the small modules whose
        parameters meet cut features, and the reasons for what stays whole.

    Raises:
        DeriveError: the model could not be run, or nothing in it can be cut; the text says which module is in the way.
    """
    attention = find_attention(model)
    inside = {f"{name}.out_proj" for name in attention}
    sources = {n: module for n, module in model.named_modules() if is_source(module) and n not in inside}
    if not sources and not attention:
        raise DeriveError(f"derive_plan: {type(model).__name__} has no linear, Conv1D, embedding or attention to cut")
    owners = _owners(model)
    with evaluating(model):
        runs = record_runs(model, sources, attention, inputs)
        direct = {
            name: f"its {parameter.rpartition('.')[2]} is used outside of its forward"
            for run in runs
            for parameter in run.flow.used
            for name in owners[parameter]
        }
        groups = [group for run in runs for group in find_groups(run.flow, sources, direct)]
        refuse_unsummable(model, groups, owners, sources)
        refuse_undroppable(model, groups)
        styles = _checked(model, sources, owners, groups, runs, direct)
        styles |= common_dropouts(model, groups)
    called = {name for run in runs for name in run.flow.called}
    direct |= {name: "the run did not reach it" for name in attention if name not in called}
    for name, why in replicated_attention(attention, owners, direct, RANKS).items():
        groups.append(LinearGroup([name], reason=why))
        del attention[name]
    styles = {n: s for n, s in styles.items() if n not in {f"{name}.out_proj" for name in attention}}
    styles |= dict.fromkeys(attention, MultiheadAttentionStyle.name)
    if not any(style != "replicate" for style in styles.values()):
        raise DeriveError(f"derive_plan: nothing in {type(model).__name__} can be cut:\n{_text(_reasons(groups))}")
    names = [name for name, _ in model.named_modules()]
    plan = generalise({name: styles[name] for name in names if name in styles}, names)
    unknown = [name for name in sources if name not in called and styles.get(name) == "replicate"]
    return Derived(plan, _reasons(groups) + [(unknown, "the run did not reach them")] * bool(unknown))


def _checked(
    model: nn.Module,
    sources: dict[str, nn.Module],
    owners: dict[str, list[str]],
    groups: list[LinearGroup],
    runs: list[Run],
    direct: dict[str, str],
) -> dict[str, str]:
    """Remove groups, or add counts to the modules around them, until every rank computes its part."""
    whole = [*sources, *(n for n, m in model.named_modules() if n not in sources and is_linear(m) and can_be_cut(m))]
    while True:
        cut = choose(groups)
        styles = {name: style for group in cut for name, style in group.styles.items()}
        styles |= vocabulary_styles(model, sources, {*styles, *direct})
        styles |= {owner: "sum_grad" for group in cut for p in group.summed for owner in owners[p]}
        styles |= {name: "replicate" for name in whole if name not in styles}
        parsed = {name: parse_style(style) for name, style in styles.items()}
        try:
            for run in runs:
                for rank in range(RANKS):
                    check(model, run, parsed, RANKS, rank)
            return styles
        except PlanError as error:
            suspects = [g for g in cut if any(name in str(error) for name in (*g.sources, *g.parents()))] or cut
            why = str(error)
        except Mismatch as error:
            suspects, why = _near(cut, error.where), f"cut, it would go wrong in {error.where or 'the model'}: {error}"
        if not suspects:
            raise DeriveError(
                f"derive_plan: a cut {type(model).__name__} would go wrong, and no linear is to blame: {why}"
            )
        pattern = suspects[0].pattern()
        for group in (g for g in cut if g.pattern() == pattern):
            if not group.next_counts(model):
                group.refuse(why)


def _near(groups: list[LinearGroup], where: str) -> list[LinearGroup]:
    """All groups, those whose linears are nearest to a module first."""

    def shared(group: LinearGroup) -> int:
        names = [name.split(".") for name in (*group.sources, *group.sinks)]
        place = where.split(".")
        return max(
            next((i for i, (a, b) in enumerate(zip(n, place, strict=False)) if a != b), min(len(n), len(place)))
            for n in names
        )

    return sorted(groups, key=shared, reverse=True)


def is_source(module: nn.Module) -> bool:
    """Whether a module is a linear, a Conv1D (GPT-2) or an embedding, and its forward that or one around it."""
    if isinstance(module, nn.Embedding):
        return can_be_cut(module)
    return is_conv1d(module) or (isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward)


def _reasons(groups: list[LinearGroup]) -> list[tuple[list[str], str]]:
    return [(group.sources, group.reason) for group in groups if group.reason]


def _text(reasons: list[tuple[list[str], str]]) -> str:
    lines = [f"  {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}: {reason}" for names, reason in reasons]
    return "\n".join(lines[:20])


def _owners(model: nn.Module) -> dict[str, list[str]]:
    """Return for every parameter the modules that hold it: several, where it is tied."""
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), []).append(name)
    return {name: holders[id(parameter)] for name, parameter in model.named_parameters()}
