"""From styles to cuts, and from cuts to modules that are cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from tpkernels.group import Group
from tpkernels.layers.base import Cut
from tpkernels.plan_alibi import OwnSlopes, takes_alibi
from tpkernels.plan_attention import STYLE, cut_attention, cuts_of_attention
from tpkernels.plan_experts import Experts, cut_experts, cut_of_experts
from tpkernels.plan_heads import Block, cuts_of_block, cuts_of_own, sizes_of, tell_heads
from tpkernels.plan_layers import Column, CommonDropout, HeadParameters, Row, Summed, SumTail, Tied, cut_module
from tpkernels.plan_random import BlockRandom
from tpkernels.plan_shared import SharedInput
from tpkernels.plan_styles import LINEAR, PlanError, Style, packed_sizes
from tpkernels.plan_units import IdTable, Table, check_counts, cut_in_units, tell_counts
from tpkernels.shard import packed_runs, shard_info


@dataclass(frozen=True)
class CutSettings:
    """Where and how a model is cut: over which group, and how sums travel forward and backward."""

    group: Group
    codec: str = "none"
    grad_codec: str = "none"


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is the Conv1D of transformers: a linear whose weight is [K, N]."""
    return hasattr(module, "nf") and hasattr(module, "nx") and isinstance(getattr(module, "weight", None), Tensor)


def is_linear(module: nn.Module) -> bool:
    """Whether this is a linear, in either layout of its weight."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def all_cuts(modules: dict[str, nn.Module], styles: dict[str, Style], blocks: list[Block], R: int) -> dict[str, Cut]:
    """Return how the weight of each cut linear, as [N, K], each table and each expert is cut.

    Raises:
        PlanError: a style does not fit its module.
    """
    cuts: dict[str, Cut] = {}
    for block in blocks:
        cuts |= cuts_of_block(block, R)
        if isinstance(block.module, nn.MultiheadAttention):
            cuts[block.name] = next(iter(cuts_of_attention(block.module, R).values()))
        if block.name not in styles:
            cuts_of_own(block, R)
    for name, style in styles.items():
        if style.name == "counts":
            check_counts(name, modules[name], style, R)
        if style.name == "common" and not isinstance(modules[name], _DropoutNd):
            raise PlanError(f"Plan: style 'common' of {name} needs a dropout, got {type(modules[name]).__name__}")
        if name not in cuts:
            cut = _cut_of(name, modules[name], style, R)
            if cut is not None:
                cuts[name] = cut
        if style.name in LINEAR or style.name == "vocab":
            _check_forward(name, modules[name], style)
    return cuts


def _cut_of(name: str, module: nn.Module, style: Style, R: int) -> Cut | None:
    if style.name == "expert":
        return cut_of_experts(name, module)
    if style.name == "vocab":
        if not isinstance(module, nn.Embedding):
            raise PlanError(f"Plan: style 'vocab' of {name} needs an nn.Embedding, got {type(module).__name__}")
        if module.max_norm is not None or module.sparse or module.scale_grad_by_freq:
            raise PlanError(
                f"Plan: {name} uses max_norm, sparse or scale_grad_by_freq, which a cut table does not have"
            )
        return Cut(0, module.num_embeddings)
    if style.name not in LINEAR:
        return None
    if style.name == "column" and isinstance(module, nn.Embedding):
        return cut_in_units(name, 1, module.embedding_dim, style, R) if style.units else Cut(1, module.embedding_dim)
    if not is_linear(module):
        raise PlanError(f"Plan: style {style.name!r} of {name} needs a linear, got {type(module).__name__}")
    N, K = sizes_of(module)
    if style.units:
        return cut_in_units(name, *((1, K) if style.name == "row" else (0, N)), style, R)
    if style.name == "packed_column":
        if not style.packed:
            raise PlanError(f"Plan: packed_column:qkv of {name} needs an attention block around it")
        return Cut(0, N, 1, packed_runs(packed_sizes(style, N, name), R))
    return Cut(1, K) if style.name in ("row", "row_split") else Cut(0, N)


def _check_forward(name: str, module: nn.Module, style: Style) -> None:
    """A subclass with a forward of its own that does not call ours would compute with a part as if it were whole."""
    if not can_be_cut(module):
        cls = type(module)
        raise PlanError(
            f"Plan: {name} is a {cls.__name__} with a forward of its own, so it cannot be cut as {style.name!r}; "
            f"give it 'replicate'"
        )


def can_be_cut(module: nn.Module) -> bool:
    """Whether a linear, Conv1D or embedding computes what its class says, or something around that."""
    forward: Any = type(module).forward
    if forward in (nn.Linear.forward, nn.Embedding.forward) or is_conv1d(module):
        return True
    code = getattr(getattr(forward, "__wrapped__", forward), "__code__", None)
    return code is not None and "__class__" in code.co_freevars  # it calls super()


def apply(module: nn.Module, style: Style, cut: Cut | None, settings: CutSettings, tied: Tied) -> None:
    """Cut one module by its style."""
    group = settings.group
    if style.name == "counts":
        tell_counts(module, style, group.world_size, group.rank)
    elif style.name == STYLE:
        cut_attention(cast(nn.MultiheadAttention, module), group, settings.codec, settings.grad_codec, tied)
    elif style.name == "common":
        cut_module(module, CommonDropout, {}, group)
    elif style.name == "sum_grad":
        names = tuple(name for name, _ in module.named_parameters(recurse=False))
        cut_module(module, Summed, {}, group, tied, summed=names)
    elif style.name == "sum_tail":
        cut_module(module, SumTail, {}, group, tied, tail=style.packed[0])
    elif style.name == "expert":
        assert cut is not None
        cut_experts(module, cut, group, settings.codec, settings.grad_codec, tied)
    elif style.name == "vocab":
        assert cut is not None
        cut_module(module, IdTable, {"weight": cut}, group, tied)
    elif isinstance(module, nn.Embedding) and cut is not None:
        cut_module(module, Table, {"weight": cut}, group, tied)
        module.embedding_dim = _size(module.weight)
    elif cut is not None:
        _apply_linear(module, style, cut, settings, tied)


def _apply_linear(module: nn.Module, style: Style, cut: Cut, settings: CutSettings, tied: Tied) -> None:
    transposed = is_conv1d(module)
    cuts = {"weight": Cut(1 - cut.dim, cut.full_size, cut.unit, cut.runs) if transposed else cut}
    common: dict[str, Any] = {
        "codec": settings.codec, "grad_codec": settings.grad_codec, "transposed": transposed, "random": None,
    }  # fmt: skip
    if style.name in ("row", "row_split"):
        split = style.name == "row_split"
        common |= {"split_input": split, "sequence_parallel": False, "sequence_dim": 1}
        cut_module(module, Row, cuts, settings.group, tied, **common)
        if not split:
            setattr(module, "nx" if transposed else "in_features", _size(module.weight))
        return
    if module.bias is not None:
        cuts["bias"] = cut
    gathers = style.name in ("column_gather", "vocab_head")
    cut_module(module, Column, cuts, settings.group, tied, gather_output=gathers, entered=False, **common)
    if not gathers:
        setattr(module, "nf" if transposed else "out_features", _size(module.weight))


def _size(parameter: Any) -> int:
    info = shard_info(cast(Tensor, parameter))
    assert info is not None
    return info.size


def arrange_random(modules: dict[str, nn.Module], blocks: list[Block], group: Group) -> None:
    """Give what lies between column layers and the row layers behind them random numbers of the rank's own."""
    taken = set()
    for block in blocks:
        if block.columns:  # nn.MultiheadAttention goes over to them by itself
            _stretch(modules, [*block.columns, *block.rows], group)
        taken |= {block.name, *(name.rpartition(".")[0] for name in block.rows)}
    for name, module in modules.items():
        if isinstance(module, Experts):
            BlockRandom(module, group, at_once=True)
        if name in taken:
            continue
        children = {f"{name}.{key}" if name else key: child for key, child in module.named_children()}
        columns = [n for n, m in children.items() if isinstance(m, Column) and not m.gather_output]
        rows = [n for n, m in children.items() if isinstance(m, Row) and not m.split_input]
        if columns and rows:
            _stretch(modules, [*columns, *rows], group)


def share_inputs(modules: dict[str, nn.Module]) -> None:
    """Let column layers that are children of one module share what they are handed."""

    for module in modules.values():
        columns = [m for m in module.children() if isinstance(m, Column) and not (m.gather_output or m.entered)]
        if len(columns) < 2 or columns[0].group.world_size == 1:
            continue
        shared = SharedInput(columns[0].grad_codec)
        for column in columns:
            column.shared = shared
        module.register_forward_pre_hook(shared.begin)
        module.register_forward_hook(shared.end, always_call=True)


def unsaid(modules: dict[str, nn.Module], styles: dict[str, Style]) -> list[str]:
    """Return the modules with weights that lie beside column and row layers, and that the plan says nothing about.

    Whether such a module sees this rank's part only, so that its gradients are partial, depends on the forward.
    """
    found = []
    for name, module in modules.items():
        inside = [f"{name}.{child}" if name else child for child, _ in module.named_children()]
        names = {styles[child].name for child in inside if child in styles}
        if {"column", "packed_column"} & names and "row" in names:
            found += [
                child
                for child in inside
                if child not in styles and any(True for _ in modules[child].parameters(recurse=False))
            ]
    return found


def apply_to_blocks(blocks: list[Block], styles: dict[str, Style], settings: CutSettings, tied: Tied) -> None:
    """Tell attention blocks how many heads they have on this rank, and cut parameters of their own."""
    group = settings.group
    for block in blocks:
        own = cuts_of_own(block, group.world_size) if block.name not in styles else {}
        tell_heads(block, group.world_size, group.rank)
        if block.columns and takes_alibi(block.module):
            hook = OwnSlopes(block.module, block.heads.query, *block.heads.query_of(group.world_size, group.rank))
            block.module.register_forward_pre_hook(hook, with_kwargs=True)
        if own:
            cut_module(block.module, HeadParameters, own, group, tied)


def _stretch(modules: dict[str, nn.Module], layers: Sequence[str], group: Group) -> None:
    """Let column and row layers go over to the rank's own numbers and back, within the module around them all."""
    parents = [name.split(".")[:-1] for name in layers]
    around = parents[0]
    while any(parent[: len(around)] != around for parent in parents):
        around = around[:-1]
    random = BlockRandom(modules[".".join(around)], group)
    for name in layers:
        modules[name].random = random  # type: ignore[assignment]
