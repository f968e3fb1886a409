"""Shard the modules of a resolved model in place, and connect those that work together."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from tpkernels.comm.group import Group
from tpkernels.layers.block_random import BlockRandom
from tpkernels.layers.convert import Tied, convert
from tpkernels.layers.linear import ColumnParallelLinear, RowParallelLinear
from tpkernels.layers.shared_input import SharedInput
from tpkernels.plan.resolved import Resolved
from tpkernels.plan.styles.alibi import LocalAlibiSlopes, takes_alibi
from tpkernels.plan.styles.base import CutSettings
from tpkernels.plan.styles.blocks import Block
from tpkernels.plan.styles.experts import Experts
from tpkernels.plan.styles.modules import HeadParameters


def apply(model: nn.Module, resolved: Resolved, settings: CutSettings) -> None:
    """Shard every module that has a style, in place.

    Args:
        model: the full one, the same on all ranks, for which `resolved` was computed.
        resolved: over as many ranks as the group has.
        settings: the group and the codecs.

    Raises:
        PlanError: modules that share a parameter are sharded in different ways; nothing is changed then.
    """
    tied = Tied(model)
    tied.check(resolved.modules, resolved.parameter_cuts())
    for block in resolved.blocks:
        _apply_to_block(block, resolved, settings.group, tied)
    for name, style in resolved.styles.items():
        style.apply(resolved.modules[name], resolved.cuts.get(name), settings, tied)
    tied.rejoin(model)
    _arrange_random(resolved.modules, resolved.blocks, settings.group)


def _apply_to_block(block: Block, resolved: Resolved, group: Group, tied: Tied) -> None:
    """Set the local attributes of an attention block, and shard parameters of its own."""
    own = block.own_cuts(group.world_size) if block.name not in resolved.styles else {}
    for name, value in block.local_attributes(group.world_size, group.rank).items():
        setattr(block.module, name, value)
    if block.columns and takes_alibi(block.module):
        hook = LocalAlibiSlopes(block.module, block.heads.query, *block.heads.query_of(group.world_size, group.rank))
        block.module.register_forward_pre_hook(hook, with_kwargs=True)
    if own:
        convert(block.module, HeadParameters, own, group, tied)


def _arrange_random(modules: dict[str, nn.Module], blocks: list[Block], group: Group) -> None:
    """Give each rank random numbers of its own between column layers and the row layers behind them."""
    taken = set()
    for block in blocks:
        if block.columns:  # nn.MultiheadAttention draws from the rank's own numbers by itself
            _arrange_stretch(modules, [*block.columns, *block.rows], group)
        taken |= {block.name, *(name.rpartition(".")[0] for name in block.rows)}
    for name, module in modules.items():
        if isinstance(module, Experts):
            BlockRandom(module, group, at_once=True)
        if name in taken:
            continue
        children = {f"{name}.{key}" if name else key: child for key, child in module.named_children()}
        columns = [n for n, m in children.items() if isinstance(m, ColumnParallelLinear) and not m.gather_output]
        rows = [n for n, m in children.items() if isinstance(m, RowParallelLinear) and m.input_is_parallel]
        if columns and rows:
            _arrange_stretch(modules, [*columns, *rows], group)


def _arrange_stretch(modules: dict[str, nn.Module], layers: Sequence[str], group: Group) -> None:
    """Let column and row layers switch to the rank's own numbers and back, within the module around them all."""
    parents = [name.split(".")[:-1] for name in layers]
    around = parents[0]
    while any(parent[: len(around)] != around for parent in parents):
        around = around[:-1]
    random = BlockRandom(modules[".".join(around)], group)
    for name in layers:
        modules[name].random = random  # type: ignore[assignment]


def share_inputs(modules: dict[str, nn.Module]) -> None:
    """Let column layers that are children of one module sum the gradient of a common input once."""
    for module in modules.values():
        columns = [m for m in module.children() if isinstance(m, ColumnParallelLinear)]
        columns = [m for m in columns if not (m.gather_output or m.input_grad_summed)]
        if len(columns) < 2 or columns[0].group.world_size == 1:
            continue
        shared = SharedInput(columns[0].grad_codec)
        for column in columns:
            column.shared = shared
        module.register_forward_pre_hook(shared.begin)
        module.register_forward_hook(shared.end, always_call=True)
