"""Sizes of shards and of full tensors: from an argument, by the rule of shard.py, or exchanged between the ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from tpkernels.comm.group import Group
from tpkernels.shard import part_sizes


def sizes_of_ranks(size: int, group: Group) -> list[int]:
    """All-gather the size of a dimension. Under torch.compile, where no rank can send, all parts count as equal.

    Args:
        size: this rank's.
        group: the ranks.

    Returns:
        the sizes of all ranks, in rank order.
    """
    if is_compiling() or group.world_size == 1:
        return [size] * group.world_size
    return group.all_gather_ints(size)


def full_size(op: str, x_shard: Tensor, dim: int, dim_size: int | None, group: Group, wants_grad: bool) -> int:
    """Return the size of dim after gathering; -1 lets the op exchange the sizes.

    A gradient is cut by the rule of shard.py, so the parts must be, too: exchanging here makes all ranks raise alike.

    Args:
        op: the public function, for the text.
        x_shard: this rank's part.
        dim: the dimension that is gathered.
        dim_size: its size, where the caller gave it.
        group: the ranks.
        wants_grad: a gradient will be cut again.

    Raises:
        ValueError: a gradient is wanted for uneven parts, or a CUDA graph is captured, in which nothing is exchanged.
    """
    if dim_size is not None:
        return dim_size
    if is_compiling():
        return group.world_size * x_shard.size(dim)
    if not group.is_cpu and torch.cuda.is_current_stream_capturing():
        raise ValueError(f"{op}: dim_size must be given while a CUDA graph is captured, the ranks cannot be asked")
    if not wants_grad:
        return -1
    sizes = sizes_of_ranks(x_shard.size(dim), group)
    expected = part_sizes(sum(sizes), group.world_size)
    if sizes != expected:
        raise ValueError(f"{op}: with a gradient the sizes of dim {dim} must be {expected} over the ranks, got {sizes}")
    return sum(sizes)


def even_part(size: Any, world_size: int, rank: int) -> Any:
    """Return size // R + (rank < size % R) as one division, which puts no guard on a symbolic size."""
    return (size + world_size - 1 - rank) // world_size


def shard_shape(shape: torch.Size, world_size: int, rank: int, dim: int) -> list[int]:
    """Return the shape of the rank's part of a tensor of this shape."""
    found = list(shape)
    found[dim] = even_part(found[dim], world_size, rank)
    return found


def full_shape(shape: torch.Size, world_size: int, dim: int, dim_size: int) -> list[int]:
    """Return the shape after gathering parts of this shape along dim.

    A fake tensor has no ranks to exchange sizes with: dim_size -1 means equal parts.
    """
    found = list(shape)
    found[dim] = dim_size if dim_size >= 0 else world_size * found[dim]
    return found
