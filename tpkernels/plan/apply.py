"""From styles to cuts, and from cuts to modules that are cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from tpkernels.comm.group import Group
from tpkernels.layers.base import Cut
from tpkernels.plan.cuts import (
    is_conv1d,
)
from tpkernels.plan.styles.alibi import OwnSlopes, takes_alibi
from tpkernels.plan.styles.attention import STYLE, cut_attention
from tpkernels.plan.styles.dropout_rng import BlockRandom
from tpkernels.plan.styles.experts import Experts, cut_experts
from tpkernels.plan.styles.heads import Block, cuts_of_own, tell_heads
from tpkernels.plan.styles.modules import Column, CommonDropout, HeadParameters, Row, Summed, SumTail, Tied, cut_module
from tpkernels.plan.styles.shared_input import SharedInput
from tpkernels.plan.styles.style import Style
from tpkernels.plan.styles.units import IdTable, Table, tell_counts
from tpkernels.shard import shard_info


@dataclass(frozen=True)
class CutSettings:
    """Where and how a model is cut: over which group, and how sums travel forward and backward."""

    group: Group
    codec: str = "none"
    grad_codec: str = "none"


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
