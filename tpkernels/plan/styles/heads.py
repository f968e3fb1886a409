"""Heads of attention, and how many of them each rank has.

Heads are sharded by whole groups, a key and value head with the query heads that attend to it, by the rule of shard.py:
9 heads with 3 key and value heads over 2 ranks are 6 + 3 and 2 + 1. With more ranks than key and value heads, several
ranks hold the same one, and share its query heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tpkernels.shard import part_size, part_start

# The names that the modules of transformers have for the size of a head, ...
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
        """Return, for people, how they are sharded: "9 heads / 3 kv heads over 2 ranks as 6+3 / 2+1"."""
        query = "+".join(str(self.query_of(R, rank)[1]) for rank in range(R))
        if self.kv == self.query:
            return f"{self.query} heads over {R} ranks as {query}"
        kv = "+".join(str(self.kv_of(R, rank)[1]) for rank in range(R))
        shared = " (shared)" if self.kv < R else ""
        return f"{self.query} heads / {self.kv} kv heads over {R} ranks as {query} / {kv}{shared}"


def number(module: Any, names: tuple[str, ...]) -> int | None:
    """Return the first of these attributes that is a whole number."""
    for name in names:
        value = getattr(module, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


class LocalConfig:
    """The config of a block whose forward reads numbers of heads from it: this rank's; all else is the model's."""

    def __init__(self, config: Any, **own: int) -> None:
        self.__dict__.update(own, _full=config)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_full" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.__dict__["_full"], name)
