"""Whether the layers of a decoder handle tokens one by one where sequence parallel cuts them, shown by a run.

The model runs twice on meta tensors (real ones, where it looks at values), with all tokens between its layers and with
some of them. Every token of the hidden states has a label that goes the way of its values (flow.py). At a door
tokens are gathered: they must come there in their order, along dimension 1, and no other tensor may stand for them.
Where two labels meet outside of the doors, where sizes do not fit, or where the two runs take other steps, a rank would
not compute its part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tpkernels.errors import PlanError
from tpkernels.plan.derive.flow import Flow, out_of_sight
from tpkernels.plan.derive.inputs import Call
from tpkernels.plan.derive.record import Run, evaluating, execute, first_that_runs, stand_in
from tpkernels.plan.sequence.boundaries import AtTheDoor, BehindIt, Door

TOKENS = 1  # hidden states are [B, S, D]
FEW = 2  # as many tokens has the rank of the second run


@dataclass
class _Part:
    """The stretch of tokens that a rank has; `size` is None for all of them, until the first hidden states say it."""

    size: int | None
    whole: int = 0


class _TokenFlow(Flow):  # type: ignore[no-untyped-call]
    """A run in which the tokens between the layers have labels, and gathers and cuts are pretended."""

    def __init__(self, size: int | None) -> None:
        super().__init__({}, {}, {})
        self.part = _Part(size)

    def cut(self, x: Tensor) -> Tensor:
        """All tokens -> this rank's."""
        if x.dim() != 3 or self.labels_of(x) is not None:
            raise PlanError(f"hidden states {list(x.shape)} are not all tokens as [B, S, D]")
        self.part.whole = self.part.whole or x.size(TOKENS)
        if x.size(TOKENS) != self.part.whole:
            raise PlanError(f"hidden states {list(x.shape)} are not [B, {self.part.whole}, D]")
        with out_of_sight():
            y = x.narrow(TOKENS, 0, self.part.size or self.part.whole).clone()
            self._labels[y] = self._of_tokens(y)
        return y

    def gather(self, x: Tensor) -> Tensor:
        """This rank's tokens -> all, without labels."""
        n = self.part.size or self.part.whole
        with out_of_sight():
            labels = self.labels_of(x)
            if labels is None or x.dim() != 3 or x.size(TOKENS) != n or not torch.equal(labels, self._of_tokens(x)):
                raise PlanError(f"it gets {list(x.shape)}, which are not the rank's {n} tokens as [B, S, D]")
            return x.new_zeros(x.size(0), self.part.whole, x.size(2))

    def _of_tokens(self, x: Tensor) -> Tensor:
        return torch.arange(1, 1 + x.size(TOKENS), device="cpu").view(1, -1, 1).expand(x.shape)


def check_tokens(model: nn.Module, layers: Sequence[nn.Module], doors: Sequence[Door], inputs: Call | None) -> None:
    """Run the model as sequence parallel would, with the doors that it is to have.

    Raises:
        PlanError: a rank would not compute its part; says where and why.
    """
    with evaluating(model):
        run, error = first_that_runs(model, model, {}, {}, None if inputs is None else [inputs])
        if run is None:
            which = "sample inputs" if inputs is None else "the inputs given"
            raise PlanError(f"it could not be run on {which} ({error}); give inputs=(args, kwargs)")
        whole = _run(model, run, layers, doors, None)
        few = _run(model, run, layers, doors, FEW)
    if [step[:2] for step in whole.trace] != [step[:2] for step in few.trace]:
        raise PlanError("with fewer tokens it takes other steps")


def _run(
    model: nn.Module, run: Run, layers: Sequence[nn.Module], doors: Sequence[Door], size: int | None
) -> _TokenFlow:
    flow = _TokenFlow(size)
    handles: list[Any] = []
    try:
        for door in doors:
            handles += door.hang(flow.gather, flow.cut)
        handles.append(layers[0].register_forward_pre_hook(AtTheDoor(flow.cut), with_kwargs=True))
        handles.append(layers[-1].register_forward_hook(BehindIt(flow.gather)))
        execute(model, run, flow, {name: stand_in(p, run.device) for name, p in model.named_parameters()})
    except Exception as error:  # whatever a forward raises when it gets fewer tokens than it expects
        where = flow.where or type(model).__name__
        raise PlanError(f"in {where}: {error}" if isinstance(error, PlanError) else f"in {where}: {error!r}") from error
    finally:
        for handle in handles:
            handle.remove()
    if flow.edges.pairs:
        raise PlanError(f"tokens do not stay apart: {flow.edges.pairs[0][1]}")
    return flow
