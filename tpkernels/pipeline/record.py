"""Runs of a whole model on sample inputs that show how it can be split: its layers, and what each of them needs.

The layers are the children of a ModuleList that the forward calls once each, in order, and of which each takes the very
tensor that the one before returned: between two of them one tensor is all that has to be sent, if nothing else that
depends on parameters reaches a later layer. That a second run shows, in which this tensor is detached in front of each
layer: the parameters that autograd still reaches are those that the layer itself reads, or what its other inputs were
computed from.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from tpkernels.errors import PlanError, shorten
from tpkernels.plan.derive.inputs import Call, candidates
from tpkernels.plan.derive.record import evaluating

Key = int | str
"""Where a layer takes its hidden states: the position or the name of the argument."""


@dataclass
class Record:
    """What the runs showed.

    Segments are numbered by time: 0 is what the forward computes ahead of the first layer, i + 1 is layer i, and
    len(layers) + 1 what it computes behind the last.

    Attributes:
        call: the inputs. device: "meta", or that of the model.
        stack: the name of the ModuleList.
        layers: the names of the layers.
        key: where a layer takes its hidden states.
        tuples: the length of the tuple that a layer returns, whose first element is the hidden states; 0: no tuple.
        reads: {parameter: the segments that depend on it}, by its first name.
        called: {module outside of the layers: the segments in which it was called}.
        flops: of the matrix products of each segment, forward.
        shapes: of the tensors that the model returned.
        tokens: elements of the integer inputs, or rows of the hidden states where there are none.
    """

    call: Call
    device: str
    stack: str
    layers: list[str]
    key: Key
    tuples: list[int]
    reads: dict[str, set[int]] = field(default_factory=dict)
    called: dict[str, set[int]] = field(default_factory=dict)
    flops: list[float] = field(default_factory=list)
    shapes: list[torch.Size] = field(default_factory=list)
    tokens: int = 0


def record(model: nn.Module, inputs: Call | None) -> Record:
    """Run the model; it is not changed.

    Raises:
        PlanError: it cannot be run on the inputs, or has no layers that can be divided; says why.
    """
    real = not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    problems: list[str] = []
    with evaluating(model), untouched(model):
        for device in ["meta", *(["real"] if real else [])]:
            for call in [inputs] if inputs is not None else candidates(model):
                try:
                    return _record(model, call, device)
                except PlanError:
                    raise
                except Exception as error:  # any that a forward raises for arguments that do not fit
                    problems.append(f"{type(error).__name__}: {error}".splitlines()[0])
    raise PlanError(
        f"split_by_layer: {type(model).__name__} could not be run on "
        f"{'the inputs given' if inputs is not None else 'sample inputs'} "
        f"({problems[0] if problems else 'none could be guessed'}); give inputs=(args, kwargs)"
    )


def _record(model: nn.Module, call: Call, device: str) -> Record:
    found = _find_layers(model, call, device)
    _trace(model, found)
    return found


@contextmanager
def _hooks() -> Iterator[Callable[[Any], None]]:
    handles: list[Any] = []
    try:
        yield handles.append
    finally:
        for handle in handles:
            handle.remove()


def stand_ins(model: nn.Module, device: str) -> dict[str, Tensor]:
    """The tensors that replace parameters, which require a gradient, and buffers in a run; tied ones are tied."""

    def replaced(t: Tensor, grad: bool) -> Tensor:
        other = torch.empty_like(t, device="meta") if device == "meta" else t.detach()
        return other.requires_grad_(grad and t.is_floating_point())

    values: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        state[name] = values.setdefault(id(p), replaced(p, True))
    for name, b in model.named_buffers(remove_duplicate=False):
        state[name] = values.setdefault(id(b), replaced(b, False))
    return state


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Take back what forward passes inside the context set on the modules of the model."""
    before = [(vars(module), dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for attributes, values in before:
            attributes.clear()
            attributes.update(values)


def run(model: nn.Module, call: Call, device: str, state: dict[str, Tensor]) -> Any:
    """Call the model with `stand_ins` in the place of its tensors."""
    place = "meta" if device == "meta" else next((str(t.device) for t in model.parameters()), "cpu")
    args, kwargs = tree_map(lambda x: x.to(place) if isinstance(x, Tensor) else x, call)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            return functional_call(model, state, args, kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _find_layers(model: nn.Module, call: Call, device: str) -> Record:
    stacks = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 1}
    calls: dict[str, list[tuple[int, dict[Key, Any], Any]]] = {name: [] for name in stacks}
    with _hooks() as keep:
        for name, stack in stacks.items():
            for index, layer in enumerate(stack):

                def note(
                    module: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name, index: int = index
                ) -> None:
                    calls[name].append((index, {**dict(enumerate(args)), **kwargs}, output))

                keep(layer.register_forward_hook(note, with_kwargs=True))
        run(model, call, device, stand_ins(model, device))
    found: dict[str, Key] = {}
    why: dict[str, str] = {}
    for name, seen in calls.items():
        if not seen:
            continue
        key, reason = _chain(seen, len(stacks[name]))
        if key is None:
            why[name] = reason
        else:
            found[name] = key
    outer = [name for name in found if not any(name.startswith(f"{other}.") for other in found if other != name)]
    if len(outer) != 1:
        got = f"it has {shorten(outer)}" if outer else "; ".join(f"{n}: {r}" for n, r in why.items()) or "it has none"
        raise PlanError(
            f"split_by_layer: {type(model).__name__} must have one list of layers of which each takes what the one "
            f"before returned: {got}"
        )
    name = outer[0]
    tuples = [len(output) if isinstance(output, tuple) else 0 for _, _, output in calls[name]]
    names = [f"{name}.{key}" for key in stacks[name]._modules]
    return Record(call, device, name, names, found[name], tuples)


def _hidden(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) and output else output


def _chain(seen: list[tuple[int, dict[Key, Any], Any]], count: int) -> tuple[Key | None, str]:
    """Where the layers take what the one before returned, or why they do not."""
    if [index for index, _, _ in seen] != list(range(count)):
        return None, f"its {count} layers are not called once each, in order"
    keys: list[Key] = [0]
    for (_, _, output), (index, arguments, _) in pairwise(seen):
        hidden = _hidden(output)
        keys = [key for key, value in arguments.items() if value is hidden and isinstance(hidden, Tensor)]
        if not keys:
            return None, f"layer {index} does not take what layer {index - 1} returned"
    if any(keys[0] not in arguments for _, arguments, _ in seen):
        return None, "its layers take their hidden states by different arguments"
    return keys[0], ""


def _trace(model: nn.Module, found: Record) -> None:
    """Fill reads, called, flops, shapes and tokens."""
    layers = [model.get_submodule(name) for name in found.layers]
    inside = {id(m) for layer in layers for m in layer.modules()}
    segment, reached = 0, list[tuple[int, set[int]]]()
    counter = FlopCounterMode(display=False)
    totals: list[float] = []
    hidden_rows = 0

    def enter(module: nn.Module, args: Any, kwargs: Any, index: int) -> Any:
        nonlocal segment, hidden_rows
        args = list(args)
        into: Any = args if isinstance(found.key, int) else kwargs
        hidden = into[found.key]
        hidden_rows = hidden_rows or hidden[..., 0].numel()
        reached.append((segment, _leaves(hidden)))
        totals.append(counter.get_total_flops())
        into[found.key] = hidden.detach().requires_grad_()
        segment = index + 1
        return tuple(args), kwargs

    def leave(module: nn.Module, args: Any, output: Any, index: int) -> Any:
        nonlocal segment
        hidden = _hidden(output)
        reached.append((segment, _leaves(hidden)))
        totals.append(counter.get_total_flops())
        cut = hidden.detach().requires_grad_()
        segment = len(layers) + 1 if index + 1 == len(layers) else 0
        return cut if not isinstance(output, tuple) else (cut, *output[1:])

    def note(module: nn.Module, args: Any, name: str) -> None:
        found.called.setdefault(name, set()).add(segment)

    with _hooks() as keep:
        for name, module in model.named_modules():
            if id(module) not in inside:
                keep(module.register_forward_pre_hook(lambda m, a, name=name: note(m, a, name)))
        for index, layer in enumerate(layers):
            keep(layer.register_forward_pre_hook(lambda m, a, k, index=index: enter(m, a, k, index), with_kwargs=True))
            keep(layer.register_forward_hook(lambda m, a, o, index=index: leave(m, a, o, index)))
        state = stand_ins(model, found.device)
        with counter:
            output = run(model, found.call, found.device, state)
    kept = {id(state[name]): name for name, _ in model.named_parameters()}
    tensors = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
    found.shapes = [t.shape for t in tensors]
    for t in tensors:
        reached.append((len(layers) + 1, _leaves(t)))
    marks = [0.0, *totals, float(counter.get_total_flops())]
    # enter and leave alternate: [0, enter 0, leave 0, enter 1, ...]; what lies between two layers belongs to none.
    found.flops = [marks[1] - marks[0]]
    found.flops += [marks[2 * i + 2] - marks[2 * i + 1] for i in range(len(layers))]
    found.flops += [marks[-1] - marks[-2]]
    for where, leaves in reached:
        for leaf in leaves:
            if leaf in kept:
                found.reads.setdefault(kept[leaf], set()).add(where)
    ids = [t for t in tree_leaves(found.call) if isinstance(t, Tensor) and not t.is_floating_point()]
    found.tokens = ids[0].numel() if ids else hidden_rows


def _leaves(tensor: Any) -> set[int]:
    """The ids of the leaves that autograd reaches from a tensor."""
    if not isinstance(tensor, Tensor) or not tensor.requires_grad:
        return set()
    if tensor.grad_fn is None:
        return {id(tensor)}
    found, seen = set[int](), set[Any]()
    queue: list[Any] = [tensor.grad_fn]
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        queue += [following for following, _ in node.next_functions]
    return found
