"""Inputs and outputs of a sharded model: attention weights and hidden states are gathered, full caches are refused."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from tpkernels import ops
from tpkernels.comm.group import Group
from tpkernels.errors import PlanError
from tpkernels.layers.convert import group_of
from tpkernels.plan.resolved import Resolved
from tpkernels.plan.styles.blocks import Block
from tpkernels.plan.styles.heads import HEAD_SIZE, HEADS, Heads, number
from tpkernels.plan.styles.replicated import CountsStyle


@dataclass
class _Seen:
    """Attention weights that a block returned.

    Attributes:
        local: [N, this rank's heads, L, S].
        first: the first of these heads.
        heads: the number of heads of all ranks.
        group: of the ranks.
    """

    local: Tensor
    first: int
    heads: int
    group: Group

    def gathered(self) -> Tensor:
        """Return [N, heads, L, S] on every rank; the gradient of this rank's heads is its own."""
        around = (self.first, self.heads - self.first - self.local.size(1))
        return ops.all_reduce(F.pad(self.local, (0, 0, 0, 0, *around)), group=self.group)


class Part(Protocol):
    """A tensor that a module inside a model returned.

    Attributes:
        local: what this rank has of it.
    """

    local: Tensor

    def gathered(self) -> Tensor:
        """Return what all ranks have, on every rank."""


class GatheredOutputs:
    """Replaces tensors of this rank by those of all ranks in what a model returns for an option of its forward.

    They are found in the model's output by the tensors and not by names or places, so that tuples and outputs of any
    class work.

    Args:
        option: the name of the option.
    """

    def __init__(self, option: str) -> None:
        self._option = option
        self._wanted: list[bool] = []  # of the models that are running, the outer ones first
        self._seen: list[Part] = []

    def surround(self, model: nn.Module) -> None:
        """Register hooks on a model that takes the option."""
        model.register_forward_pre_hook(self.begin, with_kwargs=True)
        model.register_forward_hook(self.end, with_kwargs=True, always_call=True)

    def begin(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of a model: note whether it returns such tensors."""
        wanted = kwargs.get(self._option)
        if wanted is None and args:
            names = list(inspect.signature(type(module).forward).parameters)[1:]
            wanted = dict(zip(names, args, strict=False)).get(self._option)
        self._wanted.append(bool(getattr(module.config, self._option, False) if wanted is None else wanted))

    def end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Forward hook of a model, also when it raised: replace the tensors of this rank by those of all."""
        seen = list(self._seen) if self._wanted and self._wanted.pop() else []
        if not any(self._wanted):
            self._seen.clear()
        return tree_map(lambda x: next((s.gathered() for s in seen if s.local is x), x), output) if seen else None


def takes_options(module: nn.Module) -> bool:
    """Whether a module is a model of transformers."""
    return hasattr(module, "config") and hasattr(module, "main_input_name")


class GatheredAttentions(GatheredOutputs):
    """Gathers the attention weights that a model returns for output_attentions.

    Attention blocks return those of their rank's heads.
    """

    def __init__(self) -> None:
        super().__init__("output_attentions")

    def watch(self, model: nn.Module, resolved: Resolved, group: Group) -> None:
        """Register hooks on the models in `model` that hold sharded attention, and on its blocks.

        Args:
            model: sharded already.
            resolved: its blocks and styles.
            group: over which it is sharded.
        """
        modules, styles = dict(model.named_modules()), resolved.styles
        cut = [block for block in resolved.blocks if block.columns]
        heads: dict[str, Heads | None] = {block.name: block.heads for block in cut}
        for name, style in styles.items():  # a derived plan cuts into units, of one head or several
            if isinstance(style, CountsStyle):
                heads[name] = Heads(style.units, style.units)
        for name, style in styles.items():
            if style.units and not isinstance(style, CountsStyle):
                heads.setdefault(name.rpartition(".")[0])  # which heads the rank has is not known
        if group.world_size == 1:
            return
        for name, module in modules.items():
            inside = [n for n in heads if n.startswith(f"{name}." if name else "")]
            if inside and takes_options(module):
                here = [block for block in cut if block.name in inside]
                module.register_forward_pre_hook(CacheCheck(module, here, group), with_kwargs=True)
                self.surround(module)
        for name, found in heads.items():
            modules[name].register_forward_hook(BlockWatch(self._seen, self._wanted, found, group))


class BlockWatch:
    """A hook of an attention block that notes the attention weights it returns while a model around returns them."""

    def __init__(self, seen: list[Part], wanted: list[bool], heads: Heads | None, group: Group) -> None:
        self._seen, self._wanted, self._heads, self._group = seen, wanted, heads, group

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Note the tensors [N, heads of this rank, L, S] of the output.

        Raises:
            PlanError: there are such, and which heads the rank has is unknown.
        """
        if not any(self._wanted) or not isinstance(output, tuple | list):
            return
        group = group_of(module, self._group)
        if self._heads is None:
            if any(isinstance(x, Tensor) and x.dim() == 4 for x in output):
                raise PlanError(
                    f"output_attentions: the plan of {type(module).__name__} does not say which heads a rank has, so "
                    f"that their weights cannot be put together: ask the uncut model for them"
                )
            return
        first, count = self._heads.query_of(group.world_size, group.rank)
        for x in output:
            if isinstance(x, Tensor) and x.dim() == 4 and x.size(1) and x.size(1) % count == 0:
                each = x.size(1) // count  # more than one where the plan knows units of several heads only
                self._seen.append(_Seen(x, first * each, self._heads.query * each, group))


class CacheCheck:
    """A pre-hook of a model that refuses a cache of keys and values of all heads (made early, or by another model)."""

    def __init__(self, model: nn.Module, blocks: list[Block], group: Group) -> None:
        self._heads: dict[int, set[tuple[int, int]]] = {}
        cut = {block.module: block.heads for block in blocks}
        for module in model.modules():
            place = getattr(module, "layer_idx", None)
            if isinstance(place, int) and (module in cut or number(module, HEADS) or number(module, HEAD_SIZE)):
                heads = cut.get(module)  # None: replicated attention, with a cache of all heads
                mine = heads.kv_of(group.world_size, group.rank)[1] if heads else 0
                self._heads.setdefault(place, set()).add((heads.kv if heads else 0, mine))

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Compare the heads of the cache's layers with those of the blocks.

        Raises:
            PlanError: a layer of the cache holds the heads of all ranks.
        """
        for place, keys in _keys_of(kwargs.get("past_key_values")):
            known = self._heads.get(place, set())
            if (0, 0) not in known and keys.size(1) in {whole for whole, _ in known} - {mine for _, mine in known}:
                raise PlanError(
                    f"layer {place} of past_key_values has the {keys.size(1)} key and value heads of the whole model, "
                    f"expected this rank's {sorted(mine for _, mine in known)}: let the cut model make its caches "
                    f"itself (a StaticCache without early_initialization), or give early_initialization those numbers"
                )


def _keys_of(cache: Any) -> Iterator[tuple[int, Tensor]]:
    for own in (cache, getattr(cache, "self_attention_cache", None), getattr(cache, "cross_attention_cache", None)):
        for place, layer in enumerate(getattr(own, "layers", None) or ()):
            keys = getattr(layer, "keys", None)
            if isinstance(keys, Tensor) and keys.dim() == 4:
                yield place, keys


class Refusal:
    """Replaces a method that would take this rank's shards for full parameters."""

    def __init__(self, model: nn.Module, method: str, instead: str) -> None:
        self._kind, self._method, self._instead = type(model).__name__, method, instead

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Raise PlanError with the alternative."""
        raise PlanError(f"{self._kind}.{self._method}: the model is cut, and this needs the uncut one: {self._instead}")


# Methods of models of transformers that a sharded model refuses, and the alternatives.
REFUSED = {
    "resize_token_embeddings": "resize before parallelize (or save_pretrained, load, resize, and cut again)",
    "resize_position_embeddings": "resize before parallelize",
    "init_weights": "it would draw the same numbers for every rank's part: initialise before parallelize",
    "initialize_weights": "it would draw the same numbers for every rank's part: initialise before parallelize",
    "dequantize": "only unquantised models are cut",
    **dict.fromkeys(
        ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager"),
        "each rank would schedule requests by its own clock: take `tpkernels serve`, or tpkernels.generate.Generator",
    ),
    "push_to_hub": "call save_pretrained on all ranks, and push the folder from one",
    "prune_heads": "prune before parallelize",
    "set_input_embeddings": "put other embeddings in before parallelize",
    "set_output_embeddings": "put another head in before parallelize",
}


def refuse_methods(model: nn.Module) -> None:
    """Make methods of a model of transformers raise that would be wrong once it is sharded."""
    for method, instead in REFUSED.items():
        if hasattr(type(model), method):
            setattr(model, method, Refusal(model, method, instead))
