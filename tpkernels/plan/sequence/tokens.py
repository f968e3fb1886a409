"""Whether the layers of a decoder compute tokens one by one between the boundaries of sequence parallel, by a run.

The model runs twice on meta tensors (on real ones, where it reads values), with all tokens between its layers and with
some of them. Every token of the hidden states has a label that takes the path of its values (derive/flow.py). At a
boundary tokens are gathered: they must be in their order there, along dimension 1, and no other tensor in their place.
Where two labels meet between the boundaries, where sizes do not fit, or where the two runs take other steps, a rank
would not compute its part.
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
from tpkernels.plan.sequence.boundaries import Boundary, PostHook, PreHook

TOKENS = 1  # hidden states are [B, S, D]
LOCAL = 2  # the number of tokens of a rank in the second run


@dataclass
class _Part:
    """The number of tokens that a rank has, None: all; and of all, 0 before the first hidden states."""

    size: int | None
    full: int = 0


class _TokenFlow(Flow):  # type: ignore[no-untyped-call]
    """A run in which the tokens between the layers have labels; nothing is sent."""

    def __init__(self, size: int | None) -> None:
        super().__init__({}, {}, {})
        self.part = _Part(size)

    def shard(self, x: Tensor) -> Tensor:
        """All tokens -> this rank's."""
        if x.dim() != 3 or self.labels_of(x) is not None:
            raise PlanError(f"hidden states {list(x.shape)} are not all tokens as [B, S, D]")
        self.part.full = self.part.full or x.size(TOKENS)
        if x.size(TOKENS) != self.part.full:
            raise PlanError(f"hidden states {list(x.shape)} are not [B, {self.part.full}, D]")
        with out_of_sight():
            y = x.narrow(TOKENS, 0, self.part.size or self.part.full).clone()
            self._labels[y] = self._of_tokens(y)
        return y

    def gather(self, x: Tensor) -> Tensor:
        """This rank's tokens -> all, without labels."""
        n = self.part.size or self.part.full
        with out_of_sight():
            labels = self.labels_of(x)
            if labels is None or x.dim() != 3 or x.size(TOKENS) != n or not torch.equal(labels, self._of_tokens(x)):
                raise PlanError(f"it gets {list(x.shape)}, which are not the rank's {n} tokens as [B, S, D]")
            return x.new_zeros(x.size(0), self.part.full, x.size(2))

    def _of_tokens(self, x: Tensor) -> Tensor:
        return torch.arange(1, 1 + x.size(TOKENS), device="cpu").view(1, -1, 1).expand(x.shape)


def check_tokens(
    model: nn.Module, layers: Sequence[nn.Module], boundaries: Sequence[Boundary], inputs: Call | None
) -> None:
    """Run the model as one rank of sequence parallel would.

    Args:
        model: the full one.
        layers: between which tokens are sharded.
        boundaries: inside of them.
        inputs: (args, kwargs) to run it with; None: sample inputs are made.

    Raises:
        PlanError: a rank would not compute its part; the text has the module and the reason.
    """
    with evaluating(model):
        run, error = first_that_runs(model, model, {}, {}, None if inputs is None else [inputs])
        if run is None:
            which = "sample inputs" if inputs is None else "the inputs given"
            raise PlanError(f"it could not be run on {which} ({error}); give inputs=(args, kwargs)")
        full = _run(model, run, layers, boundaries, None)
        local = _run(model, run, layers, boundaries, LOCAL)
    if [step[:2] for step in full.trace] != [step[:2] for step in local.trace]:
        raise PlanError("with fewer tokens it takes other steps")


def _run(
    model: nn.Module, run: Run, layers: Sequence[nn.Module], boundaries: Sequence[Boundary], size: int | None
) -> _TokenFlow:
    flow = _TokenFlow(size)
    handles: list[Any] = []
    try:
        for boundary in boundaries:
            handles += boundary.register_hooks(flow.gather, flow.shard)
        handles.append(layers[0].register_forward_pre_hook(PreHook(flow.shard), with_kwargs=True))
        handles.append(layers[-1].register_forward_hook(PostHook(flow.gather)))
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
