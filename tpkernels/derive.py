"""A plan for a model that nobody wrote one for, from what its features do in one run.

`derive_plan` runs the model once on meta tensors and follows every output feature of every linear (derive_flow.py).
Linears whose features meet only in whole units, in the order of the units, and that end in the inputs of other linears
and nowhere else, are cut: the first ones along their outputs, the others along their inputs. Then the model runs again
as each of two ranks would run it, on tensors of their sizes, and every feature must go the way that it went before
(derive_run.py). What fails one of the two stays replicated, which is always right.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tpkernels.derive_attention import attention_left_whole, find_attention
from tpkernels.derive_groups import (
    LinearGroup,
    choose,
    common_dropouts,
    find_groups,
    refuse_undroppable,
    refuse_unsummable,
)
from tpkernels.derive_inputs import Call
from tpkernels.derive_names import generalise
from tpkernels.derive_run import Mismatch, Run, check, evaluating, first_that_runs
from tpkernels.plan_apply import can_be_cut, is_conv1d, is_linear
from tpkernels.plan_attention import STYLE
from tpkernels.plan_styles import PlanError, parse_style

RANKS = 2  # how many the second run pretends to be


class DeriveError(ValueError):
    """No plan can be derived for a model; the text names the module and says why."""


@dataclass(frozen=True)
class Derived:
    """A derived plan, and what it leaves whole.

    Attributes:
        plan: {module glob: style}.
        whole: (linears, why they are not cut), in the order of the run; those that it did not reach last.
    """

    plan: dict[str, str]
    whole: list[tuple[list[str], str]]


def derive_plan(model: nn.Module, *, inputs: Call | None = None) -> dict[str, str]:
    """Find out how a model can be cut, by running it once. See `derive`, of whose result this is the plan."""
    return derive(model, inputs=inputs).plan


def derive(model: nn.Module, *, inputs: Call | None = None) -> Derived:
    """Find out how a model can be cut, by running it once.

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
        runs = _runs(model, sources, attention, inputs)
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
    for name, why in attention_left_whole(attention, owners, direct, RANKS).items():
        groups.append(LinearGroup([name], reason=why))
        del attention[name]
    styles = {n: s for n, s in styles.items() if n not in {f"{name}.out_proj" for name in attention}}
    styles |= dict.fromkeys(attention, STYLE)
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
    """Take groups away, or tell their modules how many heads they have, until every rank computes its part."""
    whole = [*sources, *(n for n, m in model.named_modules() if n not in sources and is_linear(m) and can_be_cut(m))]
    while True:
        cut = choose(groups)
        styles = {name: style for group in cut for name, style in group.styles.items()}
        styles |= _vocab(model, sources, {*styles, *direct})
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
    """The groups whose linears lie nearest to a module, the nearest first; all of them when nothing is known."""

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


# ---- vocabularies --------------------------------------------------------------------------------------------------


def _vocab(model: nn.Module, sources: dict[str, nn.Module], taken: set[str]) -> dict[str, str]:
    """Cut the tables of words along the words, and with them the layers that make logits of as many."""
    tables = [t for t in _word_tables(model, sources) if isinstance(t, nn.Embedding)]
    tables = [t for t in tables if t.max_norm is None and not t.sparse and not t.scale_grad_by_freq]
    styles: dict[str, str] = {}
    for table in tables:
        tied = {n: m for n, m in sources.items() if getattr(m, "weight", None) is table.weight}
        heads = {
            n: m
            for n, m in sources.items()
            if isinstance(m, nn.Linear)
            and m.out_features == table.num_embeddings
            and n not in tied
            and _is_head(model, m)
        }
        if not any(n in taken for n in tied) and _all_held(model, table.weight, tied):
            styles |= {n: "vocab" if isinstance(m, nn.Embedding) else "vocab_head" for n, m in tied.items()}
            styles |= {n: "vocab_head" for n in heads if n not in taken}
    return styles


def _word_tables(model: nn.Module, sources: dict[str, nn.Module]) -> list[nn.Module]:
    """The input embeddings that models of transformers name; of other models the embedding with the most rows."""
    found = []
    for module in model.modules():
        if hasattr(module, "get_input_embeddings"):
            with suppress(NotImplementedError, AttributeError):
                get: Any = module.get_input_embeddings
                found.append(get())
    tables = [m for m in sources.values() if isinstance(m, nn.Embedding)]
    if not hasattr(model, "get_input_embeddings") and tables:
        found.append(max(tables, key=lambda m: m.num_embeddings))
    return list(dict.fromkeys(found))


def _is_head(model: nn.Module, module: nn.Module) -> bool:
    getter: Any = getattr(model, "get_output_embeddings", None)
    with suppress(NotImplementedError, AttributeError):
        return getter is None or bool(getter() is module)
    return False


def _all_held(model: nn.Module, weight: Tensor, tied: dict[str, nn.Module]) -> bool:
    """Whether the modules `tied` are all that hold this parameter."""
    holders = {n for n, m in model.named_modules() if any(p is weight for p in m.parameters(recurse=False))}
    return holders <= set(tied)


# ---- the run -------------------------------------------------------------------------------------------------------


def _runs(
    model: nn.Module, sources: dict[str, nn.Module], attention: dict[str, nn.Module], inputs: Call | None
) -> list[Run]:
    """Run the model, and then those models in it that it did not call (a vision tower without an image)."""
    first: Exception | None = None
    runs: list[Run] = []
    watched = [*sources, *attention]
    for name, part in [("", model), *_models_in(model)]:
        own = {s for s in watched if s.startswith(f"{name}." if name else "")}
        if not own or any(own & set(run.flow.called) for run in runs):
            continue
        run, error = first_that_runs(
            model, part, sources, attention, [inputs] if inputs is not None and not name else None
        )
        runs += [run] if run else []
        first = first or error
    if not runs:
        which = "sample inputs" if inputs is None else "the inputs given"
        raise DeriveError(
            f"derive_plan: {type(model).__name__} could not be run on {which} "
            f"({f'{type(first).__name__}: {first}' if first else 'none could be guessed'}); "
            f"give inputs=(args, kwargs) or a plan"
        ) from first
    return runs


def _models_in(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if name and hasattr(module, "config") and hasattr(module, "main_input_name"):
            yield name, module
