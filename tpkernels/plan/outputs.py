"""What goes in and out of a cut model by heads: attention weights are gathered, caches of all heads are refused."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from tpkernels import ops
from tpkernels.comm.group import Group
from tpkernels.errors import PlanError
from tpkernels.plan.styles.heads import HEAD_SIZE, HEADS, Block, Heads, number
from tpkernels.plan.styles.modules import group_of
from tpkernels.plan.styles.style import Style


@dataclass
class _Seen:
    """Attention weights [N, this rank's heads, L, S] that a block gave, where its heads lie, and how many there are."""

    weights: Tensor
    first: int
    heads: int
    group: Group

    def whole(self) -> Tensor:
        """All ranks' heads, on every rank; the gradient is that of this rank's."""
        around = (self.first, self.heads - self.first - self.weights.size(1))
        return ops.all_reduce(F.pad(self.weights, (0, 0, 0, 0, *around)), group=self.group)


class GatheredAttentions:
    """Gathers the attention weights that a model returns where its caller asks for them (output_attentions).

    Attention blocks give those of their rank's heads. Which tensors of an output are such is told by the tensors and
    not by their names or places, so that tuples and outputs of any class are served.
    """

    def __init__(self) -> None:
        self._asked: list[bool] = []  # of the models that are running, the outer ones first
        self._seen: list[_Seen] = []

    def watch(self, model: nn.Module, blocks: list[Block], styles: dict[str, Style], group: Group) -> None:
        """Hook the models in `model` that hold cut attention, and its blocks. The model is cut already."""
        modules = dict(model.named_modules())
        cut = [block for block in blocks if block.columns]
        heads: dict[str, Heads | None] = {block.name: block.heads for block in cut}
        for name, style in styles.items():  # a derived plan cuts into units, of one head or several
            if style.name == "counts":
                heads[name] = Heads(style.units, style.units)
        for name in [n.rpartition(".")[0] for n, style in styles.items() if style.units and style.name != "counts"]:
            heads.setdefault(name)  # which heads of its own the rank has is not known
        if group.world_size == 1:
            return
        for name, module in modules.items():
            inside = [n for n in heads if n.startswith(f"{name}." if name else "")]
            if inside and hasattr(module, "config") and hasattr(module, "main_input_name"):
                here = [block for block in cut if block.name in inside]
                module.register_forward_pre_hook(CacheCheck(module, here, group), with_kwargs=True)
                module.register_forward_pre_hook(self.begin, with_kwargs=True)
                module.register_forward_hook(self.end, with_kwargs=True, always_call=True)
        for name, found in heads.items():
            modules[name].register_forward_hook(BlockWatch(self._seen, self._asked, found, group))

    def begin(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook in front of a model."""
        asks = kwargs.get("output_attentions")
        if asks is None and args:
            names = list(inspect.signature(type(module).forward).parameters)[1:]
            asks = dict(zip(names, args, strict=False)).get("output_attentions")
        self._asked.append(bool(getattr(module.config, "output_attentions", False) if asks is None else asks))

    def end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Hook behind it, also when it raised."""
        seen = list(self._seen) if self._asked and self._asked.pop() else []
        if not any(self._asked):
            self._seen.clear()
        return tree_map(lambda x: next((s.whole() for s in seen if s.weights is x), x), output) if seen else None


class BlockWatch:
    """A hook behind an attention block that notes the attention weights it gives while somebody asks for them."""

    def __init__(self, seen: list[_Seen], asked: list[bool], heads: Heads | None, group: Group) -> None:
        self._seen, self._asked, self._heads, self._group = seen, asked, heads, group

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Look at the output for tensors of this rank's heads."""
        if not any(self._asked) or not isinstance(output, tuple | list):
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
    """A hook in front of a model that refuses a cache of keys and values of all heads (made early, or by another)."""

    def __init__(self, model: nn.Module, blocks: list[Block], group: Group) -> None:
        self._heads: dict[int, set[tuple[int, int]]] = {}
        cut = {block.module: block.heads for block in blocks}
        for module in model.modules():
            place = getattr(module, "layer_idx", None)
            if isinstance(place, int) and (module in cut or number(module, HEADS) or number(module, HEAD_SIZE)):
                heads = cut.get(module)  # None: attention that is whole on every rank, whose cache is, too
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
    """Stands in the place of a method that would treat this rank's parts as the whole."""

    def __init__(self, model: nn.Module, method: str, instead: str) -> None:
        self._kind, self._method, self._instead = type(model).__name__, method, instead

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Raise PlanError: says what to do."""
        raise PlanError(
            f"{self._kind}.{self._method}: the model is cut, and this needs the whole weights: {self._instead}"
        )


# Methods of models of transformers that are refused once they are cut, and what to do.
REFUSED = {
    "resize_token_embeddings": "resize before parallelize (or save_pretrained, load, resize, and cut again)",
    "resize_position_embeddings": "resize before parallelize",
    "init_weights": "it would draw the same numbers for every rank's part: initialise before parallelize",
    "initialize_weights": "it would draw the same numbers for every rank's part: initialise before parallelize",
    "dequantize": "only unquantised models are cut",
    "push_to_hub": "call save_pretrained on all ranks, and push the folder from one",
    "prune_heads": "prune before parallelize",
    "set_input_embeddings": "put other embeddings in before parallelize",
    "set_output_embeddings": "put another head in before parallelize",
}


def refuse_methods(model: nn.Module) -> None:
    """Let methods of a model of transformers that would go wrong once it is cut say so."""
    for method, instead in REFUSED.items():
        if hasattr(type(model), method):
            setattr(model, method, Refusal(model, method, instead))
