"""split_by_layer: which layers, and which modules around them, each pipeline stage has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tpkernels.errors import PlanError, shorten
from tpkernels.pipeline.balance import balanced
from tpkernels.pipeline.record import Record, record, run, stand_ins, untouched
from tpkernels.pipeline.stages import HeldStages, Split, Stage
from tpkernels.plan.derive.inputs import Call, check_inputs
from tpkernels.plan.derive.record import evaluating

TOKENS = 1024  # of a micro-batch for which costs are modelled where no inputs are given
BYTE = 10.0  # operations of a product that take as long as a byte of memory traffic
TABLE_BYTES = 8.0  # of traffic for each value of a table of ids: its dense gradient is filled and added up
LOSS_BYTES = 24.0  # for each value that the last stage returns: softmax and loss, forward and backward


def split_by_layer(
    model: nn.Module, num_stages: int, balance: str | Sequence[int] = "cost", *, inputs: Call | None = None
) -> Split:
    """Divide the layers of a model over the stages of a pipeline. The model is not changed.

    The layers are found by runs of the model on sample inputs: see tpkernels/pipeline/record.py. Stage 0 has what is
    computed ahead of them (embeddings), the last stage what is computed behind (norm, head, loss). Every stage is then
    run on the sample inputs, so that what cannot be split is refused here.

    Args:
        model: the whole one, before `parallelize`; parameters may be on the meta device.
        num_stages: at most the number of layers.
        balance: "cost" makes the modelled time of the slowest stage minimal: matrix products, the loss, and the
            gradients of tables of ids. "memory" does so for the bytes of the parameters. A list has the number of
            layers of each stage.
        inputs: (args, kwargs) of the model; costs are then those of these inputs. None: sample inputs are made, and
            costs are those of 1,024 tokens.

    Returns:
        the split: what `take_stages` needs.

    Raises:
        PlanError: the model has no layers in a row, a layer depends on another one by more than its hidden states, or
            there are fewer layers than stages; says which.
        ValueError: num_stages, balance or inputs are not of their kind.
    """
    if isinstance(num_stages, bool) or not isinstance(num_stages, int) or num_stages < 1:
        raise ValueError(f"split_by_layer: num_stages must be an int of 1 or more, got {num_stages!r}")
    check_inputs(inputs)
    if getattr(model, "tpk_plan", None) is not None or getattr(model, "tpk_stages", None) is not None:
        raise PlanError("split_by_layer: model must be whole, got one that is cut already: split first, then cut")
    found = record(model, inputs)
    count = len(found.layers)
    if num_stages > count:
        raise PlanError(
            f"split_by_layer: {num_stages} stages need {num_stages} layers or more, {found.stack} has {count}"
        )
    scale = 1.0 if inputs is not None else TOKENS / found.tokens
    split = _split(model, found, _sizes(model, found, num_stages, balance, scale), scale)
    _check_stages(model, split, found)
    return split


def _sizes(model: nn.Module, found: Record, num_stages: int, balance: str | Sequence[int], scale: float) -> list[int]:
    count = len(found.layers)
    if not isinstance(balance, str):
        sizes = list(balance)
        if len(sizes) != num_stages or sum(sizes) != count or not all(isinstance(n, int) and n > 0 for n in sizes):
            raise ValueError(
                f"split_by_layer: balance must have {num_stages} numbers of 1 or more whose sum is {count}, got {sizes}"
            )
        return sizes
    if balance not in ("cost", "memory"):
        raise ValueError(f"split_by_layer: balance must be 'cost', 'memory' or a list of layers, got {balance!r}")
    costs = _costs(model, found, scale) if balance == "cost" else [float(n) for n in _nbytes(model, found)]
    return balanced(costs[1:-1], costs[0], costs[-1], num_stages)


def _costs(model: nn.Module, found: Record, scale: float) -> list[float]:
    """Of each segment, in operations: three passes of its products, and its memory traffic."""
    costs = [3 * flops * scale for flops in found.flops]
    tables = {id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding)}
    costs[0] += BYTE * TABLE_BYTES * sum(tables.values())
    if costs[-1] > 0:  # the logits of a head; a model without one returns its hidden states
        costs[-1] += BYTE * LOSS_BYTES * max(math.prod(shape) for shape in found.shapes) * scale
    return costs


def _nbytes(model: nn.Module, found: Record) -> list[int]:
    """Bytes of the parameters of each segment. One that none reads counts where it is."""
    total = [0] * (len(found.layers) + 2)
    inside = {name: i + 1 for i, layer in enumerate(found.layers) for name in _names_in(model, layer)}
    for name, parameter in model.named_parameters():
        where = found.reads.get(name) or {inside.get(name, len(total) - 1)}
        for segment in where:
            total[segment] += parameter.numel() * parameter.element_size()
    return total


def _names_in(model: nn.Module, module: str) -> list[str]:
    return [f"{module}.{name}" for name, _ in model.get_submodule(module).named_parameters(remove_duplicate=False)]


def _split(model: nn.Module, found: Record, sizes: list[int], scale: float) -> Split:
    stops = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    layers = [range(stop - size, stop) for stop, size in zip(stops, sizes, strict=True)]
    stage_of = {layer + 1: stage for stage, r in enumerate(layers) for layer in r}
    stage_of |= {0: 0, len(found.layers) + 1: len(sizes) - 1}
    names = _all_names(model)
    needed = _needed(model, found, stage_of, names)
    kept = _subtrees(model, found, needed, set(stage_of.values()))
    tied, nbytes = {}, [0] * len(sizes)
    for first, every in names.items():
        where = {stage: name for name in reversed(every) for stage in _stages_with(name, found, kept, stage_of)}
        if len(where) > 1:
            tied[first] = dict(sorted(where.items()))
        parameter = model.get_parameter(first)
        for stage in where:
            nbytes[stage] += parameter.numel() * parameter.element_size()
    costs = _costs(model, found, scale)
    stages = []
    for index, own in enumerate(layers):
        segments = [0] * (index == 0) + [i + 1 for i in own] + [len(costs) - 1] * (index == len(sizes) - 1)
        modules = tuple(name for name, stages_of in kept.items() if index in stages_of)
        stages.append(Stage(index, own, modules, sum(costs[s] for s in segments), nbytes[index]))
    return Split(tuple(stages), tuple(found.layers), kept, tied, found.key, tuple(found.tuples))


def _all_names(model: nn.Module) -> dict[str, list[str]]:
    """All names of each parameter, by the first."""
    first = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, list[str]] = {name: [] for name in first.values()}
    for name, p in model.named_parameters(remove_duplicate=False):
        found[first[id(p)]].append(name)
    return found


def _needed(
    model: nn.Module, found: Record, stage_of: dict[int, int], names: dict[str, list[str]]
) -> dict[str, set[int]]:
    """The stages that need each module outside of the layers which has parameters of its own."""
    needed: dict[str, set[int]] = {}
    for first, every in names.items():
        holders = {name: name.rpartition(".")[0] for name in every}
        outside = [m for m in holders.values() if not _layer_of(m, found)]
        inside = {_layer_of(m, found) for m in holders.values()} - {0}
        for segment in found.reads.get(first, ()):
            if segment in inside:
                continue
            here = [m for m in outside if segment in found.called.get(m, ())]
            here = here or [m for m in outside if 0 in found.called.get(m, ())] or outside
            if not here:
                raise PlanError(
                    f"split_by_layer: {_segment(segment, found)} depends on {first}, which belongs to "
                    f"{found.layers[min(inside) - 1]}, by more than its hidden states"
                )
            for module in here:
                needed.setdefault(module, set()).add(stage_of[segment])
        if first not in found.reads:
            for module in outside:
                # One that runs ahead of the layers without a gradient may have made what every layer takes.
                early = 0 in found.called.get(module, ())
                stages = set(stage_of.values()) if early else {_place(model, module, found, stage_of)}
                needed.setdefault(module, set()).update(stages)
    return needed


def _layer_of(module: str, found: Record) -> int:
    """The segment of the layer that a module is in; 0: it is in none."""
    return next((i + 1 for i, n in enumerate(found.layers) if module == n or module.startswith(f"{n}.")), 0)


def _segment(segment: int, found: Record) -> str:
    if segment == 0:
        return "what is computed ahead of the layers"
    return found.layers[segment - 1] if segment <= len(found.layers) else "what is computed behind the layers"


def _place(model: nn.Module, module: str, found: Record, stage_of: dict[int, int]) -> int:
    """The stage of a module that the run did not read: by its place among the modules, before or behind the layers."""
    order = [name for name, _ in model.named_modules()]
    return stage_of[0] if order.index(module) < order.index(found.layers[0]) else stage_of[len(found.layers) + 1]


def _subtrees(
    model: nn.Module, found: Record, needed: dict[str, set[int]], every: set[int]
) -> dict[str, frozenset[int]]:
    """The largest modules outside of the layers whose parts are needed by the same stages: {name: stages}."""
    result: dict[str, frozenset[int]] = {}

    def visit(name: str, module: nn.Module) -> None:
        own = [n for n in needed if n == name or n.startswith(f"{name}." if name else "")]
        on_the_way = any(layer.startswith(f"{name}." if name else "") for layer in found.layers)
        if not on_the_way and own and len({frozenset(needed[n]) for n in own}) == 1:
            result[name] = frozenset(needed[own[0]])
            return
        stages = needed.get(name)
        if stages is not None and stages != every:
            names = [n for n, _ in module.named_parameters(recurse=False)]
            raise PlanError(
                f"split_by_layer: parameters {shorten(names)} of {name or type(model).__name__} itself, which holds "
                f"the layers or parts of several stages, are read on stages {sorted(stages)} alone"
            )
        if name != found.stack:
            for key, child in module.named_children():
                visit(f"{name}.{key}" if name else key, child)

    visit("", model)
    return result


def _stages_with(name: str, found: Record, kept: dict[str, frozenset[int]], stage_of: dict[int, int]) -> set[int]:
    """The stages that hold a parameter under this name."""
    segment = _layer_of(name.rpartition(".")[0], found)
    if segment:
        return {stage_of[segment]}
    inside = next((stages for module, stages in kept.items() if name.startswith(f"{module}.")), None)
    return set(inside if inside is not None else range(max(stage_of.values()) + 1))


def _check_stages(model: nn.Module, split: Split, found: Record) -> None:
    """Run one stage after the other on the sample inputs.

    Raises:
        PlanError: a stage does not run, or returns other shapes than the model.
    """
    views = HeldStages(model, split, ())
    state = stand_ins(model, found.device)
    output: Any = None

    def forward() -> Any:
        there = {name for named in (model.named_parameters, model.named_buffers) for name, _ in named()}
        return run(model, found.call, found.device, {name: t for name, t in state.items() if name in there})

    with evaluating(model), untouched(model):
        for stage in split.stages:
            try:
                output = views.call(stage.index, output, forward)
            except Exception as error:  # whatever a forward does with parts that are not there
                raise PlanError(
                    f"split_by_layer: stage {stage.index} of {type(model).__name__} does not run by itself "
                    f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
                ) from error
    shapes = [t.shape for t in tree_leaves(output) if isinstance(t, Tensor)]
    if shapes != found.shapes:
        raise PlanError(
            f"split_by_layer: the stages of {type(model).__name__} return shapes {[list(s) for s in shapes]}, the "
            f"whole model {[list(s) for s in found.shapes]}"
        )
