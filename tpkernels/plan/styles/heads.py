"""Attention blocks: which module is one, how its heads are cut, and what its module must know about them.

Heads are cut by whole groups, a key and value head with the query heads that look at it, by the rule of shard.py: 9
heads with 3 key and value heads over 2 ranks are 6 + 3 and 2 + 1. With more ranks than key and value heads, each
of these is held by several ranks, which share its query heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from tpkernels.errors import PlanError
from tpkernels.layers.base import Cut
from tpkernels.plan.styles.style import Style, packed_sizes
from tpkernels.shard import Runs, merge_runs, part_size, part_start

# What the modules of transformers call the size of a head, ...
HEAD_SIZE = (
    "head_dim",
    "attention_head_size",
    "key_value_proj_dim",
    "head_size",
    "dim_per_head",
    "d_head",
    "qk_head_dim",
)
# ... the number of heads, of key and value heads, and the width of all heads together.
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_q_heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_n_heads", "kv_heads")
WIDTHS = ("all_head_size", "inner_dim", "split_size", "embed_dim", "hidden_size", "attn_hidden_size")


@dataclass(frozen=True)
class Heads:
    """The heads of a block: `query` of them, in groups that share one of `kv` key and value heads."""

    query: int
    kv: int

    @property
    def group(self) -> int:
        """Query heads to a key and value head."""
        return self.query // self.kv

    def query_of(self, R: int, rank: int) -> tuple[int, int]:
        """Return the first query head of a rank and how many it has."""
        if self.kv >= R:
            start, count = self.kv_of(R, rank)
            return start * self.group, count * self.group
        sharers = [r for r in range(R) if self.kv_of(R, r) == self.kv_of(R, rank)]
        place, head = sharers.index(rank), self.kv_of(R, rank)[0]
        return (
            head * self.group + part_start(self.group, len(sharers), place),
            part_size(self.group, len(sharers), place),
        )

    def kv_of(self, R: int, rank: int) -> tuple[int, int]:
        """Return the first key and value head of a rank and how many it has."""
        if self.kv >= R:
            return part_start(self.kv, R, rank), part_size(self.kv, R, rank)
        ends = [part_start(R, self.kv, head) + part_size(R, self.kv, head) for head in range(self.kv)]
        return next(head for head, end in enumerate(ends) if rank < end), 1

    def text(self, R: int) -> str:
        """Say how they are cut: "9 heads / 3 kv heads over 2 ranks as 6+3 / 2+1"."""
        query = "+".join(str(self.query_of(R, rank)[1]) for rank in range(R))
        if self.kv == self.query:
            return f"{self.query} heads over {R} ranks as {query}"
        kv = "+".join(str(self.kv_of(R, rank)[1]) for rank in range(R))
        shared = " (shared)" if self.kv < R else ""
        return f"{self.query} heads / {self.kv} kv heads over {R} ranks as {query} / {kv}{shared}"


@dataclass
class Block:
    """An attention block of a model.

    Attributes:
        name, module: of the block.
        columns: its linears that make heads: {name: (module, style)}; none of an nn.MultiheadAttention, which makes
            them itself and goes on telling the numbers of the whole.
        rows: its linears that take the heads.
        heads: how many.
    """

    name: str
    module: nn.Module
    columns: dict[str, tuple[nn.Module, Style]]
    rows: dict[str, nn.Module]
    heads: Heads


def sizes_of(module: nn.Module) -> tuple[int, int]:
    """Return (out_features, in_features) of a linear or of a Conv1D."""
    if hasattr(module, "nf"):
        return int(module.nf), int(module.nx)  # type: ignore[arg-type]
    return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]


def number(module: Any, names: tuple[str, ...]) -> int | None:
    """Return the first of these attributes that is a whole number."""
    for name in names:
        value = getattr(module, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def find_blocks(modules: dict[str, nn.Module], styles: dict[str, Style]) -> Iterator[Block]:
    """Find the attention blocks whose heads the plan cuts: modules that know the size or number of their heads.

    Args:
        modules: all of the model.
        styles: of those that have one.

    Raises:
        PlanError: a block makes heads that no row layer takes, or its sizes are no multiple of its heads.
    """
    taken: set[str] = set()
    order = [name for name in modules if name in styles]
    for name, module in modules.items():
        if name in styles and styles[name].name == "multihead_attention":
            out, count = f"{name}.out_proj", number(module, HEADS) or 1
            yield Block(name, module, {}, {out: modules[out]}, Heads(count, count))
        if name in styles or (number(module, HEAD_SIZE) is None and number(module, HEADS) is None):
            continue
        if _tells_of_a_child(module):
            continue
        columns = {
            child: (modules[child], styles[child])
            for child in order
            if child.rpartition(".")[0] == name
            and styles[child].name in ("column", "packed_column")
            and not isinstance(modules[child], nn.Embedding)
        }
        if not columns:
            continue
        rows = _rows_behind(name, list(columns), order, modules, styles, taken)
        if not rows:
            raise PlanError(f"Plan: {name} makes heads in {list(columns)}, and no row layer takes them")
        taken.update(rows)
        yield Block(name, module, columns, rows, _count(name, module, columns, rows))


def _tells_of_a_child(module: nn.Module) -> bool:
    """Whether the heads of which a module knows are those of an nn.MultiheadAttention in it."""
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
    rows = [child for child in order if child.startswith(f"{name}.") and styles[child].name == "row"]
    if not rows:
        behind = order[order.index(columns[-1]) + 1 :]
        rows = [child for child in behind if styles[child].name == "row" and child not in taken][:1]
    return {child: modules[child] for child in rows}


def _count(
    name: str, module: nn.Module, columns: dict[str, tuple[nn.Module, Style]], rows: dict[str, nn.Module]
) -> Heads:
    """How many heads: from the sizes of the layers and of a head, else from what the module says."""
    config = getattr(module, "config", None)
    size = number(module, HEAD_SIZE)
    widths = [sizes_of(linear)[0] for linear, _ in columns.values()]
    width = sizes_of(next(iter(rows.values())))[1]
    says = number(module, HEADS) or number(config, HEADS)
    query = says if says and width % says == 0 else width // size if size and width % size == 0 else None
    if query is None:
        raise PlanError(f"Plan: {name} does not say how many heads it has ({HEADS} or the size of a head, {HEAD_SIZE})")
    kv = number(module, KV_HEADS) or number(config, KV_HEADS)
    if len(columns) > 1 and size and query * size == width and all(w % size == 0 for w in widths):
        kv = min(*widths, width) // size
    units = {style.units for _, style in columns.values()} - {0}
    if len(units) == 1:  # a derived plan has seen it
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


def _packs_equal(linear: nn.Module, style: Style, width: int) -> bool:
    """Whether a fused linear has as many keys and values as queries: one behind the other, or head by head."""
    size = sizes_of(linear)[0]
    packed = style.packed and set(packed_sizes(style, size, "a fused linear")) == {width}
    return bool(packed) or (style.name == "column" and size == 3 * width)


def cuts_of_block(block: Block, R: int) -> dict[str, Cut]:
    """Return how the weights [N, K] of the block's layers are cut: {name: Cut}.

    Raises:
        PlanError: there are not enough heads for R ranks.
    """
    heads = block.heads
    if heads.query < R or any(heads.query_of(R, rank)[1] == 0 for rank in range(R)):
        raise PlanError(f"Plan: {block.name} has {heads.query} heads, which leaves some of {R} ranks with none")
    width = sizes_of(next(iter(block.rows.values())))[1]
    found = {}
    for name, (linear, style) in block.columns.items():
        size = sizes_of(linear)[0]
        if style.name == "packed_column":
            found[name] = _packed(name, size, style, heads, width, R)
        else:
            found[name] = _cut(0, size, heads, R, is_query=size >= width)
    for name, linear in block.rows.items():
        found[name] = _cut(1, sizes_of(linear)[1], heads, R, is_query=True)
    return found


def _cut(dim: int, size: int, heads: Heads, R: int, *, is_query: bool) -> Cut:
    if heads.kv >= R:
        return Cut(dim, size, size // heads.kv)
    return Cut(dim, size, 1, tuple(merge_runs(_runs(0, size, heads, R, rank, is_query)) for rank in range(R)))


def _runs(at: int, size: int, heads: Heads, R: int, rank: int, is_query: bool) -> Runs:
    """Where a rank's heads lie in a projection of `size` that begins at `at`."""
    start, count = heads.query_of(R, rank) if is_query else heads.kv_of(R, rank)
    unit = size // (heads.query if is_query else heads.kv)
    return ((at + start * unit, count * unit),)


def cuts_of_own(block: Block, R: int) -> dict[str, Cut]:
    """Return how the block's own parameters are cut, such as a number for each head (attention sinks).

    Raises:
        PlanError: they are not one for each query head.
    """
    own = dict(block.module.named_parameters(recurse=False))
    odd = [name for name, p in own.items() if p.dim() < 1 or p.size(0) != block.heads.query]
    if odd:
        raise PlanError(
            f"Plan: {block.name} has parameters of its own, {odd}, that are not one for each of its "
            f"{block.heads.query} heads"
        )
    return {name: _cut(0, block.heads.query, block.heads, R, is_query=True) for name in own}


def _packed(name: str, size: int, style: Style, heads: Heads, width: int, R: int) -> Cut:
    """Fused projections: the first is that of the queries, and others are, too, when they are as wide."""
    if style.packed:
        sizes = packed_sizes(style, size, name)
    else:
        unit = width // heads.query
        sizes = packed_sizes(Style(style.name, (width, heads.kv * unit, heads.kv * unit)), size, name)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    runs = [
        merge_runs([r for at, n in zip(starts, sizes, strict=True) for r in _runs(at, n, heads, R, rank, n == width)])
        for rank in range(R)
    ]
    return Cut(0, size, 1, tuple(runs))


class LocalConfig:
    """The config of a block whose forward asks it how many heads there are: the rank's; all else is the model's."""

    def __init__(self, config: Any, **own: int) -> None:
        self.__dict__.update(own, _whole=config)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_whole" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.__dict__["_whole"], name)


def tell_heads(block: Block, R: int, rank: int) -> None:
    """Set what the block's module knows about its heads to what it has on this rank."""
    module, heads = block.module, block.heads
    if not block.columns:
        return
    query, kv = heads.query_of(R, rank)[1], heads.kv_of(R, rank)[1]
    width = sizes_of(next(iter(block.rows.values())))[1]
    for names, whole, mine in (
        (KV_HEADS, heads.kv, kv),
        (HEADS, heads.query, query),
        (WIDTHS, width, width // heads.query * query),
    ):
        for name in names:
            if name in vars(module) and vars(module)[name] == whole:
                setattr(module, name, mine)
    if hasattr(module, "config") and any(
        style.name == "packed_column" and len(style.packed) != 1 for _, style in block.columns.values()
    ):
        module.config = LocalConfig(module.config, num_attention_heads=query, num_key_value_heads=kv)  # type: ignore
    if "num_key_value_groups" in vars(module):
        module.num_key_value_groups = query // kv  # type: ignore[assignment]
