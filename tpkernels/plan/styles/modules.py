"""Modules that turn into cut ones where they stand: same object, same name, same state-dict keys.

A module becomes cut by changing its class to one of these, which are subclasses of what it was (so that
`isinstance(module, nn.Linear)` goes on holding for whoever looks), and its parameters to this rank's parts. The sizes
it tells (in_features, out_features) become those that its forward takes and gives on this rank.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from tpkernels import ops
from tpkernels.comm.group import Group
from tpkernels.errors import PlanError
from tpkernels.layers import rank_rng, sum_gradient, take_shard
from tpkernels.layers.base import Cut, ParallelModule, gather
from tpkernels.ops.linear import linear_gradients, saved_linear
from tpkernels.plan.styles.dropout_rng import BlockRandom, common_numbers
from tpkernels.plan.styles.shared_input import SharedInput
from tpkernels.shard import ShardInfo

BASES = (nn.Linear, nn.Embedding, nn.MultiheadAttention)


class CutModule(ParallelModule):
    """A module whose class was changed by `cut_module`."""

    _origin: tuple[type[nn.Module], type[CutModule], tuple[str, ...]]

    def full_parameter(self, name: str) -> Tensor:
        """Return an unsharded parameter on every rank (detached). Collective: all ranks must call it."""
        return self._full(name)

    def full_weight(self) -> Tensor:
        """Return the unsharded weight on every rank (detached). Collective: all ranks must call it."""
        return self._full("weight")

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A class made at run time cannot be found by its name, where a copy or a pickle is made of this.
        return _new, type(self)._origin, self.__dict__.copy()


def group_of(module: nn.Module, otherwise: Group) -> Group:
    """Return the group of the first cut module in a module, which `set_group` may have changed; else `otherwise`."""
    return next((m.group for m in module.modules() if isinstance(m, CutModule)), otherwise)


@cache
def cut_class(original: type[nn.Module], style: type[CutModule], summed: tuple[str, ...] = ()) -> type[CutModule]:
    """Return the class of modules of class `original` that are cut in a style.

    The style's forward takes the place of that of the classes in BASES and of Conv1D. A subclass of one of BASES that
    adds something of its own and calls super().forward keeps it. In the place of the parameters named in `summed` stand
    properties, so that whoever uses them in a forward gets gradients that are summed over the ranks.
    """
    base = next((base for base in BASES if issubclass(original, base)), original)
    bases: tuple[type, ...] = (style, original)
    if original is not base:  # super().forward in it must find ours before that of its base
        bases = (original, type(style.__name__, (style, base), {"__module__": __name__}))
    own: dict[str, Any] = {"_origin": (original, style, summed), "__module__": __name__, "__doc__": style.__doc__}
    own |= {name: _summed(name) for name in summed}
    return cast("type[CutModule]", type(f"{style.__name__}{original.__name__}", bases, own))


def _summed(name: str) -> property:
    def get(module: ParallelModule) -> Tensor | None:
        parameter = module._parameters[name]
        return None if parameter is None else sum_gradient(parameter, group=module.group)[0]

    return property(get)


def _new(original: type[nn.Module], style: type[CutModule], summed: tuple[str, ...]) -> CutModule:
    made: type[CutModule] = cut_class(cast(Any, original), cast(Any, style), summed)
    return made.__new__(made)


class Tied:
    """Parameters that several modules have in common, so that they are one parameter after the cut, too."""

    def __init__(self, model: nn.Module) -> None:
        found = [p for _, p in model.named_parameters(remove_duplicate=False)]
        seen, self.ids = set[int](), set[int]()
        for parameter in found:
            (self.ids if id(parameter) in seen else seen).add(id(parameter))
        self._done: dict[int, tuple[nn.Parameter, nn.Parameter, Cut | None]] = {}

    def check(self, modules: dict[str, nn.Module], cuts: dict[str, Cut]) -> None:
        """Raise before anything is changed when a tied parameter would be cut in one place and not alike in another.

        Raises:
            PlanError: names the modules.
        """
        holders: dict[int, dict[str, Cut | None]] = {}
        for name, module in modules.items():
            for own, parameter in module._parameters.items():
                if id(parameter) in self.ids:
                    holders.setdefault(id(parameter), {})[name] = cuts.get(name) if own != "bias" else None
        for found in holders.values():
            if len(set(found.values())) > 1:
                raise PlanError(f"Plan: {list(found)} share a parameter, so their styles must cut it alike")

    def part(self, module: CutModule, name: str, cut: Cut | None) -> nn.Parameter:
        """Return the parameter that stands in the place of the whole one from now on."""
        whole = cast(nn.Parameter, module._parameters[name])
        if id(whole) in self._done:
            _, part, other = self._done[id(whole)]
            if cut != other:
                raise PlanError(f"Plan: {name} of {type(module).__name__} is tied to a parameter that is cut otherwise")
            return part
        if cut is None:
            part = whole
        else:
            value = module._info(cut).part(whole.detach()).clone(memory_format=torch.contiguous_format)
            part = nn.Parameter(value, requires_grad=whole.requires_grad)
        if id(whole) in self.ids:  # kept, so that no other parameter can get its id
            self._done[id(whole)] = (whole, part, cut)
        return part

    def rejoin(self, model: nn.Module) -> None:
        """Give the part to modules that were not cut themselves and only hold the parameter (BERT's head, a bias)."""
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) in self._done:
                    module._parameters[name] = self._done[id(parameter)][1]


def cut_module(
    module: nn.Module,
    style: type[CutModule],
    cuts: dict[str, Cut],
    group: Group,
    tied: Tied | None = None,
    *,
    summed: tuple[str, ...] = (),
    **attributes: Any,
) -> None:
    """Make a module a cut one in place.

    Args:
        module: whole, the same on all ranks.
        style: what it becomes.
        cuts: of its parameters; those without one stay whole.
        group: over which.
        tied: of the whole model; None: the parameters are parts already.
        summed: parameters whose gradients are to be summed over the ranks.
        attributes: set on the module.
    """
    cut = cast(CutModule, module)
    vars(module).pop("forward", None)  # the class's own, which a hook that was removed has left on the instance
    object.__setattr__(module, "__class__", cut_class(cast(Any, type(module)), cast(Any, style), summed))
    cut.group = group
    cut._place = (group.rank, group.world_size)
    cut._cuts = cuts
    for name, value in attributes.items():
        setattr(module, name, value)
    for name, parameter in list(module._parameters.items()):
        if parameter is not None and tied is not None:
            module._parameters[name] = tied.part(cut, name, cuts.get(name))
    cut._mark()


class _SumShared(torch.autograd.Function):
    """Forward: the part. Backward: its gradient, summed over the ranks that hold the same part."""

    @staticmethod
    def forward(x: Tensor, info: ShardInfo) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.info = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        info: ShardInfo = ctx.info
        # All ranks' parts in their places of the whole: one sum over all ranks serves every set of sharing ranks.
        whole = grads[0].new_zeros(info.full_shape(grads[0]))
        info.put(grads[0], info.rank, whole)
        total = torch.ops.tpkernels.all_reduce(whole, info.group_name, info.world_size, "sum", "none")
        return info.part(total), None


class _LocalLinear(torch.autograd.Function):
    """A linear whose input gradient stays this rank's, with the GEMMs that the fused ops would take."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, group: str, world_size: int) -> Tensor:
        y: Tensor = torch.ops.tpkernels.replicated_gemm(x, weight, bias, group, world_size, "none")
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        need_x, need_w, *_ = ctx.needs_input_grad
        ctx.save_for_backward(inputs[0] if need_w else None, inputs[1] if need_x else None)
        ctx.group = inputs[3]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, needs = saved_linear(ctx, grads[0])
        if torch.is_grad_enabled():
            found = linear_gradients(grads[0], x, weight, needs)
        else:
            found = torch.ops.tpkernels.linear_backward(grads[0], x, weight, *needs, ctx.group)
        return *(g if need else None for g, need in zip(found, needs, strict=True)), None, None


def local_linear(x: Tensor, weight: Tensor, bias: Tensor | None, group: Group) -> Tensor:
    """Return x @ weight.T + bias; nothing is sent, also in the backward."""
    if torch.is_autocast_enabled(x.device.type):  # which casts what torch's own linear gets
        return nn.functional.linear(x, weight, bias)
    y: Tensor = _LocalLinear.apply(x, weight, bias, group.name, group.world_size)  # type: ignore[no-untyped-call]
    return y


class _CutLinear(CutModule):
    """What cut linears share: the weight as [N, K], whichever way it lies; gradients summed where parts are shared."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    codec: str
    grad_codec: str
    transposed: bool  # the weight is [K, N]
    random: BlockRandom | None  # of the stretch that this layer begins or ends

    def _own(self, name: str) -> Tensor | None:
        parameter: Tensor | None = getattr(self, name)
        if parameter is None:
            return None
        cut = self._cuts.get(name)
        if cut is not None and cut.runs and parameter.requires_grad and torch.is_grad_enabled():
            info = self._info(cut)
            if info.shared:
                return cast(Tensor, _SumShared.apply(parameter, info))  # type: ignore[no-untyped-call]
        return parameter

    def _weights(self) -> tuple[Tensor, Tensor | None]:
        weight = cast(Tensor, self._own("weight"))
        return (weight.t() if self.transposed else weight), self._own("bias")

    def extra_repr(self) -> str:
        """Say this rank's sizes and what they are a part of."""
        weight_cut = self._cuts["weight"]
        shape = list(self.weight.shape)
        N, K = reversed(shape) if self.transposed else shape
        along = "out" if (weight_cut.dim == 0) != self.transposed else "in"
        text = f"in_features={K}, out_features={N}, bias={self.bias is not None}, {along} cut of {weight_cut.full_size}"
        return text + f", rank={self.group.rank} of {self.group.world_size}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"


class Column(_CutLinear):
    """A linear that computes this rank's outputs of replicated inputs; `gather_output` says whether it gathers them."""

    gather_output: bool
    entered: bool  # the block's entry sums the gradient of x already (sequence parallel)
    shared: SharedInput | None = None  # with whom the sum of the gradient of x is shared

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N / R], or [..., N] with gather_output."""
        weight, bias = self._weights()
        if self.random is not None:
            self.random.enter(self.group)
        if torch.is_grad_enabled():
            entered = x if self.entered else None if self.shared is None else self.shared.enter(x, self.group)
            if entered is not None:
                return local_linear(entered, weight, bias, self.group)
        y = ops.replicated_gemm(x, weight, bias, group=self.group, codec=self.grad_codec)
        if not self.gather_output:
            return y
        cut = self._cuts["weight"]
        return gather(y, -1, cut.full_size, self.group, unit=cut.unit)


class Row(_CutLinear):
    """A linear that multiplies this rank's inputs, and sums over the ranks."""

    split_input: bool
    sequence_parallel: bool  # keep this rank's tokens only
    sequence_dim: int

    def forward(self, x: Tensor) -> Tensor:
        """[..., K / R] (whole with split_input) -> [..., N]; [.., S / R, .., N] under sequence parallel."""
        weight, bias = self._weights()
        if self.random is not None:
            self.random.leave()
        if self.split_input:
            unit = self._cuts["weight"].unit
            x = take_shard(x, -1, group=self.group, unit=unit, grad_codec=self.grad_codec)
        if self.sequence_parallel:
            wire: dict[str, Any] = {"dim": self.sequence_dim, "codec": self.codec, "grad_codec": self.grad_codec}
            return ops.gemm_reduce_scatter(x, weight, bias, group=self.group, **wire)
        return ops.gemm_all_reduce(x, weight, bias, group=self.group, codec=self.codec)


class Vocab(CutModule):
    """An embedding that looks up this rank's rows; the ranks' rows are summed."""

    weight: nn.Parameter
    num_embeddings: int
    padding_idx: int | None

    def forward(self, ids: Tensor) -> Tensor:
        """Rows of the whole table, on every rank."""
        y = ops.vocab_embedding(ids, self.weight, group=self.group, vocab_size=self._cuts["weight"].full_size)
        if self.padding_idx is not None:
            y = torch.where((ids == self.padding_idx).unsqueeze(-1), y.detach(), y)
        return y

    def extra_repr(self) -> str:
        """Say the whole size and this rank's part of it."""
        return f"{self.num_embeddings} (shard {self.weight.size(0)}), rank={self.group.rank} of {self.group.world_size}"


class HeadParameters(CutModule):
    """An attention block with parameters of its own, one for each head: the rank has those of its heads."""


class Summed(CutModule):
    """A module whose parameters are whole and see a part of the tokens or heads only: their gradients are summed."""


class SumTail(CutModule):
    """A whole linear whose last `tail` outputs are used on cut heads without a column layer between."""

    tail: int

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the module gives; the gradient of the last outputs is summed over the ranks."""
        y: Tensor = super().forward(*args, **kwargs)
        kept, tail = y[..., : -self.tail], y[..., -self.tail :]
        return torch.cat([kept, sum_gradient(tail, group=self.group)[0]], -1)


class CommonDropout(CutModule):
    """A dropout of what is whole inside a cut block: one mask on all ranks, between those that are the rank's own."""

    def forward(self, x: Tensor) -> Tensor:
        """What the module gives."""
        with common_numbers():
            y: Tensor = super().forward(x)
        return y


class RankDropout(CutModule):
    """A dropout of cut activations: each rank draws its own mask, and the default generators stay in step."""

    p: float

    def forward(self, x: Tensor) -> Tensor:
        """Drop elements in training mode; otherwise return x."""
        if not self.training or self.p == 0.0:
            return x
        with rank_rng(self.group):
            return nn.functional.dropout(x, self.p, training=True)
