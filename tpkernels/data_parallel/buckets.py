"""Buckets: which parameters share a message. Pure bookkeeping, no communication.

A bucket is filled in the order in which a backward pass finishes gradients, so that its message can be sent early.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Kind = tuple[torch.dtype, torch.Size, torch.device]


def kind_of(tensor: Tensor) -> Kind:
    """Dtype, shape and device."""
    return tensor.dtype, tensor.shape, tensor.device


@dataclass(frozen=True)
class Member:
    """A parameter that is trained.

    Attributes:
        index: its place among the trained parameters of the model, the same on all ranks.
        name: in the model; of tied ones the first.
        parameter: the tensor itself.
        dtype: of its values in buckets, that of its gradient.
        made_as: the `kind_of` the parameter when this was made.
    """

    index: int
    name: str
    parameter: nn.Parameter
    dtype: torch.dtype
    made_as: Kind

    @property
    def numel(self) -> int:
        """Values in it."""
        return self.parameter.numel()


class Bucket:
    """Members whose gradients are one flat message, of one dtype on one device.

    Attributes:
        members: in their order in the message.
        numel: values of all of them.
        dtype, device: of the message.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = list(members)
        self.dtype = members[0].dtype
        self.device = members[0].parameter.device
        sizes = [member.numel for member in members]
        self._starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self.numel = sum(sizes)

    def empty(self, dtype: torch.dtype | None = None) -> Tensor:
        """A flat tensor of its size, uninitialised."""
        return torch.empty(self.numel, dtype=dtype or self.dtype, device=self.device)

    def zeros(self, dtype: torch.dtype | None = None) -> Tensor:
        """A flat tensor of its size, zero."""
        return torch.zeros(self.numel, dtype=dtype or self.dtype, device=self.device)

    def part(self, flat: Tensor, position: int) -> Tensor:
        """The part of the member at this position, in its shape: a view."""
        member = self.members[position]
        return flat.narrow(0, self._starts[position], member.numel).view(member.parameter.shape)

    def parts(self, flat: Tensor) -> dict[str, Tensor]:
        """The parts of all members by name: views."""
        return {member.name: self.part(flat, i) for i, member in enumerate(self.members)}


def cut_into_buckets(members: Sequence[Member], order: Sequence[int], bucket_bytes: int) -> list[Bucket]:
    """Cut the members into buckets, in this order.

    Members of different dtypes never share a bucket. A bucket ends with the member that brings it to bucket_bytes or
    beyond, so that none waits for a large one behind it. Buckets are in the order in which they become full.

    Args:
        members: all of them.
        order: their indices, in the order in which they become ready.
        bucket_bytes: about the size of a bucket.
    """
    open_ones: dict[torch.dtype, list[Member]] = {}
    sizes: dict[torch.dtype, int] = {}
    buckets: list[list[Member]] = []
    for index in order:
        member = members[index]
        open_ones.setdefault(member.dtype, []).append(member)
        sizes[member.dtype] = sizes.get(member.dtype, 0) + member.numel * member.dtype.itemsize
        if sizes[member.dtype] >= bucket_bytes:
            buckets.append(open_ones.pop(member.dtype))
            sizes[member.dtype] = 0
    place = {index: i for i, index in enumerate(order)}
    rest = sorted(open_ones.values(), key=lambda waiting: place[waiting[-1].index])
    return [Bucket(found) for found in [*buckets, *rest]]


def move_state(
    old: Sequence[Bucket], old_state: Sequence[dict[str, Tensor]], new: Sequence[Bucket], kinds: Sequence[str]
) -> list[dict[str, Tensor]]:
    """Lay the state of each parameter out for new buckets.

    Args:
        old, old_state: the buckets so far, and for each of them its flat fp32 tensors by kind.
        new: the new buckets, of the same members.
        kinds: of the state; zero where there was none.

    Returns:
        for each new bucket its flat fp32 tensors by kind.
    """
    moved = [{kind: bucket.zeros(torch.float32) for kind in kinds} for bucket in new]
    if old:
        fill_state(new, moved, state_by_name(old, old_state))
    return moved


def state_by_name(buckets: Sequence[Bucket], state: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The flat tensors of all buckets, cut into {"<kind>.<parameter>": view in the shape of the parameter}."""
    found: dict[str, Tensor] = {}
    for bucket, kinds in zip(buckets, state, strict=True):
        for kind, flat in kinds.items():
            found |= {f"{kind}.{name}": part for name, part in bucket.parts(flat).items()}
    return found


def fill_state(buckets: Sequence[Bucket], state: Sequence[dict[str, Tensor]], by_name: dict[str, Tensor]) -> None:
    """The inverse of state_by_name: copy the values of by_name into the flat tensors."""
    for name, part in state_by_name(buckets, state).items():
        part.copy_(by_name[name])
