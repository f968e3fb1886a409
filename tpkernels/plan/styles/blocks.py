"""Attention blocks: which modules are, how their projections are sharded by heads, and their local attributes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from tpkernels.errors import PlanError
from tpkernels.layers.base import Cut
from tpkernels.plan.styles.attention import MultiheadAttentionStyle
from tpkernels.plan.styles.base import Style, sizes_of
from tpkernels.plan.styles.heads import HEAD_SIZE, HEADS, KV_HEADS, WIDTHS, Heads, LocalConfig, number
from tpkernels.plan.styles.linear import ColumnStyle, PackedColumnStyle
from tpkernels.shard import Runs, merge_runs


@dataclass
class Block:
    """An attention block of a model.

    Attributes:
        name, module: of the block.
        columns: the linears that compute its heads: {name: (module, style)}; none for an nn.MultiheadAttention, which
            computes them itself and keeps the numbers of all heads.
        rows: the linears that take the heads.
        heads: their numbers.
    """

    name: str
    module: nn.Module
    columns: dict[str, tuple[nn.Module, Style]]
    rows: dict[str, nn.Module]
    heads: Heads

    @property
    def width(self) -> int:
        """The number of features of all query heads together."""
        return sizes_of(next(iter(self.rows.values())))[1]

    def cuts(self, R: int) -> dict[str, Cut]:
        """Return how the weights [N, K] of the block's linears are sharded over R ranks: {name: Cut}.

        Raises:
            PlanError: there are not enough heads for R ranks.
        """
        heads = self.heads
        if heads.query < R or any(heads.query_of(R, rank)[1] == 0 for rank in range(R)):
            raise PlanError(f"Plan: {self.name} has {heads.query} heads, which leaves some of {R} ranks with none")
        found = {}
        for name, (linear, style) in self.columns.items():
            size = sizes_of(linear)[0]
            if isinstance(style, PackedColumnStyle):
                found[name] = _packed(name, size, style, heads, self.width, R)
            else:
                found[name] = _cut(0, size, heads, R, is_query=size >= self.width)
        for name, linear in self.rows.items():
            found[name] = _cut(1, sizes_of(linear)[1], heads, R, is_query=True)
        return found

    def own_cuts(self, R: int) -> dict[str, Cut]:
        """Return how the block's own parameters are sharded, such as a number for each head (attention sinks).

        Raises:
            PlanError: they are not one for each query head.
        """
        own = dict(self.module.named_parameters(recurse=False))
        odd = [name for name, p in own.items() if p.dim() < 1 or p.size(0) != self.heads.query]
        if odd:
            raise PlanError(
                f"Plan: {self.name} has parameters of its own, {odd}, that are not one for each of its "
                f"{self.heads.query} heads"
            )
        return {name: _cut(0, self.heads.query, self.heads, R, is_query=True) for name in own}

    def local_attributes(self, R: int, rank: int) -> dict[str, Any]:
        """Return the attributes of the block's module that depend on its heads, with the values of a rank."""
        if not self.columns:
            return {}
        heads, full = self.heads, vars(self.module)
        query, kv = heads.query_of(R, rank)[1], heads.kv_of(R, rank)[1]
        found: dict[str, Any] = {}
        for names, size, local in (
            (KV_HEADS, heads.kv, kv),
            (HEADS, heads.query, query),
            (WIDTHS, self.width, self.width // heads.query * query),
        ):
            found |= {name: local for name in names if full.get(name) == size}
        packed = (style for _, style in self.columns.values() if isinstance(style, PackedColumnStyle))
        if hasattr(self.module, "config") and any(len(style.packed) != 1 for style in packed):
            own = {"num_attention_heads": query, "num_key_value_heads": kv}
            found["config"] = LocalConfig(self.module.config, **own)
        if "num_key_value_groups" in full:
            found["num_key_value_groups"] = query // kv
        return found


def find_blocks(modules: dict[str, nn.Module], styles: dict[str, Style]) -> Iterator[Block]:
    """Find the attention blocks whose heads a plan shards: modules with the size or number of their heads.

    Args:
        modules: all of the model.
        styles: of those that have one.

    Raises:
        PlanError: a block makes heads that no row layer takes, or its sizes are no multiple of its heads.
    """
    taken: set[str] = set()
    order = [name for name in modules if name in styles]
    for name, module in modules.items():
        if isinstance(styles.get(name), MultiheadAttentionStyle):
            out, count = f"{name}.out_proj", number(module, HEADS) or 1
            yield Block(name, module, {}, {out: modules[out]}, Heads(count, count))
        if name in styles or (number(module, HEAD_SIZE) is None and number(module, HEADS) is None):
            continue
        if _has_the_heads_of_a_child(module):
            continue
        columns = {
            child: (modules[child], styles[child])
            for child in order
            if _parent(child, modules) == name
            and styles[child].role == "column"
            and not isinstance(modules[child], nn.Embedding)
        }
        if not columns:
            continue
        rows = _rows_behind(name, list(columns), order, modules, styles, taken)
        if not rows:
            raise PlanError(f"Plan: {name} makes heads in {list(columns)}, and no row layer takes them")
        taken.update(rows)
        yield Block(name, module, columns, rows, _count(name, module, columns, rows))


def _parent(name: str, modules: dict[str, nn.Module]) -> str:
    """The module that a linear belongs to: the one around it, past modules that hold one linear only (Gemma 4)."""
    parent = name.rpartition(".")[0]
    around = modules[parent]
    own = len(around._modules) == 1 and not around._parameters
    if not parent or not own or number(around, HEAD_SIZE) is not None or number(around, HEADS) is not None:
        return parent
    return _parent(parent, modules)


def _has_the_heads_of_a_child(module: nn.Module) -> bool:
    """Whether the heads that the module has the numbers of are those of an nn.MultiheadAttention in it."""
    children = [child for child in module.children() if isinstance(child, nn.MultiheadAttention)]
    return any(number(module, names) == number(child, names) for child in children for names in (HEADS, HEAD_SIZE))


def _rows_behind(
    name: str,
    columns: list[str],
    order: list[str],
    modules: dict[str, nn.Module],
    styles: dict[str, Style],
    taken: set[str],
) -> dict[str, nn.Module]:
    """The row layers of the block itself, else the next one behind it (BERT keeps it in a module of its own)."""
    rows = [child for child in order if child.startswith(f"{name}.") and styles[child].role == "row"]
    if not rows:
        behind = order[order.index(columns[-1]) + 1 :]
        rows = [child for child in behind if styles[child].role == "row" and child not in taken][:1]
    return {child: modules[child] for child in rows}


def _count(
    name: str, module: nn.Module, columns: dict[str, tuple[nn.Module, Style]], rows: dict[str, nn.Module]
) -> Heads:
    """The numbers of heads: from the sizes of the layers and of a head, else from the module's attributes."""
    config = _config_of(module)
    size = number(module, HEAD_SIZE)
    widths = [sizes_of(linear)[0] for linear, _ in columns.values()]
    width = sizes_of(next(iter(rows.values())))[1]
    stated = number(module, HEADS) or number(config, HEADS)
    query = stated if stated and width % stated == 0 else width // size if size and width % size == 0 else None
    if query is None:
        raise PlanError(f"Plan: {name} does not say how many heads it has ({HEADS} or the size of a head, {HEAD_SIZE})")
    kv = number(module, KV_HEADS) or number(config, KV_HEADS)
    if len(columns) > 1 and size and query * size == width and all(w % size == 0 for w in widths):
        kv = min(*widths, width) // size
    units = {style.units for _, style in columns.values()} - {0}
    if len(units) == 1:  # of a derived plan
        kv = min(units)
    elif len(widths) == 1 and _packs_equal(*next(iter(columns.values())), width):
        kv = query
    heads = Heads(query, kv if kv is not None and kv < query else query)
    uneven = [w for w in (*widths, width) if w % heads.kv]
    if uneven or heads.query % heads.kv:
        raise PlanError(
            f"Plan: {name} has {heads.query} heads / {heads.kv} kv heads, and layers of {widths} outputs and {width} "
            f"inputs, which are no multiple of them"
        )
    return heads


def _config_of(module: nn.Module) -> Any:
    """The config of a block's layer: a config whose layers differ (Gemma 4) does not answer for all of them."""
    config: Any = getattr(module, "config", None)
    place = getattr(module, "layer_idx", None)
    if not getattr(config, "is_heterogeneous", False):
        return config
    return config.per_layer_config[place] if isinstance(place, int) else None


def _packs_equal(linear: nn.Module, style: Style, width: int) -> bool:
    """Whether a fused linear has as many keys and values as queries: one behind the other, or head by head."""
    size = sizes_of(linear)[0]
    if isinstance(style, PackedColumnStyle):
        return bool(style.packed) and set(style.sizes(size, "a fused linear")) == {width}
    return isinstance(style, ColumnStyle) and size == 3 * width


def _cut(dim: int, size: int, heads: Heads, R: int, *, is_query: bool) -> Cut:
    if heads.kv >= R:
        return Cut(dim, size, size // heads.kv)
    return Cut(dim, size, 1, tuple(merge_runs(_runs(0, size, heads, R, rank, is_query)) for rank in range(R)))


def _runs(at: int, size: int, heads: Heads, R: int, rank: int, is_query: bool) -> Runs:
    """The places of a rank's heads in a projection of `size` that begins at `at`."""
    start, count = heads.query_of(R, rank) if is_query else heads.kv_of(R, rank)
    unit = size // (heads.query if is_query else heads.kv)
    return ((at + start * unit, count * unit),)


def _packed(name: str, size: int, style: PackedColumnStyle, heads: Heads, width: int, R: int) -> Cut:
    """Fused projections: the first is that of the queries, and so are others that are as wide."""
    if not style.packed:
        unit = width // heads.query
        style = PackedColumnStyle(packed=(width, heads.kv * unit, heads.kv * unit))
    sizes = style.sizes(size, name)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    runs = [
        merge_runs([r for at, n in zip(starts, sizes, strict=True) for r in _runs(at, n, heads, R, rank, n == width)])
        for rank in range(R)
    ]
    return Cut(0, size, 1, tuple(runs))
