"""Turn modules of a model into parallel layers in place: same object, same name, same state-dict keys.

`from_linear` and its like make a new layer. Here a module changes its class, to one that derives from the parallel
layer and from the class that it had (so that `isinstance(module, nn.Linear)` goes on holding), and its parameters to
this rank's shards. `in_features` and `out_features` of a converted linear are those that its forward takes and returns
on this rank, because adapters are made of these sizes; of a layer made by its constructor they are the full ones.
"""

from __future__ import annotations

import sys
from functools import cache
from types import FrameType
from typing import Any, cast

from torch import Tensor, nn
from torch.compiler import is_compiling

from tpkernels.comm.group import Group
from tpkernels.errors import PlanError
from tpkernels.optimizers import replaced

from .base import Cut, ParallelModule
from .functions import sum_gradient

BASES = (nn.Linear, nn.Embedding, nn.MultiheadAttention)
CALL = nn.Module._call_impl.__code__


class ConvertedModule(ParallelModule):
    """A module whose class was changed by `convert`."""

    _origin: tuple[type[nn.Module], type[ParallelModule], tuple[str, ...]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A class made at run time cannot be found by its name when a copy or a pickle is loaded.
        return _new, type(self)._origin, self.__dict__.copy()


def group_of(module: nn.Module, otherwise: Group) -> Group:
    """Return the group of the first converted module in a module, which `set_group` may have changed.

    Args:
        module: searched, with all modules in it.
        otherwise: returned where there is none.
    """
    return next((m.group for m in module.modules() if isinstance(m, ConvertedModule)), otherwise)


@cache
def converted_class(
    original: type[nn.Module], layer: type[ParallelModule], summed: tuple[str, ...] = ()
) -> type[ConvertedModule]:
    """Return the class of modules of class `original` that are converted to a parallel layer.

    The layer's forward takes the place of that of the classes in BASES and of Conv1D. A subclass of one of BASES with a
    forward of its own that calls super().forward keeps it.

    Args:
        original: the module's class.
        layer: the parallel layer.
        summed: names of parameters that become properties, so that any use of them in a forward gets gradients that
            are summed over the ranks. Elsewhere (to freeze one, to give it to an optimizer) they are the parameters.
    """
    base = next((base for base in BASES if issubclass(original, base)), original)
    bases: tuple[type, ...] = (layer, ConvertedModule, original)
    if original is not base:  # super().forward in it must find ours before that of its base
        bases = (original, type(layer.__name__, (layer, ConvertedModule, base), {"__module__": __name__}))
    own: dict[str, Any] = {"_origin": (original, layer, summed), "__module__": __name__, "__doc__": layer.__doc__}
    own |= {name: _summed(name) for name in summed}
    return cast("type[ConvertedModule]", type(layer.__name__.removesuffix("Linear") + original.__name__, bases, own))


def _summed(name: str) -> property:
    def get(module: ParallelModule) -> Tensor | None:
        parameter = module._parameters[name]
        if parameter is None or not (is_compiling() or _in_forward()):
            return parameter
        return sum_gradient(parameter, group=module.group)[0]

    return property(get)


def _in_forward() -> bool:
    """Whether the code that reads an attribute is called by the forward of a module."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code is not CALL and frame.f_code.co_name != "forward":
        frame = frame.f_back
    return frame is not None


def _new(original: type[nn.Module], layer: type[ParallelModule], summed: tuple[str, ...]) -> ConvertedModule:
    made: type[ConvertedModule] = converted_class(cast(Any, original), cast(Any, layer), summed)
    return made.__new__(made)


def _in_place_of(full: nn.Parameter, module: ConvertedModule, cut: Cut) -> nn.Parameter:
    """Return a parameter with this rank's shard, and with the attributes, hooks and gradient of the full one."""
    local = module._local(full, cut)
    vars(local).update(vars(full))
    if full.requires_grad:
        for hook in (full._backward_hooks or {}).values():
            local.register_hook(hook)  # type: ignore[no-untyped-call]
        for hook in (full._post_accumulate_grad_hooks or {}).values():
            local.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    if full.grad is not None:
        local.grad = module._info(cut).part(full.grad).clone()
    replaced[full] = True
    return local


class Tied:
    """The parameters of a model that several modules hold, so that they are one parameter after the conversion, too."""

    def __init__(self, model: nn.Module) -> None:
        found = [p for _, p in model.named_parameters(remove_duplicate=False)]
        seen, self.ids = set[int](), set[int]()
        for parameter in found:
            (self.ids if id(parameter) in seen else seen).add(id(parameter))
        self._done: dict[int, tuple[nn.Parameter, nn.Parameter, Cut | None]] = {}

    def check(self, modules: dict[str, nn.Module], cuts: dict[str, dict[str, Cut]]) -> None:
        """Check that each tied parameter is sharded alike in all modules that hold it. Nothing is changed.

        Args:
            modules: all of the model, by name.
            cuts: of their parameters, {module name: {name: Cut}}. Biases are not compared: `rejoin` handles them.

        Raises:
            PlanError: a parameter is not; names the modules.
        """
        holders: dict[int, dict[str, Cut | None]] = {}
        for name, module in modules.items():
            for own, parameter in module._parameters.items():
                if id(parameter) in self.ids:
                    holders.setdefault(id(parameter), {})[name] = cuts.get(name, {}).get(own) if own != "bias" else None
        for found in holders.values():
            if len(set(found.values())) > 1:
                without = [name for name, cut in found.items() if cut is None]
                reason = f", and {without[0]} has no rule that cuts it" if without else ""
                raise PlanError(f"Plan: {list(found)} share a parameter, so their styles must cut it alike{reason}")

    def local(self, module: ConvertedModule, name: str, cut: Cut | None) -> nn.Parameter:
        """Return the parameter that takes the place of the full one.

        Args:
            module: that holds it.
            name: of the parameter.
            cut: how it is sharded; None: it stays.

        Raises:
            PlanError: another module holds it and shards it in another way.
        """
        full = cast(nn.Parameter, module._parameters[name])
        if id(full) in self._done:
            _, local, other = self._done[id(full)]
            if cut != other:
                raise PlanError(f"Plan: {name} of {type(module).__name__} is tied to a parameter that is cut otherwise")
            return local
        local = full if cut is None else _in_place_of(full, module, cut)
        if id(full) in self.ids:  # kept, so that no other parameter can get its id
            self._done[id(full)] = (full, local, cut)
        return local

    def rejoin(self, model: nn.Module) -> None:
        """Give the shard to modules that were not converted and only hold the parameter (BERT's head, a bias)."""
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) in self._done:
                    module._parameters[name] = self._done[id(parameter)][1]


def convert(
    module: nn.Module,
    layer: type[ParallelModule],
    cuts: dict[str, Cut],
    group: Group,
    tied: Tied | None = None,
    *,
    summed: tuple[str, ...] = (),
    **attributes: Any,
) -> None:
    """Make a module a parallel layer in place.

    Args:
        module: the full one, the same on all ranks.
        layer: the class of the parallel layer.
        cuts: {name: Cut} of its parameters; those without one stay replicated.
        group: over which it is sharded.
        tied: of the whole model; None: the parameters are this rank's shards already.
        summed: names of parameters whose gradients are to be summed over the ranks.
        attributes: of the layer, where they differ from the defaults of its class.
    """
    new = cast(ConvertedModule, module)
    vars(module).pop("forward", None)  # the class's own, which a hook that was removed has left on the instance
    object.__setattr__(module, "__class__", converted_class(cast(Any, type(module)), cast(Any, layer), summed))
    new.group = group
    new._place = (group.rank, group.world_size)
    new._cuts = cuts
    for name, value in attributes.items():
        setattr(module, name, value)
    for name, parameter in list(module._parameters.items()):
        if parameter is not None and tied is not None:
            module._parameters[name] = tied.local(new, name, cuts.get(name))
    new._mark()


def change_layer(module: ConvertedModule, layer: type[ParallelModule]) -> None:
    """Change the parallel layer of a converted module to a subclass of it.

    Args:
        module: converted; its parameters and attributes stay.
        layer: the subclass.
    """
    original, _, summed = module._origin
    object.__setattr__(module, "__class__", converted_class(cast(Any, original), cast(Any, layer), summed))
