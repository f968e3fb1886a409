"""Run a model as one rank of the sharded model would, and compare the paths of features with those of the full run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tpkernels.plan.derive.flow import Flow
from tpkernels.plan.derive.record import Mismatch, Run, execute, stand_in
from tpkernels.plan.resolved import Resolved
from tpkernels.plan.styles.base import Style


class CutFlow(Flow):  # type: ignore[no-untyped-call]
    """A run with this rank's parts. Features keep the labels of the whole run, so that the two can be compared.

    Args:
        whole: the flow of the run of the whole model, and `root`, the classes of its labels.
        parts: {source: which of its features this rank has, whether these are outputs}.
    """

    def __init__(self, whole: Flow, root: np.ndarray, parts: dict[str, tuple[Tensor, bool]]) -> None:
        super().__init__(whole.sources, {}, whole.closed)
        self._whole, self._root, self._parts = whole, root, parts
        self._next = whole.count

    def _arrive(self, source: str, x: Tensor | None) -> None:
        super()._arrive(source, x)
        got, want = self.arrived.get(source), self._whole.arrived.get(source)
        if (got is None) != (want is None):
            raise Mismatch(source, "other features would arrive")
        if got is not None and want is not None:
            index, is_output = self._parts.get(source, (None, True))
            want = want if index is None or is_output else want[index]
            if got.shape != want.shape or not np.array_equal(self._root[got.numpy()], self._root[want.numpy()]):
                raise Mismatch(source, f"at its input {len(got)} features would arrive that are not this rank's")

    def new_labels(self, source: str, n: int) -> Tensor:
        """The labels that this rank's features have in the run of the whole model."""
        labels = self._whole.first[source]
        index, is_output = self._parts.get(source, (None, False))
        return labels[index] if index is not None and is_output else labels

    def compare(self) -> None:
        """Raise Mismatch when features meet that are apart in the whole model, or numbers differ."""
        for pair, why in self.edges.pairs:
            if not np.array_equal(self._root[pair[0].numpy()], self._root[pair[1].numpy()]):
                raise Mismatch(self._whole.called[0], why)
        for (name, numbers, where), (other, others, _) in zip(self.trace, self._whole.trace, strict=False):
            if (name, numbers) != (other, others):
                raise Mismatch(where, f"{name} with {numbers} instead of {other} with {others}")
        if len(self.trace) != len(self._whole.trace):
            raise Mismatch("", "it would take other steps")


def check(model: nn.Module, run: Run, styles: dict[str, Style], R: int, rank: int) -> None:
    """Run one rank's part of the model, on tensors of its sizes, and compare the paths of features.

    Args:
        model: the full one; attributes that count sharded features are changed for the run, and put back.
        run: of the full model.
        styles: {module name: style}, to be checked.
        R, rank: the number of ranks, and which of them runs.

    Raises:
        Mismatch: the rank would not compute its part of what the model computes.
        PlanError: the styles cannot be applied.
    """
    resolved = Resolved.of(model, styles, R)
    names = {id(p): name for name, p in model.named_parameters()}
    values = {name: stand_in(p, run.device) for name, p in model.named_parameters()}
    parts: dict[str, tuple[Tensor, bool]] = {}
    parameter_cuts = resolved.parameter_cuts()
    for name, style in styles.items():
        module, cut = resolved.modules[name], resolved.cuts.get(name)
        if cut is None or style.role not in ("column", "row"):  # it takes and gives full features
            continue
        features = torch.arange(cut.full_size, device="cpu")
        parts[name] = (replace(cut, dim=0).info(R, rank).part(features), style.role == "column")
        for key, own in parameter_cuts[name].items():
            parameter = module._parameters.get(key)
            if parameter is not None:  # else it is computed from others (pruning), of which no rank has a part
                local = own.info(R, rank).part(stand_in(parameter, run.device))
                values[names[id(parameter)]] = local.contiguous()
    with _attributes_set(resolved.modules, resolved.local_attributes(rank)):
        flow = CutFlow(run.flow, run.flow.edges.classes(run.flow.count), parts)
        try:
            execute(model, run, flow, values)
        except Mismatch:
            raise
        except Exception as error:
            raise Mismatch(flow.where, f"{type(error).__name__}: {error}") from error
    flow.compare()


@contextmanager
def _attributes_set(modules: dict[str, nn.Module], values: dict[str, dict[str, Any]]) -> Iterator[None]:
    """Set attributes of modules, {module name: {name: value}}, and put back their own in the end."""
    before = {name: vars(modules[name]).copy() for name in values}
    try:
        for name, attributes in values.items():
            vars(modules[name]).update(attributes)
        yield
    finally:
        for name, attributes in values.items():
            own = vars(modules[name])
            for key in attributes:
                own.pop(key, None)
            own.update({key: before[name][key] for key in attributes if key in before[name]})
