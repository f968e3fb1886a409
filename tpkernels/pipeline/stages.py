"""The stages of a model: what each has, and how one of them is run by the model's own forward.

In a run of stage k the layers ahead of its own return the hidden states that the stage received, whatever they are
given, and what the forward computes before is computed with `Absent` modules in the place of those that the stage does
not need. The first layer behind its own ends the forward. So every stage computes masks, positions and tables by the
code of the model, from the inputs of the whole model, and class, names and hooks are those of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tpkernels.errors import PlanError
from tpkernels.layers.absent import Absent
from tpkernels.layers.reference import Ref
from tpkernels.pipeline.record import Key


@dataclass(frozen=True)
class Stage:
    """One stage of a split.

    Attributes:
        index: of all stages.
        layers: the numbers of its layers.
        modules: the modules with parameters outside of the layers that it needs.
        cost: modelled operations of a forward and a backward pass.
        nbytes: of its parameters.
    """

    index: int
    layers: range
    modules: tuple[str, ...]
    cost: float
    nbytes: int


@dataclass(frozen=True)
class Split:
    """How a model is split into stages: names only, so that it holds for a sharded copy of the model, too.

    Attributes:
        stages: in order.
        layers: the names of all layers.
        kept: the modules outside of the layers that are moved as one, by name: {name: the stages that need it}.
        tied: the parameters that several stages have a copy of: {first name: {stage: its name there}}.
        key: where a layer takes its hidden states.
        tuples: the length of the tuple that each layer returns; 0: no tuple.
    """

    stages: tuple[Stage, ...]
    layers: tuple[str, ...]
    kept: dict[str, frozenset[int]]
    tied: dict[str, dict[int, str]]
    key: Key
    tuples: tuple[int, ...]

    def __str__(self) -> str:
        total = sum(s.cost for s in self.stages) or 1.0
        parts = [
            f"stage {s.index}: layers {s.layers.start} to {s.layers.stop - 1}"
            f"{''.join(f', {name}' for name in s.modules)} ({s.cost / total:.0%} of the cost, "
            f"{s.nbytes / 2**20:.1f} MiB)"
            for s in self.stages
        ]
        return "; ".join(parts)


class _StageEnd(Exception):
    """Ends the forward of a model behind the last layer of a stage; has its hidden states."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class _Delegate(nn.Module):
    """In the place of a layer during a run; has all attributes of the layer, which the forward may read."""

    def __init__(self, layer: nn.Module, key: Key) -> None:
        super().__init__()
        self._layer, self.key = Ref(layer), key

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_layer":
                raise
            return getattr(self._layer.target, name)


class _Skipped(_Delegate):
    """A layer ahead of the stage's own: returns the hidden states that the stage received."""

    received: Tensor | None = None
    was_called = False

    def __init__(self, layer: nn.Module, key: Key, length: int) -> None:
        super().__init__(layer, key)
        self.length = length

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.was_called = True
        return self.received if self.length == 0 else (self.received, *[None] * (self.length - 1))


class _End(_Delegate):
    """The first layer behind the stage's own."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise _StageEnd(args[self.key] if isinstance(self.key, int) else kwargs[self.key])


class HeldStages:
    """The stages of a model that this process holds; the attribute `tpk_stages` of the model.

    Attributes:
        split: of the whole model.
        held: the numbers of the stages.
    """

    def __init__(self, model: nn.Module, split: Split, held: Iterable[int]) -> None:
        self._model = Ref(model)
        self.split, self.held = split, tuple(held)
        self._parts: dict[int, list[tuple[nn.Module, str, nn.Module]]] = {}

    @property
    def model(self) -> nn.Module:
        """The model, of which this process has these stages."""
        return self._model.target

    def parameters_of(self, stage: int) -> dict[str, nn.Parameter]:
        """The parameters of a stage that is held, by their first names there."""
        inside = [self.split.layers[i] for i in self.split.stages[stage].layers]
        foreign = {name for name, stages in self.split.kept.items() if stage not in stages}
        others = (set(self.split.layers) - set(inside)) | foreign
        found: dict[nn.Parameter, str] = {}  # one that two stages here share has another name in each
        for name, p in self.model.named_parameters(remove_duplicate=False):
            if not any(name.startswith(f"{module}.") for module in others):
                found.setdefault(p, name)
        return {name: p for p, name in found.items()}

    def copies(self) -> dict[str, str]:
        """Parameters here that an earlier stage, held by another process, has too: {name here: first name}."""
        found: dict[str, str] = {}
        for first, where in self.split.tied.items():
            if min(stage for stage, name in where.items() if name == first) not in self.held:
                found |= {name: first for stage, name in where.items() if stage in self.held}
        return found

    def call(self, stage: int, received: Tensor | None, forward: Callable[[], Any]) -> Any:
        """Run one stage.

        Args:
            stage: its number.
            received: the hidden states that the stage before returned; None for stage 0.
            forward: calls the model with the inputs of the whole model.

        Returns:
            the hidden states for the next stage; of the last stage what `forward` returns.
        """
        if stage not in self._parts:
            self._parts[stage] = self._make(stage)
        parts, before = self._parts[stage], list[tuple[nn.Module, str, nn.Module]]()
        skipped = [part for _, _, part in parts if isinstance(part, _Skipped)]
        for layer in skipped:
            layer.received, layer.was_called = received, False
        for parent, key, part in parts:
            before.append((parent, key, parent._modules[key]))  # type: ignore[arg-type]
            parent._modules[key] = part
        ended = stage + 1 == len(self.split.stages)
        try:
            output = forward()
        except _StageEnd as end:
            output, ended = end.hidden, True
        finally:
            for parent, key, module in before:
                parent._modules[key] = module
            for layer in skipped:
                layer.received = None
        if not ended or not all(layer.was_called for layer in skipped):
            raise PlanError(
                f"{type(self.model).__name__}: stage {stage} did not call all layers in order: call the model itself, "
                f"not a part of it, and let it skip no layers at random (layerdrop = 0)"
            )
        return output

    def _make(self, stage: int) -> list[tuple[nn.Module, str, nn.Module]]:
        split, own = self.split, self.split.stages[stage].layers
        parts: list[tuple[nn.Module, str, nn.Module]] = []
        for name, stages in split.kept.items():
            parent, key, module = self._place(name)
            if stage not in stages and not isinstance(module, Absent):
                parts.append((parent, key, Absent(module, name, is_layer=False)))
        for i, name in enumerate(split.layers):
            parent, key, module = self._place(name)
            if i < own.start:
                parts.append((parent, key, _Skipped(module, split.key, split.tuples[i])))
            elif i == own.stop:
                parts.append((parent, key, _End(module, split.key)))
        return parts

    def _place(self, name: str) -> tuple[nn.Module, str, nn.Module]:
        outer, _, key = name.rpartition(".")
        parent = self.model.get_submodule(outer)
        module = parent._modules[key]
        assert module is not None, "a split names modules of its model"
        return parent, key, module


def take_stages(model: nn.Module, split: Split, *stages: int) -> HeldStages:
    """Keep some stages of a model, in place: the modules of all others become `Absent`, and their memory is free.

    The class of the model, its module names and state-dict keys stay; keys of absent parameters are gone. `parallelize`
    works before and after it, but where it has to run the model (a derived plan, sequence_parallel) before only.

    Args:
        model: the one that was split, or another of the same module names: sharded, or on another device.
        split: of the model.
        stages: the numbers of those to keep, at least one.

    Returns:
        the stages, which is also `model.tpk_stages`.

    Raises:
        PlanError: the model lacks modules of the split, or has been taken apart already; nothing is changed then.
        ValueError: there are no such stages.
    """
    held = tuple(sorted(set(stages)))
    if not held or not all(isinstance(s, int) and 0 <= s < len(split.stages) for s in held):
        raise ValueError(f"take_stages: stages must be among 0 to {len(split.stages) - 1}, got {list(stages)}")
    if (before := getattr(model, "tpk_stages", None)) is not None:
        raise PlanError(f"take_stages: the model has stages {list(before.held)} only")
    names = dict(model.named_modules())
    missing = [name for name in (*split.layers, *split.kept) if name not in names]
    if missing:
        raise PlanError(f"take_stages: the model lacks {missing[:3]} of the split: split this model")
    found = HeldStages(model, split, held)
    layers = {i for stage in held for i in split.stages[stage].layers}
    gone = {name: False for name, needed in split.kept.items() if not needed & set(held)}
    gone |= {name: True for i, name in enumerate(split.layers) if i not in layers}
    for name, is_layer in gone.items():
        parent, key, module = found._place(name)
        parent._modules[key] = Absent(module, name, is_layer=is_layer)
    model.tpk_stages = found  # type: ignore[assignment]
    if hasattr(model, "save_pretrained"):
        model.save_pretrained = _RefusedSave(held)  # type: ignore[assignment]
    return found


class _RefusedSave:
    """In the place of save_pretrained, which would write the stages of this rank as the model."""

    def __init__(self, held: tuple[int, ...]) -> None:
        self.held = held

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        raise PlanError(
            f"save_pretrained: the model has pipeline stages {list(self.held)} only: save it by "
            f"tpkernels.checkpoint.save, and load that into the whole model"
        )
