"""Run a model, or one of the models in it, under a Flow: once as it is, and once as one rank of the cut model would."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from tpkernels.layers.base import Cut
from tpkernels.plan.cuts import all_cuts, is_conv1d
from tpkernels.plan.derive.flow import Flow
from tpkernels.plan.derive.record import Mismatch, Run, execute, stand_in
from tpkernels.plan.styles.heads import find_blocks, tell_heads
from tpkernels.plan.styles.style import Style
from tpkernels.plan.styles.units import tell_counts
from tpkernels.shard import ShardInfo

CUT = ("column", "packed_column", "row")


# ---- as one rank of the cut model ----------------------------------------------------------------------------------


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
    """Run one rank's part of the model, on tensors of its sizes, and compare which features go where.

    Raises:
        Mismatch: the rank would not compute its part of what the model computes.
        PlanError: the plan cannot be applied.
    """
    modules = dict(model.named_modules())
    blocks = list(find_blocks(modules, styles))
    cuts = all_cuts(modules, styles, blocks, R)
    parts: dict[str, tuple[Tensor, bool]] = {}
    names = {id(p): name for name, p in model.named_parameters()}
    values = {name: stand_in(p, run.device) for name, p in model.named_parameters()}
    with _numbers_kept(modules.values()):
        for block in blocks:
            tell_heads(block, R, rank)
        for name, style in styles.items():
            if style.name == "counts":
                tell_counts(modules[name], style, R, rank)
            elif style.name in CUT and name in cuts:
                parts[name] = _cut(modules[name], style, cuts[name], R, rank, names, values)
        flow = CutFlow(run.flow, run.flow.edges.classes(run.flow.count), parts)
        try:
            execute(model, run, flow, values)
        except Mismatch:
            raise
        except Exception as error:
            raise Mismatch(flow.where, f"{type(error).__name__}: {error}") from error
    flow.compare()


def _cut(
    module: nn.Module, style: Style, cut: Cut, R: int, rank: int, names: dict[int, str], values: dict[str, Tensor]
) -> tuple[Tensor, bool]:
    """Put a rank's part of a source in the place of its parameters; returns which features these are."""
    everything = torch.arange(cut.full_size, device="cpu")
    index = ShardInfo(0, cut.full_size, R, rank, unit=cut.unit, runs=cut.runs).part(everything)
    transposed = is_conv1d(module)
    for key, parameter in module.named_parameters(recurse=False):
        dim = (1 - cut.dim if transposed else cut.dim) if key == "weight" else cut.dim
        if key == "weight" or cut.dim == 0:
            name = names[id(parameter)]
            values[name] = values[name].index_select(dim, index.to(values[name].device))
    outputs = style.name != "row"
    size = ("nf" if outputs else "nx") if transposed else ("out_features" if outputs else "in_features")
    if size in vars(module):
        setattr(module, size, len(index))
    return index, outputs


@contextmanager
def _numbers_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put back what modules know about their sizes: whole numbers, and the config."""
    before = [(m, {k: v for k, v in vars(m).items() if isinstance(v, int) or k == "config"}) for m in modules]
    try:
        yield
    finally:
        for module, numbers in before:
            vars(module).update(numbers)
