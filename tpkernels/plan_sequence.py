"""Sequence parallel for decoders: between the blocks each rank keeps its part of the tokens.

    hidden states [B, S, D]  --cut-->  layer 0 .. layer L-1 on [B, S / R, D]  --gathered-->  [B, S, D]

In a layer, norms, residual sums and dropouts work on the rank's tokens. A block of column and row layers gathers the
tokens once at its door, and its row layer scatters the sums, so that the traffic is that of the all-reduce it replaces.
Any other module with weights (a mixture of experts) sees all tokens, and its result is cut. S need not divide by R.

Source: Korthikanti et al. 2022 (arXiv:2205.05198).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tpkernels import ops
from tpkernels.group import Group
from tpkernels.layers import take_shard
from tpkernels.plan_layers import Column, CutModule, RankDropout, Row, Summed, cut_module
from tpkernels.plan_styles import PlanError

TOKENS = 1  # hidden states are [B, S, D]
HIDDEN = ("hidden_states", "x", "hidden_state", "inputs")


class AtTheDoor:
    """A hook that changes the hidden states a module gets."""

    def __init__(self, change: Any) -> None:
        self.change = change

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Change the first argument, or the keyword that stands for it."""
        if args and isinstance(args[0], Tensor):
            return (self.change(args[0]), *args[1:]), kwargs
        for name in HIDDEN:
            if isinstance(kwargs.get(name), Tensor):
                return args, kwargs | {name: self.change(kwargs[name])}
        raise PlanError(f"sequence_parallel: {type(module).__name__} was called without hidden states")


class BehindIt:
    """A hook that changes the hidden states a module returns, alone or as the first of several things."""

    def __init__(self, change: Any) -> None:
        self.change = change

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Change the output."""
        if isinstance(output, Tensor):
            return self.change(output)
        if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
            return type(output)((self.change(output[0]), *output[1:]))
        raise PlanError(f"sequence_parallel: {type(module).__name__} returned no hidden states")


class CutTokens:
    """This rank's part of replicated tokens. The group is that of a cut module, which `set_group` may change."""

    def __init__(self, cut: CutModule, grad_codec: str) -> None:
        self._cut, self.grad_codec = [cut], grad_codec  # in a list: a reference, and no child of anything

    def __call__(self, x: Tensor) -> Tensor:
        """[B, S, D] -> [B, S / R, D]."""
        return take_shard(x, TOKENS, group=self._cut[0].group, grad_codec=self.grad_codec)


class GatherTokens:
    """All tokens of all ranks. `grad` as in ops.all_gather: what becomes of the gradient. The group: as CutTokens."""

    def __init__(self, cut: CutModule, grad: str, codec: str, grad_codec: str) -> None:
        self._cut, self.grad, self.codec, self.grad_codec = [cut], grad, codec, grad_codec

    def __call__(self, x: Tensor) -> Tensor:
        """[B, S / R, D] -> [B, S, D]."""
        group = self._cut[0].group
        if group.world_size == 1:
            return x
        return ops.all_gather(x, TOKENS, group=group, grad=self.grad, codec=self.codec, grad_codec=self.grad_codec)


def check_sequence(model: nn.Module, modules: dict[str, nn.Module], blocks: list[str]) -> list[nn.Module]:
    """Return the layers between which tokens are cut.

    Raises:
        PlanError: the model is no decoder of such layers.
    """
    why = f"parallelize: sequence_parallel does not apply to {type(model).__name__}: "
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise PlanError(why + "it is an encoder and a decoder")
    lists = [m for m in modules.values() if isinstance(m, nn.ModuleList)]
    attention = [modules[name] for name in blocks]
    found = [stack for stack in lists if _holds(stack, attention)]
    found = [stack for stack in found if not any(other is not stack and _inside(stack, other) for other in found)]
    if len(found) != 1 or not all(_holds(layer, attention) for layer in found[0]):
        raise PlanError(f"{why}it needs one list of layers with an attention block each, found {len(found)} lists")
    if not all(getattr(block, "is_causal", False) for block in attention):
        raise PlanError(why + "its attention is not causal, or does not say so (is_causal)")
    layers = list(found[0])
    for layer in layers:
        _check_layer(layer, why)
    return layers


def _holds(module: nn.Module, blocks: list[nn.Module]) -> bool:
    return any(child is block for child in module.modules() for block in blocks)


def _inside(module: nn.Module, other: nn.Module) -> bool:
    return any(child is module for child in other.modules())


def _check_layer(layer: nn.Module, why: str) -> None:
    own = [name for name, _ in layer.named_parameters(recurse=False)]
    if own:
        raise PlanError(f"{why}{type(layer).__name__} has parameters of its own: {own}")


def cut_sequence(layers: list[nn.Module], group: Group, codec: str, grad_codec: str) -> None:
    """Cut the tokens in front of the first layer, gather them behind the last, and arrange what is between."""
    first = next(module for module in layers[0].modules() if isinstance(module, CutModule))
    cut = CutTokens(first, grad_codec)
    inside = GatherTokens(first, "reduce", codec, grad_codec)
    outside = GatherTokens(first, "split", codec, grad_codec)
    for layer in layers:
        for child in layer.children():
            if isinstance(child, nn.Dropout):
                cut_module(child, RankDropout, {}, group)
            elif _is_cut_block(child):
                _open_block(child, inside, group)
            elif any(True for _ in child.parameters()):
                if next(child.children(), None) is None and not isinstance(child, (nn.Linear, Column, Row)):
                    names = tuple(name for name, p in child.named_parameters(recurse=False))
                    cut_module(child, Summed, {}, group, summed=names)
                else:
                    child.register_forward_pre_hook(AtTheDoor(outside), with_kwargs=True)
                    child.register_forward_hook(BehindIt(cut))
    layers[0].register_forward_pre_hook(AtTheDoor(cut), with_kwargs=True)
    layers[-1].register_forward_hook(BehindIt(outside))


def _is_cut_block(module: nn.Module) -> bool:
    """Whether all weights of a module are in column layers, in row layers behind them, and in what lies between."""
    holders = [m for m in module.modules() if any(True for _ in m.parameters(recurse=False))]
    columns = [m for m in holders if isinstance(m, Column) and not m.gather_output]
    rows = [m for m in holders if isinstance(m, Row) and not m.split_input]
    between = [m for m in holders if isinstance(m, Summed)]
    return bool(columns and rows) and len(columns) + len(rows) + len(between) == len(holders)


def _open_block(module: nn.Module, gather: GatherTokens, group: Group) -> None:
    """Gather at the door, scatter in the row layer; what comes behind the row layer sees the rank's tokens."""
    module.register_forward_pre_hook(AtTheDoor(gather), with_kwargs=True)
    seen_row = False
    for child in list(module.modules()):
        if isinstance(child, Column):
            child.entered = True
        elif isinstance(child, Row):
            child.sequence_parallel, child.sequence_dim, seen_row = True, TOKENS, True
        elif isinstance(child, nn.Dropout) and seen_row and not isinstance(child, RankDropout):
            cut_module(child, RankDropout, {}, group)
