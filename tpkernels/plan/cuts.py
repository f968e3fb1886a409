"""Which values of each weight every rank keeps: the `Cut` of each module that a plan names."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from tpkernels.errors import PlanError
from tpkernels.layers.base import Cut
from tpkernels.plan.styles.attention import cuts_of_attention
from tpkernels.plan.styles.experts import cut_of_experts
from tpkernels.plan.styles.heads import Block, cuts_of_block, cuts_of_own, sizes_of
from tpkernels.plan.styles.style import LINEAR, Style, packed_sizes
from tpkernels.shard import packed_runs


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


def cut_in_units(name: str, dim: int, size: int, style: Style, R: int) -> Cut:
    """Return the cut of a dimension into `style.units` units, or of each packed projection into as many.

    Raises:
        PlanError: there are fewer units than ranks, or the size is no multiple of them.
    """
    check_units(name, style, R)
    sizes = packed_sizes(style, size, name) if style.name == "packed_column" else [size]
    if any(n % style.units for n in sizes):
        raise PlanError(f"Plan: {name} is to be cut into {style.units} units, of which {sizes} is no multiple")
    if len(sizes) == 1:
        return Cut(dim, size, size // style.units)
    return Cut(dim, size, 1, packed_runs(sizes, R, [n // style.units for n in sizes]))


def check_units(name: str, style: Style, R: int) -> None:
    """Raise PlanError when some ranks would have none of the units."""
    if style.units < R:
        raise PlanError(f"Plan: {name} is cut into {style.units} units, which leaves some of {R} ranks with none")


def check_counts(name: str, module: nn.Module, style: Style, R: int) -> None:
    """Raise PlanError unless the numbers that a style names are there and can be cut."""
    check_units(name, style, R)
    for count in style.counts:
        whole = getattr(module, count, None)
        if not isinstance(whole, int) or whole % style.units:
            raise PlanError(
                f"Plan: {count} of {name} ({type(module).__name__}) must be a multiple of {style.units}, got {whole}"
            )
