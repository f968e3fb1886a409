"""Ranks of one machine that take each other for ranks of several hosts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tpkernels import ops
from tpkernels.comm import host
from tpkernels.comm.group import Group

Hosts = Sequence[Sequence[int]]  # the ranks of each


def two_hosts(world_size: int) -> Hosts:
    """The first half of the ranks, rounded up, and the others."""
    half = -(-world_size // 2)
    return [range(half), range(half, world_size)]


@contextmanager
def pretended(hosts: Hosts) -> Iterator[None]:
    """Groups that are opened inside are of ranks on these hosts; those of the default process group."""
    mine = next(i for i, ranks in enumerate(hosts) if dist.get_rank() in ranks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "_host_identity", lambda: f"host {mine}")
        yield


def open_group(process_group: dist.ProcessGroup | None = None, hosts: Hosts | None = None, **options: Any) -> Group:
    """Group.open; of transport `hierarchical` on hosts that are pretended, two by default."""
    if options.get("transport") != "hierarchical":
        return Group.open(process_group, **options)
    with pretended(hosts or two_hosts(dist.get_world_size())):
        return Group.open(process_group, **options)


def values(n: int, dtype: torch.dtype, rank: int) -> Tensor:
    """Values whose sum depends on its order."""
    generator = torch.Generator().manual_seed(1000 * rank + n)
    if not dtype.is_floating_point:
        return torch.randint(-50, 50, (n,), generator=generator).to(dtype)
    return (torch.randn(n, generator=generator, dtype=torch.float64) * 3.0**rank).to(dtype)


def reduced(inputs: list[Tensor], hosts: Hosts, op: str, codec: str) -> Tensor:
    """The contract in torch, of which an all_reduce packs the result again: before the last rounding."""
    dtype = inputs[0].dtype
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    combine = {"max": torch.maximum, "min": torch.minimum}.get(op, torch.add)

    def over(parts: list[Tensor]) -> Tensor:
        total = parts[0]
        for x in parts[1:]:
            total = combine(total, x)
        return total

    sums = [repacked(over([inputs[r].to(wide) for r in ranks]), codec) for ranks in hosts]
    return over(sums) / len(inputs) if op == "avg" else over(sums)


def repacked(x: Tensor, codec: str) -> Tensor:
    return x if codec == "none" else ops.decompress(ops.compress(x, codec), x.shape, x.dtype, codec)
