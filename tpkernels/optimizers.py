"""Optimizers on cut parameters: those whose step depends on full tensors run on full tensors.

Adam treats every value by itself, so a step on a shard is the shard of a step. Muon (singular vectors), Adafactor
(means of rows and columns), LAMB and LARS (a norm of each tensor), Prodigy (sums over all parameters) do not, and their
steps on shards would be wrong without an error. So every optimizer that gets a cut parameter is checked: the step of a
class that is not in ELEMENTWISE, and its other methods (the two steps of SAM, `eval` of schedule-free ones), run on the
gathered parameters, gradients and states, the same on all ranks, and each rank keeps its shards. That costs each rank
the memory of the full model during the step. The result has the same bits for every number of ranks whose gradients
have.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, optim
from torch.compiler import is_compiling
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from tpkernels import ops
from tpkernels.comm.group import Group, find
from tpkernels.errors import RankMismatchError
from tpkernels.shard import ShardInfo, at_first_mark, mark_shard, shard_info

ELEMENTWISE: set[type[optim.Optimizer]] = {
    optim.SGD, optim.Adam, optim.AdamW, optim.Adadelta, optim.Adagrad, optim.Adamax, optim.ASGD, optim.NAdam,
    optim.RAdam, optim.RMSprop, optim.Rprop, optim.SparseAdam,
}  # fmt: skip
"""Classes whose step treats every value by itself. Add others of that kind: ELEMENTWISE.add(Lion)."""

CLOSURE_FIRST = {getattr(optim, name) for name in ("Adafactor", "Muon") if hasattr(optim, name)}
"""Others whose step calls its closure once, before anything else: on cut parameters, too."""

ABOUT_STATE = {"add_param_group", "load_state_dict", "state_dict", "zero_grad"}
"""Methods that a class may define and still treat every value by itself, beside those with double underscores."""

PLACES = "tpk_places"
"""The key of a state dict under which it says whose shards it holds."""

replaced: Any = WeakIdKeyDictionary()
"""The full parameters, of those that somebody still holds, whose place shards have taken in their model."""

_Cut = tuple[Tensor, ShardInfo, Group]
_wrapped: set[type[optim.Optimizer]] = set()


def needs_whole_tensors(kind: type[optim.Optimizer]) -> bool:
    """Whether the methods of a class run on gathered tensors: it is not in ELEMENTWISE, nor of torch.distributed.optim.

    A subclass of a class in ELEMENTWISE that defines methods of its own (a second step, a norm before the step) needs
    full tensors, too.

    Args:
        kind: a class of optimizers.
    """
    if kind.__module__.startswith("torch.distributed.optim"):
        return False
    steps = {inspect.unwrap(known.step) for known in ELEMENTWISE}
    return inspect.unwrap(kind.step) not in steps or any(name != "step" for name in _own_methods(kind))


def _own_methods(kind: type[optim.Optimizer]) -> set[str]:
    """Names of the methods that a class defines beside the classes of ELEMENTWISE and Optimizer itself."""
    names = set[str]()
    for base in kind.__mro__:
        if base is optim.Optimizer or base in ELEMENTWISE:
            break
        names |= {name for name, value in vars(base).items() if inspect.isfunction(value)}
    return {name for name in names - ABOUT_STATE if not name.startswith("__")}


@at_first_mark
def watch_optimizers() -> None:
    """Wrap, from now on, the class of every optimizer that gets a cut parameter and needs full tensors.

    And let `load_state_dict` of all optimizers take the state of a full model, as that of a cut model takes its values.
    """
    add = optim.Optimizer.add_param_group

    @functools.wraps(add)
    def add_param_group(self: optim.Optimizer, param_group: dict[str, Any]) -> None:
        add(self, param_group)
        if needs_whole_tensors(type(self)) and type(self) not in _wrapped and _cut_parameters(self):
            _wrap(type(self))

    optim.Optimizer.add_param_group = add_param_group  # type: ignore[method-assign]
    load = optim.Optimizer.load_state_dict

    @functools.wraps(load)
    def load_state_dict(self: optim.Optimizer, state_dict: dict[str, Any]) -> None:
        _refuse_another_rank(self, state_dict)
        load(self, state_dict)
        _take_shards(self)

    optim.Optimizer.load_state_dict = load_state_dict  # type: ignore[method-assign]
    state_of = optim.Optimizer.state_dict

    @functools.wraps(state_of)
    def state_dict(self: optim.Optimizer) -> dict[str, Any]:
        found = state_of(self)
        if any(places := _places(self)):
            found[PLACES] = places
        return found

    optim.Optimizer.state_dict = state_dict  # type: ignore[method-assign]
    register_optimizer_step_pre_hook(_refuse_replaced)


def _refuse_replaced(optimizer: optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Raise ValueError where an optimizer was made before its model was cut: it would step what no model holds."""
    if not len(replaced) or is_compiling():
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if stale := sum(p in replaced for p in parameters):
        raise ValueError(
            f"{type(optimizer).__name__}.step: {stale} of its {len(parameters)} parameters are full ones whose place "
            f"in the model shards have taken: make the optimizer after parallelize, of the parameters of then"
        )


def _places(optimizer: optim.Optimizer) -> list[tuple[int, int] | None]:
    """Of each parameter, in the order of a state dict, the rank and number of ranks of the shard; None where full."""
    infos = [shard_info(p) for group in optimizer.param_groups for p in group["params"]]
    return [None if info is None or info.world_size == 1 else (info.rank, info.world_size) for info in infos]


def _refuse_another_rank(optimizer: optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Raise ValueError where a state dict holds another rank's shards of the state."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    saved = zip(parameters, _places(optimizer), state_dict.get(PLACES, ()), strict=False)
    for number, (parameter, place, other) in enumerate(saved):
        state = state_dict["state"].get(number, {}).values()
        if (
            place
            and other
            and tuple(other) != place
            and any(getattr(v, "shape", None) == parameter.shape for v in state)
        ):
            raise ValueError(
                f"{type(optimizer).__name__}.load_state_dict: the state of parameter {number} is that of the shard of "
                f"rank {other[0]} of {other[1]}, expected that of rank {place[0]} of {place[1]} or of the full tensor: "
                f"save each rank's under a name of its own, or take tpkernels.checkpoint.save and load"
            )


def _take_shards(optimizer: optim.Optimizer) -> None:
    """Of state that was saved by an optimizer of the full model, keep this rank's shards; know shards as such."""
    for parameter, state in optimizer.state.items():
        if (info := shard_info(parameter)) is None or info.full_shape(parameter) == parameter.shape:
            continue
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == info.full_shape(parameter):
                state[name] = value = info.part(value).clone()
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                mark_part(value)


def _wrap(kind: type[optim.Optimizer]) -> None:
    """Make the methods of a class run on full tensors where its parameters are cut."""
    _wrapped.add(kind)
    for method in {"step"} | {name for name in _own_methods(kind) if not name.startswith("_")}:
        setattr(kind, method, _on_full_tensors(getattr(kind, method)))
    warnings.warn(
        f"{kind.__name__} is not known to treat every value by itself, so each step gathers the cut parameters and "
        f"their gradients on every rank, and the state that has their shape. If it does, add it before: "
        f"tpkernels.optimizers.ELEMENTWISE.add({kind.__name__})",
        stacklevel=5,
    )


def _on_full_tensors(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def on_full_tensors(self: optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        if not needs_whole_tensors(type(self)) or not (cut := _cut_parameters(self)):
            return method(self, *args, **kwargs)
        name = type(self).__name__
        given = [*args, *kwargs.values()]
        if method.__name__ == "step" and type(self) in CLOSURE_FIRST and len(given) == 1 and callable(given[0]):
            with torch.enable_grad():
                loss = given[0]()
            on_full_tensors(self)
            return loss
        if isinstance(self, optim.LBFGS) or any(map(_runs_model, given)):
            raise ValueError(
                f"{name}.{method.__name__}: with parameters that are cut over {cut[0][2].label!r} it runs on gathered "
                f"tensors, where a closure that runs the model cannot be called, nor the backward of a loss: take one "
                f"that needs neither or, if {name} treats every value by itself, add it once: "
                f"tpkernels.optimizers.ELEMENTWISE.add({name})"
            )
        _check_same_gradients(f"{name}.{method.__name__}", self, cut)
        with _full_tensors(self, cut):
            return method(self, *args, **kwargs)

    return on_full_tensors


def _runs_model(given: Any) -> bool:
    """Whether an argument is a closure, or a loss whose backward follows (LOMO)."""
    return callable(given) or (isinstance(given, Tensor) and given.grad_fn is not None)


def _cut_parameters(optimizer: optim.Optimizer) -> list[_Cut]:
    """The parameters that are cut over two ranks or more, in the order of the optimizer, and over which group."""
    found: dict[int, _Cut] = {}
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        info = shard_info(parameter)
        if info is None or info.world_size == 1:
            continue
        over = find(name=info.group_name)
        if over is None:
            raise ValueError(
                f"{type(optimizer).__name__}: the group {info.group_label!r} over which a parameter of shape "
                f"{list(parameter.shape)} is cut is closed; open it anew and give it to the model by set_group"
            )
        found[id(parameter)] = parameter, info, over
    return list(found.values())


def mark_part(state: Tensor) -> None:
    """Let a tensor of an optimizer's state, of this rank's shard of a parameter, be gathered for a step."""
    state.tpk_part = True  # type: ignore[attr-defined]


def _parts(optimizer: optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """The tensors of the state of a parameter of which this rank keeps its shard."""
    return {name: v for name, v in optimizer.state.get(parameter, {}).items() if getattr(v, "tpk_part", False)}


def _check_same_gradients(name: str, optimizer: optim.Optimizer, cut: list[_Cut]) -> None:
    """Raise on all ranks unless they step the same parameters, with the same state and gradients on all or on none."""
    for over in {group.name: group for *_, group in cut}.values():
        mine = [
            (info.full_shape(p), p.grad is not None, sorted(_parts(optimizer, p)))
            for p, info, group in cut if group is over
        ]  # fmt: skip
        digest = hashlib.sha256(repr(mine).encode()).digest()
        if len(set(over.all_gather_ints(int.from_bytes(digest[:6], "big")))) > 1:
            raise RankMismatchError(
                f"{name} on group {over.label!r} (rank {over.rank} of {over.world_size}): the ranks must step the "
                f"same cut parameters, each with a gradient on all ranks or on none, and with the same state, got "
                f"{len(mine)} parameters here, {sum(has for _, has, _ in mine)} with a gradient; nothing has changed"
            )


@contextmanager
@torch.no_grad()
def _full_tensors(optimizer: optim.Optimizer, cut: list[_Cut]) -> Iterator[None]:
    """Inside, parameters, gradients and state are the full tensors, without marks; after it this rank's shards again.

    So the functions that the method calls (a norm of gradients, another optimizer, its base class) find no shards. Of
    the state tensors of the full shape become shards; all others, such as Shampoo's preconditioners, stay full.
    """
    states = [{name: _gather(v, i, g) for name, v in _parts(optimizer, p).items()} for p, i, g in cut]
    full = [(_gather(p.detach(), i, g), None if p.grad is None else _gather(p.grad, i, g)) for p, i, g in cut]
    shards = [(p.data, p.grad) for p, *_ in cut]
    try:
        for (p, *_), (values, gradient), state in zip(cut, full, states, strict=True):
            vars(p).pop("tpk_shard", None)
            _put(p, values, gradient)
            if state:
                optimizer.state[p].update(state)
        yield
    finally:
        for (p, info, _), (values, gradient) in zip(cut, shards, strict=True):
            if p.shape == info.full_shape(values):
                values.copy_(info.part(p.data))
            _put(p, values, _gradient_after(p.grad, gradient, info))
            mark_shard(p, info)
            for name, value in optimizer.state.get(p, {}).items():
                if isinstance(value, Tensor) and value.shape == info.full_shape(values):
                    optimizer.state[p][name] = info.part(value).clone()
                    mark_part(optimizer.state[p][name])


def _put(parameter: Tensor, values: Tensor, gradient: Tensor | None) -> None:
    parameter.grad = None  # of the other shape
    parameter.data = values
    parameter.grad = gradient


def _gradient_after(full: Tensor | None, shard: Tensor | None, info: ShardInfo) -> Tensor | None:
    """This rank's shard of the gradient after a step, which may have cleared or changed it."""
    if full is None or shard is None:
        return None if full is None else info.part(full).clone()
    return shard.copy_(info.part(full)) if full.shape == info.full_shape(shard) else shard


def _gather(shard: Tensor, info: ShardInfo, over: Group) -> Tensor:
    """All-gather the full tensor."""
    if shard.layout != torch.strided:
        raise ValueError(f"an optimizer on full tensors needs dense gradients, got layout {shard.layout}")
    gathered = ops.all_gather(shard, info.dim, group=over)
    return info.assemble(torch.split(gathered, info.sizes, info.dim))
