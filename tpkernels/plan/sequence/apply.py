"""Sequence parallel for decoders: between the blocks each rank keeps its shard of the tokens.

    hidden states [B, S, D]  --shard-->  layer 0 .. layer L-1 on [B, S / R, D]  --gather-->  [B, S, D]

In a layer, norms, residual sums and dropouts work on the rank's tokens. In front of a block of column and row layers
the tokens are gathered once, and its row layer scatters the sums: the traffic is that of the all-reduce it replaces.
Any other module with weights (a mixture of experts) gets all tokens, and its result is sharded (boundaries.py). S need
not divide by R. All other ops of a layer must treat tokens one by one, which a run shows (tokens.py).

Source: Korthikanti et al. 2022 (arXiv:2205.05198).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from tpkernels import ops
from tpkernels.errors import PlanError
from tpkernels.layers import take_shard
from tpkernels.layers.block_random import BlockRandom, CommonInside
from tpkernels.layers.convert import ConvertedModule, convert
from tpkernels.layers.linear import ColumnParallelLinear, RowParallelLinear
from tpkernels.layers.reference import Ref
from tpkernels.plan.derive.inputs import Call
from tpkernels.plan.resolved import Resolved
from tpkernels.plan.sequence.boundaries import Boundary, PostHook, PreHook, find_boundaries
from tpkernels.plan.sequence.hidden import GatheredHiddenStates
from tpkernels.plan.sequence.tokens import TOKENS, check_tokens
from tpkernels.plan.styles.base import CutSettings, Style
from tpkernels.plan.styles.modules import Summed


class ShardTokens:
    """Takes this rank's shard of replicated tokens. The group is that of a layer, which `set_group` may change."""

    def __init__(self, layer: ConvertedModule, grad_codec: str) -> None:
        self._layer, self.grad_codec = Ref(layer), grad_codec

    def __call__(self, x: Tensor) -> Tensor:
        """[B, S, D] -> [B, S / R, D]."""
        return take_shard(x, TOKENS, group=self._layer.target.group, grad_codec=self.grad_codec)


class GatherTokens:
    """Gathers the tokens of all ranks; `grad` as in ops.all_gather. The group: as in ShardTokens."""

    def __init__(self, layer: ConvertedModule, grad: str, codec: str, grad_codec: str) -> None:
        self._layer, self.grad, self.codec, self.grad_codec = Ref(layer), grad, codec, grad_codec

    def __call__(self, x: Tensor) -> Tensor:
        """[B, S / R, D] -> [B, S, D]."""
        group = self._layer.target.group
        if group.world_size == 1:
            return x
        return ops.all_gather(x, TOKENS, group=group, grad=self.grad, codec=self.codec, grad_codec=self.grad_codec)


@dataclass
class SequencePlan:
    """The layers of a decoder between which tokens are sharded, and the boundaries inside them."""

    model: nn.Module
    layers: list[nn.Module]
    boundaries: list[Boundary]

    @classmethod
    def of(cls, model: nn.Module, resolved: Resolved, inputs: Call | None) -> SequencePlan:
        """Find the layers and boundaries of a model; the model is not changed.

        Args:
            model: the full one.
            resolved: its styles and attention blocks.
            inputs: (args, kwargs) to run it with; None: sample inputs are made.

        Raises:
            PlanError: the model is no decoder, or no boundaries give what it computes.
        """
        modules = resolved.modules
        layers = check_sequence(model, modules, [block.name for block in resolved.blocks])
        styles = {modules[name]: style for name, style in resolved.styles.items()}
        return cls(model, layers, _checked_boundaries(model, layers, styles, inputs))

    def apply(self, settings: CutSettings) -> None:
        """Shard the tokens in front of the first layer, gather them behind the last, and arrange the layers between.

        The modules of the layers must be parallel layers already.
        """
        group, codec, grad_codec = settings.group, settings.codec, settings.grad_codec
        first = next(module for module in self.layers[0].modules() if isinstance(module, ConvertedModule))
        shard = ShardTokens(first, grad_codec)
        inside = GatherTokens(first, "reduce", codec, grad_codec)
        outside = GatherTokens(first, "split", codec, grad_codec)
        for boundary in self.boundaries:
            module = boundary.module
            if boundary.kind == "summed":
                names = tuple(name for name, p in module.named_parameters(recurse=False))
                if not isinstance(module, ConvertedModule):
                    convert(module, Summed, {}, group, summed=names)
            elif boundary.kind == "scatter":
                assert isinstance(module, RowParallelLinear)
                module.sequence_parallel, module.sequence_dim = True, TOKENS
            elif boundary.kind == "gather":
                boundary.register_hooks(inside, shard)
                for child in module.modules():
                    if isinstance(child, ColumnParallelLinear):
                        child.input_grad_summed = True
            else:
                CommonInside(module)
                boundary.register_hooks(outside, shard)
        for layer in self.layers:
            BlockRandom(layer, group, at_once=True)
        GatheredHiddenStates(outside).watch(self.model, self.layers)
        self.layers[0].register_forward_pre_hook(PreHook(shard), with_kwargs=True)
        self.layers[-1].register_forward_hook(PostHook(outside))


def check_sequence(model: nn.Module, modules: dict[str, nn.Module], blocks: list[str]) -> list[nn.Module]:
    """Return the layers between which tokens are sharded.

    Args:
        model: the full one.
        modules: all of it, by name.
        blocks: the names of its attention blocks.

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
        own = [name for name, _ in layer.named_parameters(recurse=False)]
        if own:
            raise PlanError(f"{why}{type(layer).__name__} has parameters of its own: {own}")
    return layers


def _holds(module: nn.Module, blocks: list[nn.Module]) -> bool:
    return any(child is block for child in module.modules() for block in blocks)


def _inside(module: nn.Module, other: nn.Module) -> bool:
    return any(child is module for child in other.modules())


def _checked_boundaries(
    model: nn.Module, layers: list[nn.Module], styles: dict[nn.Module, Style], inputs: Call | None
) -> list[Boundary]:
    """The boundaries in the layers that a run of the model has shown to be right."""
    reasons = []
    for deep in (False, True):
        found = [boundary for layer in layers for boundary in find_boundaries(layer, styles, deep=deep)]
        try:
            check_tokens(model, layers, found, inputs)
            return found
        except PlanError as error:
            reasons.append(str(error))
    raise PlanError(
        f"parallelize: sequence_parallel does not apply to {type(model).__name__}: its layers do not handle the tokens "
        f"[B, S, D] one by one: {reasons[0]}" + (f"; or: {reasons[1]}" if reasons[1] != reasons[0] else "")
    )
