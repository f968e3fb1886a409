"""Sequence parallel for decoders: between the blocks each rank keeps its part of the tokens.

    hidden states [B, S, D]  --cut-->  layer 0 .. layer L-1 on [B, S / R, D]  --gathered-->  [B, S, D]

In a layer, norms, residual sums and dropouts work on the rank's tokens. A block of column and row layers gathers the
tokens once at its door, and its row layer scatters the sums, so that the traffic is that of the all-reduce it replaces.
Any other module with weights (a mixture of experts) sees all tokens, and its result is cut (boundaries.py). S need not
divide by R. What a layer does beside that must treat tokens one by one, which a run shows (tokens.py).

Source: Korthikanti et al. 2022 (arXiv:2205.05198).
"""

from __future__ import annotations

from torch import Tensor, nn

from tpkernels import ops
from tpkernels.comm.group import Group
from tpkernels.errors import PlanError
from tpkernels.layers import take_shard
from tpkernels.plan.derive.inputs import Call
from tpkernels.plan.sequence.boundaries import AtTheDoor, BehindIt, Door, doors
from tpkernels.plan.sequence.tokens import TOKENS, check_tokens
from tpkernels.plan.styles.dropout_rng import BlockRandom, CommonInside
from tpkernels.plan.styles.modules import Column, CutModule, Row, Summed, cut_module
from tpkernels.plan.styles.style import Style


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


def find_doors(
    model: nn.Module, layers: list[nn.Module], styles: dict[nn.Module, Style], inputs: Call | None
) -> list[Door]:
    """Return where tokens are gathered and cut again in the layers, as a run of the model has shown to be right.

    Raises:
        PlanError: there is no way that is.
    """
    reasons = []
    for deep in (False, True):
        found = [door for layer in layers for door in doors(layer, styles, deep=deep)]
        try:
            check_tokens(model, layers, found, inputs)
            return found
        except PlanError as error:
            reasons.append(str(error))
    raise PlanError(
        f"parallelize: sequence_parallel does not apply to {type(model).__name__}: its layers do not handle the tokens "
        f"[B, S, D] one by one: {reasons[0]}" + (f"; or: {reasons[1]}" if reasons[1] != reasons[0] else "")
    )


def cut_sequence(layers: list[nn.Module], found: list[Door], group: Group, codec: str, grad_codec: str) -> None:
    """Cut the tokens in front of the first layer, gather them behind the last, and arrange what is between."""
    first = next(module for module in layers[0].modules() if isinstance(module, CutModule))
    cut = CutTokens(first, grad_codec)
    inside = GatherTokens(first, "reduce", codec, grad_codec)
    outside = GatherTokens(first, "split", codec, grad_codec)
    for door in found:
        module = door.module
        if door.kind == "summed":
            names = tuple(name for name, p in module.named_parameters(recurse=False))
            if not isinstance(module, CutModule):
                cut_module(module, Summed, {}, group, summed=names)
        elif door.kind == "scatter":
            assert isinstance(module, Row)
            module.sequence_parallel, module.sequence_dim = True, TOKENS
        elif door.kind == "gather":
            door.hang(inside, cut)
            for child in module.modules():
                if isinstance(child, Column):
                    child.entered = True
        else:
            CommonInside(module)
            door.hang(outside, cut)
    for layer in layers:
        BlockRandom(layer, group, at_once=True)
    layers[0].register_forward_pre_hook(AtTheDoor(cut), with_kwargs=True)
    layers[-1].register_forward_hook(BehindIt(outside))
