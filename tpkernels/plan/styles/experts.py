"""The experts of a mixture over the ranks, each on one rank: the style "expert".

A module of experts is called with tokens, with the indices of the experts of each, and with their weights. On a rank it
is called with the choices of its own experts alone, each a row with one choice: such a call is right with any
implementation (a loop over the experts, batched or grouped products, a kernel), and none of its rows is left unwritten.

    rows = the (token, choice) pairs whose expert is on this rank             # P of T * k, on average P = T * k / R
    y = experts(x[rows.token], choice[rows] - first_expert, weight[rows])     # [P, D]
    all_reduce(y summed by token)                                             # [T, D]
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from tpkernels import ops
from tpkernels.errors import PlanError
from tpkernels.layers import sum_gradient
from tpkernels.layers.base import Cut, ParallelModule
from tpkernels.layers.convert import Tied, convert
from tpkernels.plan.styles.base import CutSettings, Style
from tpkernels.plan.styles.replicated import SumGradStyle

# The names of the arguments of experts for the choices of the tokens and their weights, behind the tokens.
CHOICES = (("top_k_index", "top_k_weights"), ("router_indices", "routing_weights"))


class _Join(torch.autograd.Function):
    """Forward: y. Backward: zeros for the other tensors too, so that this rank joins their collectives."""

    @staticmethod
    def forward(y: Tensor, *others: Tensor | None) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], *(None if t is None else torch.zeros_like(t) for t in ctx.saved_tensors)


class Experts(ParallelModule):
    """The experts of a mixture, some on each rank: each token's weighted sum over the experts of all ranks."""

    num_experts: int
    codec: str
    grad_codec: str
    first_expert: int
    names: tuple[str, ...]  # of the arguments of the module's forward

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the sum over all ranks' experts, on every rank.

        Args:
            args, kwargs: tokens [..., D], the indices of their experts [T, k] (over all ranks; one outside of them
                adds nothing), the weights of the choices [T, k].

        Raises:
            ValueError: weights and choices have different shapes.
        """
        x, choices, given = (kwargs[n] if n in kwargs else args[i] for i, n in enumerate(self.names))
        if given.shape != choices.shape:
            raise ValueError(
                f"{type(self).__name__}: {self.names[2]} must be one number for each choice, {list(choices.shape)}, "
                f"got {list(given.shape)}"
            )
        tokens = sum_gradient(x.reshape(-1, x.size(-1)), group=self.group, grad_codec=self.grad_codec)[0]
        weights = sum_gradient(given.reshape(-1), group=self.group)[0]
        y = self._own_part(tokens, choices.reshape(-1) - self.first_expert, weights)
        return ops.all_reduce(y.reshape(x.shape), group=self.group, codec=self.codec)

    def _own_part(self, tokens: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """Return each token's sum over the experts of this rank, [T, D]."""
        own = (experts >= 0) & (experts < self.num_experts)
        k = len(own) // max(1, len(tokens))
        if self.num_experts and _shapes_are_fixed():
            rows = tokens.repeat_interleave(k, 0).masked_fill(~own[:, None], 0.0)
            ids = experts.clamp(0, self.num_experts - 1)  # a row of zeros, whose result is dropped
            y = self._experts(rows, ids, weights).masked_fill(~own[:, None], 0.0)
            return y.view(len(tokens), k, -1).sum(1)
        pairs = own.nonzero()[:, 0] if self.num_experts else own.new_zeros(0, dtype=torch.int64)
        if len(pairs):
            y = self._experts(tokens[pairs // k], experts[pairs], weights[pairs])
            # Each pair in its own place: sums by index_add would depend on the order of threads on a GPU.
            return y.new_zeros(len(own), y.size(-1)).index_copy(0, pairs, y).view(len(tokens), k, -1).sum(1)
        y = torch.zeros_like(tokens)
        if torch.is_grad_enabled():
            y = _Join.apply(y.detach(), tokens, weights, *self.parameters())  # type: ignore[no-untyped-call]
        return y

    def _experts(self, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        y: Tensor = super().forward(rows, ids[:, None], weights[:, None])
        return y.reshape(rows.shape)


def _shapes_are_fixed() -> bool:
    """Whether the number of rows must not depend on values: while a graph is traced or captured."""
    return is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def takes_choices(module: nn.Module) -> bool:
    """Whether the module's forward takes tokens, the choices of each, and their weights."""
    names = tuple(inspect.signature(type(module).forward).parameters)
    return len(names) == 4 and names[2:] in CHOICES


class ExpertStyle(Style):
    """expert: the experts of a mixture over the ranks, each on one rank."""

    name: ClassVar[str] = "expert"
    covers_children: ClassVar[bool] = True

    def check(self, name: str, module: nn.Module, R: int) -> None:
        """Raise PlanError unless the parameters hold the experts along dimension 0, and forward takes choices."""
        count = getattr(module, "num_experts", None)
        sizes = {p.size(0) for p in module.parameters(recurse=False)}
        if not isinstance(count, int) or sizes != {count}:
            raise PlanError(
                f"Plan: style 'expert' of {name} needs a module whose parameters hold its num_experts experts along "
                f"dimension 0, got num_experts={count} and sizes {sorted(sizes)}"
            )
        if not takes_choices(module):
            raise PlanError(f"Plan: style 'expert' of {name} needs a forward(tokens, top_k_index, top_k_weights)")

    def cut(self, name: str, module: nn.Module, R: int) -> Cut | None:
        """Return the cut of the experts."""
        return Cut(0, int(module.num_experts))  # type: ignore[arg-type]

    def parameter_cuts(self, module: nn.Module, cut: Cut | None, R: int) -> dict[str, Cut]:
        """Return the cut of every parameter: that of the experts."""
        assert cut is not None
        return {name: cut for name, _ in module.named_parameters(recurse=False)}

    def local_sizes(self, module: nn.Module, cut: Cut | None, R: int, rank: int) -> dict[str, int]:
        """Return this rank's number of experts."""
        assert cut is not None
        return {"num_experts": cut.info(R, rank).size}

    def apply(self, module: nn.Module, cut: Cut | None, settings: CutSettings, tied: Tied) -> None:
        """Keep this rank's experts. A module inside (a norm of their results) gets its rows only."""
        assert cut is not None
        group = settings.group
        inside = [m for m in module.modules() if m is not module and any(True for _ in m.parameters(recurse=False))]
        for child in inside:
            SumGradStyle().apply(child, None, settings, tied)
        mine = cut.info(group.world_size, group.rank)
        convert(
            module, Experts, self.parameter_cuts(module, cut, group.world_size), group, tied,
            first_expert=mine.start, codec=settings.codec, grad_codec=settings.grad_codec,
            names=tuple(inspect.signature(type(module).forward).parameters)[1:4],
            num_experts=mine.size,
        )  # fmt: skip
